"""Many runs at once: so many at a time on this machine, or as one job array on Slurm.

submitit starts each pack of runs in a process of its own, here or there. This file says how many
of them at a time, with how many threads, on which GPU, and what becomes of them when somebody
interrupts. A process imports what its runs need when it does them: a notebook's kernel trains by
itself, so the process that waits for it needs no model; and a job must know soon whether the grid
that started it is still there.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import psutil
import submitit
import torch

from drlora_ref.experiments.given import screen
from drlora_ref.experiments.grids import NotebookError, Value
from drlora_ref.experiments.run.termination import Terminated

if TYPE_CHECKING:
    from drlora_ref.experiments.run.settings import Settings

# What a grid file may ask of Slurm, and submitit's names for it.
SLURM = {
    "timeout_min": "timeout_min",
    "gpus_per_node": "gpus_per_node",
    "cpus_per_task": "cpus_per_task",
    "mem_gb": "mem_gb",
    "partition": "slurm_partition",
    "account": "slurm_account",
    "qos": "slurm_qos",
    "constraint": "slurm_constraint",
}
FIT = "DRLORA_FIT"  # in the environment of a grid whose packs are as large as the memory allows
QUEUED = "slurm_job"  # the file that holds the number of the job array that was submitted last
GRACE = 20  # seconds that a run has to save a checkpoint before it is killed
YEAR_MIN = 365 * 24 * 60  # submitit ends a local job after two minutes if it is not told otherwise


class WorkItem(NamedTuple):
    """One run that is to be done: what run_notebook takes, or Settings if there is no notebook."""

    notebook: Path | None
    folder: Path
    parameters: dict[str, Value]


# A pack is the work of one process. `Ended` yields (place of the pack in the list, its job) as the
# jobs end; whoever closes it, as Ctrl-C does, ends those that are left.
Pack = list[WorkItem]
Ended = Generator[tuple[int, submitit.Job], None, None]
Start = Callable[[list[Pack]], Ended]


class ProcessWork(submitit.helpers.Checkpointable):
    """The work of one process: a run, or several runs as replicas.

    Checkpointable: when Slurm preempts the job, or its time is up, it is queued again with the same
    arguments, and the run goes on from its own checkpoint.
    """

    def __call__(self, pack: Pack, environment: dict[str, str], grid_pid: int = 0) -> None:
        """Do the runs of this pack; once the process `grid_pid` has ended, so does this one.

        With FIT in the environment, so many of them at a time as the GPU's memory holds.

        Raises RuntimeError, which says in one line what went wrong in the run.
        """
        if grid_pid:
            threading.Thread(target=_end_after, args=(grid_pid,), daemon=True).start()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run listens, submitit need not
        os.environ.update(environment)  # the notebook's kernel inherits it
        if "OMP_NUM_THREADS" in environment:  # which torch, imported above, has read already
            torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        if all(map(_is_done, pack)):  # preempted at its very end
            return
        try:
            if len(pack) > 1:
                _run_together(pack)
            else:
                _run_alone(pack[0])
        except NotebookError as error:
            raise RuntimeError(_in_one_line(error.kind, error.what)) from error
        except (Exception, Terminated) as error:
            raise RuntimeError(_in_one_line(type(error).__name__, str(error))) from error


def _run_together(pack: Pack) -> None:
    from drlora_ref.experiments.replicas.memory import run_fitting

    refused: list[Exception] = []
    run_fitting([_settings(item) for item in pack], FIT in os.environ, refused)
    if refused:
        raise refused[0]


def _run_alone(item: WorkItem) -> None:
    if item.notebook is None:
        from drlora_ref.experiments.run.one_run import run

        run(_settings(item))
    else:
        from drlora_ref.experiments.grids.notebooks import run_notebook

        run_notebook(item.notebook, item.folder, item.parameters)


def _settings(item: WorkItem) -> "Settings":
    from drlora_ref.experiments.run.settings import Settings

    return Settings(**item.parameters, output_dir=str(item.folder))


def _is_done(item: WorkItem) -> bool:
    from drlora_ref.experiments.run.records import Pending

    done = (item.folder / "record.json").exists() and not item.parameters.get("overwrite")
    return done and not (item.notebook and Pending(item.folder).given())


def _in_one_line(kind: str, message: str) -> str:
    return f"{kind}: {' '.join(screen(message).split())}"


def _end_after(grid_pid: int) -> None:
    # A grid that was killed cannot end its jobs, and the next grid must not find them at work.
    while any(parent.pid == grid_pid for parent in psutil.Process().parents()):
        time.sleep(0.5)
    _kill(os.getpid())  # a kernel looks for this process itself, but not while it starts
    os._exit(1)


def starter(cluster: str, logs: Path, workers: int, wishes: dict[str, str | int]) -> Start:
    """The function that does packs of runs on "local" or "slurm", `workers` packs at a time.

    Raises what slurm_executor raises.
    """
    if cluster == "slurm":
        return partial(on_slurm, executor=slurm_executor(logs, workers, wishes))
    return partial(on_this_machine, logs=logs, workers=workers)


def error_of(job: submitit.Job) -> str:
    """The last line of what a finished job has to complain about; "" if it ended well."""
    if not job.paths.result_pickle.exists():
        return "the process was killed"
    if job.exception() is None:
        return ""
    lines = [line.strip() for line in job.paths.stderr.read_text().splitlines()]
    return next(filter(None, reversed(lines)), "").removeprefix("RuntimeError: ")


def on_this_machine(packs: list[Pack], logs: Path, workers: int) -> Ended:
    """Do each pack in a process of its own, `workers` at a time.

    Raises OSError if a process cannot be started (no memory, a full disk); the others are ended.
    """
    executor = submitit.LocalExecutor(logs)
    executor.update_parameters(timeout_min=YEAR_MIN)
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(workers):
        slots.put(slot)
    stop = threading.Event()

    work = partial(_start_and_wait, executor=executor, workers=workers, slots=slots, stop=stop)
    # A terminal sends Ctrl-C to all processes at once. These threads block it, and so does every
    # process that they start: this process alone hears it, and then ends the others.
    with ThreadPoolExecutor(
        workers, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, {signal.SIGINT})
    ) as pool:
        try:  # from the first submit on: the pool's own end waits for whatever has been started
            places = {pool.submit(work, pack): place for place, pack in enumerate(packs)}
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _start_and_wait(
    pack: Pack,
    executor: submitit.LocalExecutor,
    workers: int,
    slots: SimpleQueue[int],
    stop: threading.Event,
) -> submitit.Job:
    slot = slots.get()
    try:
        share = share_of_machine(slot, workers)
        job, ends = executor.submit(ProcessWork(), pack, share, os.getpid()), 0.0
        while not job.done():
            if stop.is_set():
                ends = ends or time.monotonic() + GRACE
                (_kill if time.monotonic() > ends else _end)(int(job.job_id))
            time.sleep(0.2)
        return job
    finally:
        slots.put(slot)  # or, where no process could be started, the next pack would wait


def _end(controller: int) -> None:
    """Tell the process at work, submitit's child, to save what it has and end."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(controller).children():
            process.terminate()


def _kill(parent: int) -> None:
    """Kill the process at work and its kernel, or whatever else is below this process."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def share_of_machine(slot: int, workers: int) -> dict[str, str]:
    """The environment of the worker in this slot (from 0): its threads and its GPU.

    More workers than processors or GPUs share them; where there is no GPU none is named.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = range(torch.cuda.device_count()) if listed is None else listed.split(",")
    threads = max(1, torch.get_num_threads() // workers)
    gpu = str(gpus[slot % len(gpus)]) if gpus else ""
    return {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": gpu}


def slurm_executor(logs: Path, workers: int, wishes: dict[str, str | int]) -> submitit.AutoExecutor:
    """What submits to Slurm, `workers` jobs at a time; `wishes` as in SLURM. Writes nothing yet.

    Raises, before any work: ValueError (a wish that cannot be), FileNotFoundError (no Slurm here),
    BlockingIOError (jobs of an earlier call, which outlive the terminal they came from).
    """
    if missing := [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]:
        raise FileNotFoundError(
            f"there is no Slurm here ({', '.join(missing)} not found): use --cluster local"
        )
    if (logs.parent / QUEUED).exists():
        number = (logs.parent / QUEUED).read_text()
        queue = ["squeue", "--noheader", f"--jobs={number}"]  # fails once it has forgotten the job
        if subprocess.run(queue, capture_output=True, check=False).stdout.strip():
            raise BlockingIOError(
                f"Slurm's job {number} is still at this grid: wait for it, or `scancel {number}`"
            )
    # A run may take longer than the queue allows: it goes on where it was, as often as it takes.
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
    try:
        executor.update_parameters(
            name=logs.parents[1].absolute().name,
            slurm_array_parallelism=workers,
            **{SLURM[name]: value for name, value in wishes.items()},
        )
    except AssertionError as error:
        raise ValueError(f"slurm: {error}") from None
    return executor


def on_slurm(packs: list[Pack], executor: submitit.AutoExecutor) -> Ended:
    """Do the packs as one Slurm job array."""
    with executor.batch():
        jobs = [executor.submit(ProcessWork(), pack, {}) for pack in packs]
    (executor.folder.parent / QUEUED).write_text(jobs[0].job_id.split("_")[0])
    left = dict(enumerate(jobs))
    try:
        while left:
            for place, job in list(left.items()):
                if job.done():
                    yield place, left.pop(place)
            time.sleep(1)
    finally:
        for job in left.values():
            job.cancel(check=False)
