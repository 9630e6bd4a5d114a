"""Several runs as replicas on one encoder: which may share it, and a record for each."""

from contextlib import ExitStack
from dataclasses import asdict, replace

from accelerate.utils import set_seed

from drlora_ref.experiments.replicas import model as replicas
from drlora_ref.experiments.replicas.engine import ReplicaLoop
from drlora_ref.experiments.run import one_run as runs
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.settings import NOT_IN_KEY, PLACES, Settings
from drlora_ref.experiments.tasks import glue

REPLICATED = ("drlora", "lora")  # methods that can be replicas
# What runs on one encoder may differ in; all else of their settings they share.
OWN = ("method", "seed", "init_r", "target_r", "learning_rate", "dem_weight", "score", "curve")


def shared_settings(settings: Settings) -> dict:
    """What two runs must have in common to be replicas of one pass.

    >>> shared_settings(Settings(seed=1)) == shared_settings(Settings(seed=2, method="lora"))
    True
    """
    return {k: v for k, v in asdict(settings).items() if k not in (*OWN, *PLACES)}


def can_be_replica(settings: Settings) -> bool:
    """Whether a run can share an encoder with others at all.

    >>> can_be_replica(Settings(method="lora")), can_be_replica(Settings(method="full"))
    (True, False)
    """
    return settings.method in REPLICATED and settings.task in glue.TASKS


def check_replicas(settings: list[Settings]) -> None:
    """Raise ValueError, naming what differs, unless these runs may share one encoder."""
    if not settings:
        raise ValueError("replicas: at least one run is needed")
    for one in settings:
        if not can_be_replica(one):
            raise ValueError(
                f"method = {one.method!r} on task = {one.task!r}: only {' and '.join(REPLICATED)} "
                "on GLUE's tasks can be replicas, run others singly"
            )
    first = shared_settings(settings[0])
    for one in settings[1:]:
        here = shared_settings(one)
        if differ := [k for k in first if first[k] != here[k]]:
            named = ", ".join(f"{k}: {first[k]!r} and {here[k]!r}" for k in differ)
            raise ValueError(
                f"replicas share one encoder and one pass, but these runs differ in {named}; "
                f"they may differ in {', '.join(OWN)}"
            )


def set_up_replicas(settings: list[Settings]) -> tuple[list[runs.Job], ReplicaLoop]:
    """Look everything up, and put what all of these runs train into one model.

    Raises, before any training: as check_replicas and runs.set_up, ValueError for runs whose
    numbers of steps differ, or in several processes.
    """
    check_replicas(settings)
    jobs, parts = [], []
    for one in settings:
        job = runs.set_up(one, like=jobs[0] if jobs else None)
        parts.append(replicas.take_apart(job.prepared))
        jobs.append(replace(job, prepared=None))  # its own copy of the encoder can go
    steps = {job.schedule.total_steps for job in jobs}
    if len(steps) > 1:
        raise ValueError(f"replicas take their steps together, but these runs have {sorted(steps)}")
    if jobs[0].accelerator.num_processes > 1:
        raise ValueError("replicas train on one device: start one process, not several")
    model, _ = glue.load_model(jobs[0].source, settings[0].task)
    replicas.replicate(model, parts, settings[0].lora_dropout)
    set_seed(settings[0].seed)  # of dropout
    loop = ReplicaLoop(model, jobs, [part.prunes for part in parts], _checkpoint(jobs))
    return jobs, loop


def run_replicas(settings: list[Settings]) -> list[dict]:
    """Train these runs in one pass; returns their records, each then in its own folder.

    Each record is what the run would have written alone, keyed as ever, and says of how many
    replicas it was one. Killed, the same call goes on from the checkpoint in the first folder.
    Raises before any training, as set_up_replicas; BlockingIOError if another process is at work
    in one of the folders.
    """
    jobs, loop = set_up_replicas(settings)
    with ExitStack() as claims:
        for job in jobs:
            claims.enter_context(runs.claim(job.folder))
        results = loop.run()
        # The first of them also removes the checkpoint, which is in its folder.
        return [runs.write(job, result) for job, result in zip(jobs, results, strict=True)]


def _checkpoint(jobs: list[runs.Job]) -> Checkpoint:
    """One for all replicas, in the folder of the first."""
    shared = {k: v for k, v in shared_settings(jobs[0].settings).items() if k not in NOT_IN_KEY}
    keys = {"replicas": [job.key for job in jobs]}
    return Checkpoint(jobs[0].folder, shared | keys | runs.circumstances(jobs[0].accelerator))
