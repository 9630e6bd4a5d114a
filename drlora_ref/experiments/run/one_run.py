"""One run: every parameter in one place, everything looked up first, then training, then a record.

Notebook 10 and `python -m drlora_ref.experiments run` are two doors to the three functions here.
"""

import hashlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from filelock import FileLock, Timeout

import drlora_ref
from drlora_ref.experiments import methods
from drlora_ref.experiments.run import records
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.loop import Loop
from drlora_ref.experiments.run.settings import (
    NOT_IN_KEY,
    PRECISIONS,
    Settings,
    run_key,
)
from drlora_ref.experiments.sources import models
from drlora_ref.experiments.tasks.data import Inputs, TaskData
from drlora_ref.experiments.tasks.families import FAMILIES
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import count_steps

PRUNING = ("drlora", "adalora")  # the methods that start from init_r
LOCK = ".lock"  # held by the process that works in a run's folder, or in a grid's


def code_hash() -> str:
    """A hash of the package's source files, in 12 digits: which code a record came from."""
    digest = hashlib.sha256()
    root = Path(drlora_ref.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """A run that is ready to go: everything that could be wrong has been looked at."""

    settings: Settings
    folder: Path
    data: TaskData
    source: models.ModelSource
    schedule: BudgetSchedule
    prepared: methods.Prepared
    inputs: Inputs
    accelerator: Accelerator

    @property
    def key(self) -> str:
        """`run_key` of this run."""
        return run_key(self.settings, self.data.fingerprint, self.source.sha256)


def rows_of(settings: Settings) -> dict:
    """All that decides which encoded rows a run reads: the seed only where it draws a part.

    >>> rows_of(Settings(seed=1)) == rows_of(Settings(seed=2, learning_rate=0.1))
    True
    >>> rows_of(Settings(seed=1, train_size=50)) == rows_of(Settings(seed=2, train_size=50))
    False
    """
    names = ("task", "data_dir", "model_name", "train_size", *FAMILIES[settings.task].OPTIONS)
    drawn_with = settings.seed if settings.train_size else None
    return {name: getattr(settings, name) for name in names} | {"drawn_with": drawn_with}


def set_up(settings: Settings, like: Job | None = None) -> Job:
    """Look everything up, load data and model, and put the method's parameters into the model.

    Where the rows are those of the job `like`, its encoded data are taken.
    Raises, before any training: FileExistsError (there is a record), ValueError, FileNotFoundError,
    ImportError or ConnectionError (a name, a number, a file or the hub), as the parts do.
    """
    folder = records.check_output_dir(settings.output_dir, settings.overwrite)
    family = FAMILIES[settings.task]
    source = models.resolve_model(settings.model_name)
    if same := like and rows_of(like.settings) == rows_of(settings):
        data = like.data
    else:
        place = settings.task, settings.data_dir
        data = family.load_task(*place, settings.train_size, settings.seed)
    make_schedule(settings, len(data.train))  # a bad number shows before the data is encoded
    accelerator = make_accelerator(settings.precision)
    set_seed(settings.seed)
    model, tokenizer = family.load_model(source, settings.task)
    options = {name: getattr(settings, name) for name in family.OPTIONS}
    inputs = like.inputs if same else family.make_inputs(data, tokenizer, **options)
    # An epoch is a pass over the encoded rows: a long text of SQuAD is several windows.
    schedule = make_schedule(settings, len(inputs.train))
    prepared = methods.prepare(
        settings.method,
        model,
        schedule,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bottleneck=settings.bottleneck,
        dem_weight=settings.dem_weight,
        beta=settings.beta,
        score=settings.score,
        seed=settings.seed,
    )
    return Job(settings, folder, data, source, schedule, prepared, inputs, accelerator)


def make_schedule(settings: Settings, examples: int) -> BudgetSchedule:
    """Eq. 9 for a run on this many training examples; raises ValueError as its parts do.

    Methods that do not prune go through it too, with nothing to take away, so that every method's
    best score is taken over the same steps.
    """
    total_steps = count_steps(
        examples,
        settings.batch_size,
        settings.epochs,
        settings.grad_accumulation,
        settings.max_steps,
    )
    first_r = settings.init_r if settings.method in PRUNING else settings.target_r
    return BudgetSchedule(
        first_r, settings.target_r, total_steps, deltaT=settings.deltaT, curve=settings.curve
    )


def make_accelerator(precision: str = "auto") -> Accelerator:
    """accelerate's view of the machine: its devices, its processes, and how precise to be."""
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    # While the main process evaluates, the others wait: longer than the usual ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # of other accelerators nothing has been tried
        mixed_precision=PRECISIONS[precision],
        kwargs_handlers=[patience],
    )


def train(job: Job) -> dict:
    """Train to the end, from the checkpoint if there is one; returns what Loop.run returns.

    Raises ValueError for a checkpoint that is damaged or of another run, OSError where none can
    be written, BlockingIOError if another process is at work in the folder.
    """
    with claim(job.folder, job.accelerator.is_main_process):
        if job.accelerator.is_main_process:  # another process may have finished it since set_up
            records.check_output_dir(job.folder, job.settings.overwrite)
        loop = Loop(
            job.prepared,
            job.inputs,
            job.schedule,
            job.settings,
            job.accelerator,
            _checkpoint(job),
        )
        return loop.run()


def _checkpoint(job: Job) -> Checkpoint:
    return Checkpoint(
        job.folder,
        {
            **{k: v for k, v in asdict(job.settings).items() if k not in NOT_IN_KEY},
            "data": job.data.fingerprint,
            "model": job.source.sha256,
            **circumstances(job.accelerator),
        },
    )


def circumstances(accelerator: Accelerator) -> dict:
    """By what code and on what machine a run trains: a checkpoint of others is not gone on from."""
    return {
        "code": code_hash(),  # or the record would claim the code of the last few steps for all
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


@contextmanager
def claim(folder: Path, wanted: bool = True):
    """Keep other processes out of a folder; the claim ends with the process, however it ends.

    Raises BlockingIOError if another process has it.
    """
    if not wanted:
        yield
        return
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is in use by another process: wait for it, or take another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write(job: Job, result: dict) -> dict:
    """Write the run's record and drop its checkpoint; returns the record."""
    record = {
        **result,
        "metric_name": FAMILIES[job.settings.task].metric_name(job.settings.task),
        "seed": job.settings.seed,
        "total_steps": job.schedule.total_steps,
        "data": {
            "source": records.without_place(job.data.source),
            "fingerprint": job.data.fingerprint,
            "train": len(job.data.train),
        },
        "model": {
            "source": records.without_place(job.source.source),
            "sha256": job.source.sha256,
        },
        "environment": {
            **records.environment(job.accelerator.device.type),
            "processes": job.accelerator.num_processes,
            "precision": job.accelerator.mixed_precision,
        },
        "code": code_hash(),
        "key": job.key,
        "parameters": asdict(job.settings),
    }
    if job.accelerator.is_main_process:
        records.write_record(record, job.folder, job.settings.overwrite)
        _checkpoint(job).remove()
    return record


def run(settings: Settings) -> dict:
    """A whole run; returns its record, which is then in the folder. Raises as its three parts."""
    job = set_up(settings)
    return write(job, train(job))
