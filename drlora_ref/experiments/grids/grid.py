"""A grid: many runs, each of them done once, whoever interrupts and however often.

    python -m drlora_ref.experiments grid notebooks/grids/smoke_cola.yaml --workers 2

plans.py reads a grid's file, processes.py gives its runs their processes. This file finds out which
runs are still to do, and tells how they end. A run is done when its folder holds a whole record
with its key, so a grid keeps no list of its own from one call to the next.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import submitit
import torch

from drlora_ref.experiments.given import place, screen, shown
from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.grids.plans import Grid, PlannedRun, pack, plan, read_grid
from drlora_ref.experiments.grids.processes import WorkItem
from drlora_ref.experiments.replicas.many_runs import OWN
from drlora_ref.experiments.replicas.memory import MOST
from drlora_ref.experiments.run.checkpoints import CHECKPOINT, runs_in
from drlora_ref.experiments.run.loop import readable_time
from drlora_ref.experiments.run.one_run import claim, code_hash
from drlora_ref.experiments.run.records import Pending, make_folder, read_record
from drlora_ref.experiments.run.termination import INTERRUPTED, TERMINATED

TO_DO, DONE, OTHER_CODE, FAILED = "to do", "done", "from other code", "failed"


def state_of(run: PlannedRun, code: str) -> tuple[str, str]:
    """(TO_DO, DONE, OTHER_CODE or FAILED; what there is to say of it), by the run's record.

    OTHER_CODE is also a record with another configuration or tokenizer of the model. FAILED is a
    record that is damaged or of another run: it is left as it is.
    """
    if not os.path.lexists(run.folder / "record.json"):
        started = (run.folder / CHECKPOINT).exists()
        return TO_DO, "goes on from its checkpoint" if started else ""
    try:
        if run.work.notebook and Pending(run.folder).given():
            return TO_DO, "its notebook is not finished"
        record = read_record(run.folder)
    except (OSError, ValueError) as error:
        return FAILED, screen(error)
    if record.get("key") != run.key:
        key = shown(record.get("key"))
        return FAILED, f"{run.folder / 'record.json'} is of another run (key {key})"
    status, best = record.get("status", "completed"), record.get("best")
    score = "" if best is None else f"{record.get('metric_name', 'score')} {best:.4f}"
    words = [score, *([status] if status != "completed" else []), *_other_files(run, record)]
    same = record.get("code") == code and not _other_files(run, record)
    return DONE if same else OTHER_CODE, ", ".join(filter(None, words))


def _other_files(run: PlannedRun, record: dict) -> list[str]:
    """What is new of the model's files since the record was written; older records do not say."""
    names, then = ("config_sha256", "tokenizer_sha256"), record.get("model", {})
    new = [name for name in names if name in then and then[name] != getattr(run.model, name)]
    return [f"the model has another {name.removesuffix('_sha256')} now" for name in new]


def run_grid(
    file: str | Path | Grid,
    out: str | Path = "",
    workers: int = 1,
    cluster: str = "local",
    stale: bool = False,
    dry_run: bool = False,
    replicas: int | str = 1,
) -> int:
    """Do the runs of a grid that are not done yet; returns the exit status.

    It is 0 if all went well, 1 if a run failed, INTERRUPTED after Ctrl-C, TERMINATED after SIGTERM.

    `file` may also be what read_grid has read, and `out` must be named then; by default it is
    runs/<name of the file>. `stale` also repeats what other code has done.
    With `replicas` above 1, up to so many runs that may share an encoder train in one pass and
    leave a record each, without the executed notebook; with "auto", as many as the GPU's memory
    holds, and without a GPU each by itself. What an earlier call has begun goes on as
    it was begun: a pass with its replicas, a run alone.
    Raises, before any work, what read_grid, plan and processes.starter raise, and
    BlockingIOError if another grid is at work in `out`; OSError when a process cannot be started.
    """
    if isinstance(file, dict):
        grid, out = file, place(out)
    else:
        grid, out = read_grid(file), place(out or Path("runs", Path(file).stem))
    fits = replicas == "auto"
    if fits:
        replicas = MOST if torch.cuda.is_available() else 1
    for name, value in (("workers", workers), ("replicas", replicas)):
        if not isinstance(value, int) or value < 1:
            words = " or auto" if name == "replicas" else ""
            raise ValueError(f"{name} = {shown(value)}: must be at least 1{words}")
    if "cost" in grid:
        text = "cost: {optimizer_steps:,} optimizer steps, {gpu_hours:,} GPU hours; {basis}"
        print(text.format(**grid["cost"]), flush=True)
    logs = out / "logs" / f"{len(list(out.glob('logs/*/'))) + 1:03}"  # a new folder for each call
    start = processes.starter(cluster, logs, workers, grid.get("slurm", {}))
    runs = plan(grid, out)
    if dry_run:
        return _show(runs)
    make_folder(out, "--out")
    with claim(out), _environment({processes.FIT: "1"} if fits else {}):
        return _work(runs, start, stale, int(replicas))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """The processes that are started within inherit these."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)


def _show(runs: list[PlannedRun]) -> int:
    code = code_hash()
    for run in runs:
        print(f"{run.label}: {', '.join(filter(None, state_of(run, code)))}")
    print(f"{len(runs)} runs, {sum(run.steps for run in runs):,} optimizer steps in all")
    return 0


def _work(runs: list[PlannedRun], start: processes.Start, stale: bool, replicas: int) -> int:
    code, done, ended = code_hash(), 0, 0
    to_do, counts, failures = _sort(runs, code, stale)
    with _sigterm_as_ctrl_c() as terminated:
        try:
            for failure in _do(_packs(runs, to_do, replicas), start, stale, code):
                if failure:
                    failures.append(failure)
                else:
                    done += 1
        except KeyboardInterrupt:
            ended = TERMINATED if terminated else INTERRUPTED
            word = "SIGTERM, heard by the runs at work too" if terminated else "interrupted"
            print(f"{word}: what has ended is kept, and the same command goes on from here")
    skipped, other = counts[DONE], counts[OTHER_CODE]
    print(f"{done} done, {skipped} skipped, {other} from other code, {len(failures)} failed")
    for failure in failures:
        print(f"  {failure}")
    return ended or int(bool(failures))


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[list[int]]:
    """Within it SIGTERM raises KeyboardInterrupt, and is then in the list."""
    terminated: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _packs(
    runs: list[PlannedRun], to_do: list[PlannedRun], replicas: int
) -> list[list[PlannedRun]]:
    """What is to do, in lists for one process each: first what has a checkpoint, as it was begun.

    Of a pass that was killed all runs are there, also those that have their record and those that
    the grid no longer names; run_replicas knows what is left to do for each.
    """
    left, planned = {run.key: run for run in to_do}, {run.key: run for run in runs}
    begun: list[list[PlannedRun]] = []
    for path in sorted(runs[0].folder.parent.glob(f"*/{CHECKPOINT}")) if runs else []:
        alone: dict[str, dict] = {run.key: {} for run in left.values() if run.folder == path.parent}
        pack_of = runs_in(path) or alone
        if not left.keys() & pack_of.keys():
            continue
        like = next(planned[key] for key in pack_of if key in planned)
        begun.append([planned.get(key) or _unplanned(key, given, like)
                      for key, given in pack_of.items()])  # fmt: skip
        left = {key: run for key, run in left.items() if key not in pack_of}
    return begun + pack(list(left.values()), replicas)


def _unplanned(key: str, given: dict, like: PlannedRun) -> PlannedRun:
    """A run that was begun together with `like` by a grid that named it."""
    folder = like.folder.parent / Path(given["output_dir"]).name
    parameters = like.work.parameters | {name: given[name] for name in OWN}
    work = WorkItem(None, folder, parameters)
    return replace(like, label=folder.name.removesuffix(f"-{key}"), key=key, work=work)


def _sort(
    runs: list[PlannedRun], code: str, stale: bool
) -> tuple[list[PlannedRun], Counter[str], list[str]]:
    """(the runs to do, how many others are in which state, what is wrong with those that failed).

    What is neither to do nor done is printed.
    """
    to_do: list[PlannedRun] = []
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for run in runs:
        state, note = state_of(run, code)
        if state == TO_DO or (state == OTHER_CODE and stale):
            to_do.append(run)
            continue
        counts[state] += 1
        if state != DONE:
            print(f"{run.label}: {state}: {note}", flush=True)
        if state == FAILED:
            failures.append(f"{run.label}: {note}")
    return to_do, counts, failures


def _do(
    packs: list[list[PlannedRun]], start: processes.Start, stale: bool, code: str
) -> Iterator[str]:
    """Start these runs; as each ends, print a line and yield what went wrong, "" if nothing did."""
    if not packs:
        return
    # Of a pass that goes on, some may have their record already: they are not counted again.
    told = [[run for run in one if stale or state_of(run, code)[0] != DONE] for one in packs]
    runs = [run for one in told for run in one]
    began, steps, total = time.perf_counter(), 0, sum(run.steps for run in runs)
    with closing(start([[_item(run, stale) for run in one] for one in packs])) as ended:
        pairs = ((run, place, job) for place, job in ended for run in told[place])
        for number, (run, place, job) in enumerate(pairs, 1):
            error, note = _outcome(run, job, code, alone=len(packs[place]) == 1)
            steps += run.steps
            spent = time.perf_counter() - began
            left = spent / steps * (total - steps)
            times = f"{readable_time(spent)} so far, about {readable_time(left)} left"
            outcome = f"{FAILED}: {error}" if error else note
            print(f"[{number}/{len(runs)}] {run.label}: {outcome}; {times}", flush=True)
            log = os.path.relpath(job.paths.stderr)
            yield f"{run.label}: {error} (log: {log})" if error else ""


def _item(run: PlannedRun, stale: bool) -> WorkItem:
    given = run.work.parameters | ({"overwrite": True} if stale else {})
    return run.work._replace(parameters=given)


def _outcome(run: PlannedRun, job: submitit.Job, code: str, alone: bool) -> tuple[str, str]:
    """(what went wrong, "" if nothing did; what the run's record says)."""
    error, (state, note) = processes.error_of(job), state_of(run, code)
    if state == DONE and not alone:  # what went wrong in its pass did so for others
        error = ""
    if not error and state not in (DONE, OTHER_CODE):
        error = note or "the notebook ran to its end and wrote no record.json"
    return error, note
