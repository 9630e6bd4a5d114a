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
from contextlib import closing
from pathlib import Path

import submitit

from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.grids.plans import PlannedRun, pack, plan, read_grid
from drlora_ref.experiments.run.loop import readable_time
from drlora_ref.experiments.run.one_run import claim, code_hash
from drlora_ref.experiments.run.records import read_record

TO_DO, DONE, OTHER_CODE, FAILED = "to do", "done", "from other code", "failed"
INTERRUPTED = 130  # the exit status of what Ctrl-C ended


def state_of(run: PlannedRun, code: str) -> tuple[str, str]:
    """(TO_DO, DONE, OTHER_CODE or FAILED; what there is to say of it), by the run's record.

    FAILED is a record that is damaged or of another run: it is left as it is.
    """
    if not (run.folder / "record.json").exists():
        started = (run.folder / "checkpoint.pt").exists()
        return TO_DO, "goes on from its checkpoint" if started else ""
    try:
        record = read_record(run.folder)
    except ValueError as error:
        return FAILED, str(error)
    if record.get("key") != run.key:
        return FAILED, f"{run.folder / 'record.json'} is of another run (key {record.get('key')})"
    status, best = record.get("status", "completed"), record.get("best")
    score = "" if best is None else f"{record.get('metric_name', 'score')} {best:.4f}"
    words = [score, *([status] if status != "completed" else [])]
    return DONE if record.get("code") == code else OTHER_CODE, ", ".join(filter(None, words))


def run_grid(
    file: str | Path,
    out: str | Path = "",
    workers: int = 1,
    cluster: str = "local",
    stale: bool = False,
    dry_run: bool = False,
    replicas: int = 1,
) -> int:
    """Do the runs of a grid that are not done yet; returns the exit status.

    It is 0 if all went well, 1 if a run failed, INTERRUPTED after Ctrl-C.

    `out` is runs/<name of the file> by default; `stale` also repeats what other code has done.
    With `replicas` above 1, up to so many runs that may share an encoder train in one pass and
    leave a record each, without the executed notebook.
    Raises, before any work, what read_grid, plan and processes.starter raise, and
    BlockingIOError if another grid is at work in `out`; OSError when a process cannot be started.
    """
    grid, out = read_grid(file), Path(out or Path("runs", Path(file).stem))
    for name, value in (("workers", workers), ("replicas", replicas)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if "cost" in grid:
        text = "cost: {optimizer_steps:,} optimizer steps, {gpu_hours:,} GPU hours; {basis}"
        print(text.format(**grid["cost"]), flush=True)
    logs = out / "logs" / f"{len(list(out.glob('logs/*/'))) + 1:03}"  # a new folder for each call
    start = processes.starter(cluster, logs, workers, grid.get("slurm", {}))
    runs = plan(grid, out)
    if dry_run:
        return _show(runs)
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        return _work(runs, start, stale, replicas)


def _show(runs: list[PlannedRun]) -> int:
    code = code_hash()
    for run in runs:
        print(f"{run.label}: {', '.join(filter(None, state_of(run, code)))}")
    print(f"{len(runs)} runs, {sum(run.steps for run in runs):,} optimizer steps in all")
    return 0


def _work(runs: list[PlannedRun], start: processes.Start, stale: bool, replicas: int) -> int:
    code, done, interrupted = code_hash(), 0, False
    to_do, counts, failures = _sort(runs, code, stale)
    _hear_ctrl_c()
    try:
        for failure in _do(pack(to_do, replicas), start, stale, code):
            if failure:
                failures.append(failure)
            else:
                done += 1
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what has ended is kept, and the same command goes on from here")
    skipped, other = counts[DONE], counts[OTHER_CODE]
    print(f"{done} done, {skipped} skipped, {other} from other code, {len(failures)} failed")
    for failure in failures:
        print(f"  {failure}")
    return INTERRUPTED if interrupted else int(bool(failures))


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


def _hear_ctrl_c() -> None:
    # A script's background commands ignore Ctrl-C from their start, and Python leaves it so. But
    # only an interrupt that is heard ends the jobs at once, and says how to go on.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _do(
    packs: list[list[PlannedRun]], start: processes.Start, stale: bool, code: str
) -> Iterator[str]:
    """Start these runs; as each ends, print a line and yield what went wrong, "" if nothing did."""
    if not packs:
        return
    runs = [run for one in packs for run in one]
    began, steps, total = time.perf_counter(), 0, sum(run.steps for run in runs)
    with closing(start([[_item(run, stale) for run in one] for one in packs])) as ended:
        pairs = ((run, job) for place, job in ended for run in packs[place])
        for number, (run, job) in enumerate(pairs, 1):
            error, note = _outcome(run, job, code)
            steps += run.steps
            spent = time.perf_counter() - began
            left = spent / steps * (total - steps)
            times = f"{readable_time(spent)} so far, about {readable_time(left)} left"
            outcome = f"{FAILED}: {error}" if error else note
            print(f"[{number}/{len(runs)}] {run.label}: {outcome}; {times}", flush=True)
            log = os.path.relpath(job.paths.stderr)
            yield f"{run.label}: {error} (log: {log})" if error else ""


def _item(run: PlannedRun, stale: bool) -> processes.WorkItem:
    given = run.work.parameters | ({"overwrite": True} if stale else {})
    return run.work._replace(parameters=given)


def _outcome(run: PlannedRun, job: submitit.Job, code: str) -> tuple[str, str]:
    """(what went wrong, "" if nothing did; what the run's record says)."""
    error, (state, note) = processes.error_of(job), state_of(run, code)
    if not error and state not in (DONE, OTHER_CODE):
        error = note or "the notebook ran to its end and wrote no record.json"
    return error, note
