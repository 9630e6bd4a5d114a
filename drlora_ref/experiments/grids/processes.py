"""Many runs of notebooks at once: bounded on this machine, or as one job array on Slurm.

submitit starts each run in a process of its own, here or there; this file says how many at a time,
with how many threads, on which GPU, and what becomes of them when somebody interrupts.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from signal import SIG_BLOCK, SIGINT, pthread_sigmask
from typing import NamedTuple

import psutil
import submitit
import torch
from papermill.exceptions import PapermillExecutionError

from drlora_ref.experiments.grids.notebooks import run_notebook
from drlora_ref.experiments.replicas.many_runs import run_replicas
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
QUEUED = "slurm_job"  # the file that holds the number of the job array that was submitted last
YEAR_MIN = 365 * 24 * 60  # submitit ends a local job after two minutes if it is not told otherwise


class Task(NamedTuple):
    """A run to start: what run_notebook takes."""

    notebook: Path
    folder: Path
    parameters: dict


class GridJob(submitit.helpers.Checkpointable):
    """The work of one process: a run of the notebook, or several runs as replicas.

    Checkpointable: when Slurm preempts the job, or its time is up, it is queued again with the same
    arguments, and the run goes on from its own checkpoint.
    """

    def __call__(self, tasks: list[Task], environment: dict[str, str], grid_pid: int = 0) -> None:
        """Do these tasks; `grid_pid`: the process without which there is no point in going on."""
        os.environ.update(environment)  # the notebook's kernel inherits it
        if grid_pid:
            threading.Thread(target=_end_after, args=(grid_pid,), daemon=True).start()
        tasks = [task for task in tasks if not _is_done(task)]  # preempted before its end
        if len(tasks) > 1:
            run_replicas([Settings(**t.parameters, output_dir=str(t.folder)) for t in tasks])
            return
        try:
            for task in tasks:
                run_notebook(task.notebook, task.folder, task.parameters)
        except PapermillExecutionError as error:
            print(error, file=sys.stderr)  # the cell and its traceback; then one line that says it
            raise RuntimeError(f"{error.ename}: {' '.join(error.evalue.split())}") from None


def _is_done(task: Task) -> bool:
    return (task.folder / "record.json").exists() and not task.parameters.get("overwrite")


def _end_after(grid_pid: int) -> None:
    # A grid that was killed cannot end its jobs; the next one must not find them at work.
    while any(parent.pid == grid_pid for parent in psutil.Process().parents()):
        time.sleep(0.5)
    os._exit(1)  # the kernel notices, and ends too


def starter(cluster: str, logs: Path, workers: int, wishes: dict) -> Callable:
    """The function that runs lists of Tasks on "local" or "slurm"; raises as slurm_executor.

    Each list is one process's work. It yields (number of the list, its job) as they end; who stops
    listening (Ctrl-C) ends them all.
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


def on_this_machine(
    tasks: list[list[Task]], logs: Path, workers: int
) -> Iterator[tuple[int, submitit.Job]]:
    """Run each list of tasks in a process of its own, `workers` at a time."""
    executor = submitit.LocalExecutor(logs)
    executor.update_parameters(timeout_min=YEAR_MIN)
    slots, stop = SimpleQueue(), threading.Event()
    for slot in range(workers):
        slots.put(slot)

    def run(task: list[Task]) -> submitit.Job:
        slot = slots.get()
        job = executor.submit(GridJob(), task, share_of_machine(slot, workers), os.getpid())
        while not job.done():
            if stop.is_set():
                _end(int(job.job_id))
            time.sleep(0.2)
        slots.put(slot)
        return job

    # Ctrl-C is for this process alone, which then ends the others: they inherit what threads block.
    quiet = dict(initializer=pthread_sigmask, initargs=(SIG_BLOCK, {SIGINT}))
    with ThreadPoolExecutor(workers, **quiet) as pool:
        futures = {pool.submit(run, task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _end(controller: int) -> None:
    # submitit's controller ends when its one child does, and the notebook's kernel notices too.
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(controller).children():
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


def slurm_executor(logs: Path, workers: int, wishes: dict) -> submitit.AutoExecutor:
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


def on_slurm(
    tasks: list[list[Task]], executor: submitit.AutoExecutor
) -> Iterator[tuple[int, submitit.Job]]:
    """Run the tasks as one Slurm job array."""
    with executor.batch():
        jobs = [executor.submit(GridJob(), task, {}) for task in tasks]
    (executor.folder.parent / QUEUED).write_text(jobs[0].job_id.split("_")[0])
    left = dict(enumerate(jobs))
    try:
        while left:
            for number, job in list(left.items()):
                if job.done():
                    yield number, left.pop(number)
            time.sleep(1)
    finally:
        for job in left.values():
            job.cancel(check=False)
