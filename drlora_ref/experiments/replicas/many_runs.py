"""Several runs as replicas on one encoder: which may share it, and a record for each."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import cast

from accelerate.utils import set_seed

from drlora_ref.experiments.given import place
from drlora_ref.experiments.methods import METHODS
from drlora_ref.experiments.replicas.engine import Replicas
from drlora_ref.experiments.replicas.model import Part, replicate, take_apart
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.checkpoints import CHECKPOINT, Checkpoint
from drlora_ref.experiments.run.loop import Loop
from drlora_ref.experiments.run.order import make_order
from drlora_ref.experiments.run.records import Record, read_record
from drlora_ref.experiments.run.settings import NOT_IN_KEY, PLACES, Settings
from drlora_ref.experiments.tasks import glue, squad

# What runs on one encoder may differ in; all else of their settings they share.
OWN = ("method", "seed", "init_r", "target_r", "rank_map", "permute_map", "learning_rate",
       "dem_weight", "score", "uniform", "curve")  # fmt: skip


def shared_settings(settings: Settings) -> dict:
    """What two runs must have in common to be replicas of one pass.

    The seed too where it draws texts of SQuAD: each is a window or several, so that other texts
    make another number of rows.

    >>> shared_settings(Settings(seed=1)) == shared_settings(Settings(seed=2, method="lora"))
    True
    >>> some = dict(task="squad_v1", train_size=50)
    >>> shared_settings(Settings(seed=1, **some)) == shared_settings(Settings(seed=2, **some))
    False
    """
    own = {*OWN, *PLACES}
    if settings.task in squad.TASKS and settings.train_size:
        own -= {"seed"}
    return {k: v for k, v in asdict(settings).items() if k not in own}


def can_be_replica(settings: Settings) -> bool:
    """Whether a run can share an encoder with others at all.

    >>> can_be_replica(Settings(method="lora")), can_be_replica(Settings(method="full"))
    (True, False)
    """
    possible = settings.task in (*glue.TASKS, *squad.TASKS) and not settings.film_events
    return METHODS[settings.method].replicable and possible


def check_replicas(settings: list[Settings]) -> None:
    """Raise ValueError, naming what differs, unless these runs may share one encoder."""
    if not settings:
        raise ValueError("replicas: at least one run is needed")
    for one in settings:
        if one.film_events:
            raise ValueError(
                f"film_events = {one.film_events}: replicas keep no events, run it singly"
            )
        if not can_be_replica(one):
            can = " and ".join(name for name, method in METHODS.items() if method.replicable)
            raise ValueError(
                f"method = {one.method!r} on task = {one.task!r}: only {can} on GLUE's tasks "
                "and SQuAD can be replicas, run others singly"
            )
    first = shared_settings(settings[0])
    for one in settings[1:]:
        here = shared_settings(one)
        if differ := [k for k in first if first[k] != here[k]]:
            named = ", ".join(f"{k}: {first[k]!r} and {here[k]!r}" for k in differ)
            raise ValueError(
                f"replicas share one encoder and one pass, but these runs differ in {named}; "
                f"they may differ in {', '.join(name for name in OWN if name not in first)}"
            )


def set_up_replicas(
    settings: list[Settings], refused: list[Exception] | None = None
) -> tuple[list[one_run.ReadyRun], Loop]:
    """Look everything up, and put what all of these runs train into one model.

    Raises, before any training: as check_replicas and one_run.set_up, ValueError for runs whose
    numbers of steps differ, or in several processes. Where there is a list `refused`, what set_up
    raises for one run goes there, and the pass takes place without it, if any other is left.
    """
    check_replicas(settings)
    runs, parts = _look_up(settings, refused)
    settings = [run.settings for run in runs]
    steps = {run.schedule.total_steps for run in runs}
    if len(steps) > 1:
        raise ValueError(f"replicas take their steps together, but these runs have {sorted(steps)}")
    accelerator, shared = runs[0].accelerator, settings[0]
    if accelerator.num_processes > 1:
        raise ValueError("replicas train on one device: start one process, not several")
    model, _ = one_run.load_model(runs[0].source, shared)
    replicate(model, parts, shared.lora_dropout)
    set_seed(shared.seed)  # of dropout
    inputs, schedules = [run.inputs for run in runs], [run.schedule for run in runs]
    prunes = [part.prunes for part in parts]
    engine = Replicas(model, inputs, schedules, settings, prunes, accelerator)
    order = make_order(inputs, settings)
    return runs, Loop(engine, order, schedules[0], shared, accelerator, _checkpoint(runs))


def _look_up(
    settings: list[Settings], refused: list[Exception] | None
) -> tuple[list[one_run.ReadyRun], list[Part]]:
    """Each run, and what it trains."""
    # A pass that was killed while it wrote its records left some of them, and its checkpoint.
    begun = (place(settings[0].output_dir) / CHECKPOINT).exists()
    runs: list[one_run.ReadyRun] = []
    parts = []
    for one in settings:
        try:
            run = one_run.set_up(one, like=runs[0] if runs else None, may_be_done=begun)
        except (OSError, ValueError, ImportError) as error:
            if refused is None or len(refused) + 1 == len(settings):
                raise
            refused.append(error)
            continue
        parts.append(take_apart(run.prepared))
        runs.append(replace(run, prepared=None))  # its own copy of the encoder can go
    return runs, parts


def run_replicas(settings: list[Settings], refused: list[Exception] | None = None) -> list[Record]:
    """Train these runs in one pass; returns their records, each then in its own folder.

    Each record is what the run would have written alone, keyed as ever, and says of how many
    replicas it was one. Killed, even while it writes its records, the same call goes on from the
    checkpoint in the first folder, which stays until every record is there.
    Raises before any training, as set_up_replicas (`refused` too is as there); BlockingIOError if
    another process is at work in one of the folders; Terminated after SIGTERM; and once the other
    records are written, what the first one that cannot be written raises.
    """
    runs, loop = set_up_replicas(settings, refused)
    written: list[Record] = []
    problems: list[Exception] = []
    with ExitStack() as claims:
        for run in runs:
            claims.enter_context(one_run.claim(run.folder))
        for run, own in zip(runs, loop.run(), strict=True):
            try:
                written.append(_earlier(run) or one_run.write_results(run, own))
            except (OSError, ValueError) as error:
                problems.append(error)
        if problems:
            raise problems[0]
        loop.checkpoint.remove()
    return written


def _earlier(run: one_run.ReadyRun) -> Record | None:
    """The record of this run that was written before the pass was killed."""
    if run.settings.overwrite or not (run.folder / "record.json").exists():
        return None
    record = read_record(run.folder)
    return cast(Record, record) if record.get("key") == run.key else None


def _checkpoint(runs: list[one_run.ReadyRun]) -> Checkpoint:
    """One for all replicas, in the folder of the first."""
    shared = {k: v for k, v in shared_settings(runs[0].settings).items() if k not in NOT_IN_KEY}
    keys = {"replicas": [run.key for run in runs]}
    parameters = {run.key: asdict(run.settings) for run in runs}
    configuration = shared | keys | one_run.circumstances(runs[0])
    return Checkpoint(runs[0].folder, configuration, parameters)
