"""A grid: many runs of one notebook, each of them done once, whoever interrupts and however often.

    python -m drlora_ref.experiments grid notebooks/grids/smoke_cola.yaml --workers 2

What a grid file says is in plans.py, how its runs get their processes in processes.py. Here is
which of them are still to do, and the story as it goes. A run is done when its folder holds a
whole record with its key, so the folder is all that is remembered from one call to the next.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from drlora_ref.experiments.grids import processes as jobs
from drlora_ref.experiments.grids.plans import Run, pack, plan, read_grid
from drlora_ref.experiments.run.one_run import claim, code_hash
from drlora_ref.experiments.run.records import read_record

TO_DO, DONE, OTHER_CODE, FAILED = "to do", "done", "from other code", "failed"
INTERRUPTED = 130  # the exit status of what Ctrl-C ended


def state_of(run: Run, code: str) -> tuple[str, str]:
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
    """Do what of a grid is not done yet; returns the exit status: 1 if a run failed, else 0.

    `out` is runs/<name of the file> by default; `stale` also repeats what other code has done.
    With `replicas` above 1, up to so many runs that may share an encoder train in one pass and
    leave a record each, without the executed notebook.
    Raises, before any work, what read_grid, plan and jobs.starter raise, and
    BlockingIOError if another grid is at work in `out`.
    """
    grid, out = read_grid(file), Path(out or Path("runs", Path(file).stem))
    for name, value in (("workers", workers), ("replicas", replicas)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if "cost" in grid:
        text = "cost: {optimizer_steps:,} optimizer steps, {gpu_hours:,} GPU hours; {basis}"
        print(text.format(**grid["cost"]), flush=True)
    logs = out / "logs" / f"{len(list(out.glob('logs/*/'))) + 1:03}"  # a new folder for each call
    start = jobs.starter(cluster, logs, workers, grid.get("slurm", {}))
    runs = plan(grid, out)
    if dry_run:
        return _show(runs)
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        return _work(runs, start, stale, replicas)


def _show(runs: list[Run]) -> int:
    code = code_hash()
    for run in runs:
        print(f"{run.label}: {', '.join(filter(None, state_of(run, code)))}")
    print(f"{len(runs)} runs, {sum(run.steps for run in runs):,} optimizer steps in all")
    return 0


def _work(runs: list[Run], start: Callable, stale: bool, replicas: int) -> int:
    code, counts, to_do, failures = code_hash(), Counter(), [], []
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
    done, interrupted = 0, False
    try:
        for failure in _do(pack(to_do, replicas), start, stale, code):
            done += not failure
            failures += [failure] if failure else []
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what has ended is kept, and the same command goes on from here")
    skipped, other = counts[DONE], counts[OTHER_CODE]
    print(f"{done} done, {skipped} skipped, {other} from other code, {len(failures)} failed")
    for failure in failures:
        print(f"  {failure}")
    return INTERRUPTED if interrupted else int(bool(failures))


def _do(packs: list[list[Run]], start: Callable, stale: bool, code: str) -> Iterator[str]:
    """Start these runs; as each ends, print a line and yield what went wrong, "" if nothing did."""
    if not packs:
        return
    given = {"overwrite": True} if stale else {}
    tasks = [
        [run.task._replace(parameters=run.task.parameters | given) for run in runs]
        for runs in packs
    ]
    everything = [run for runs in packs for run in runs]
    began, steps, total = time.perf_counter(), 0, sum(run.steps for run in everything)
    with closing(start(tasks)) as ended:
        pairs = ((run, job) for place, job in ended for run in packs[place])
        for number, (run, job) in enumerate(pairs, 1):
            error, (state, note) = jobs.error_of(job), state_of(run, code)
            if not error and state not in (DONE, OTHER_CODE):
                error = note or "the notebook ran to its end and wrote no record.json"
            steps += run.steps
            spent = time.perf_counter() - began
            times = f"{_time(spent)} so far, about {_time(spent / steps * (total - steps))} left"
            outcome = f"{FAILED}: {error}" if error else note
            print(f"[{number}/{len(everything)}] {run.label}: {outcome}; {times}", flush=True)
            log = os.path.relpath(job.paths.stderr)
            yield f"{run.label}: {error} (log: {log})" if error else ""


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
