"""One run: everything looked up first, then training, then a record.

Notebooks 10 to 12 and `python -m drlora_ref.experiments run` are two doors to the three functions
here: set_up, train, write.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import drlora_ref
from drlora_ref.experiments import methods
from drlora_ref.experiments.given import screen
from drlora_ref.experiments.run import records
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.engine import OneModel
from drlora_ref.experiments.run.loop import History, Loop, Trained
from drlora_ref.experiments.run.order import make_order
from drlora_ref.experiments.run.rank_maps import RankMap, find_rank_map, sha256_of
from drlora_ref.experiments.run.settings import NOT_IN_KEY, PRECISIONS, Settings, run_key
from drlora_ref.experiments.sources.models import ModelSource, check_together, resolve_model
from drlora_ref.experiments.tasks.data import Inputs, TaskData
from drlora_ref.experiments.tasks.families import FAMILIES
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import verdict

# Where not even one run fits.
TOO_LITTLE = (
    "the GPU's memory ({:.1f} GiB free) does not hold one run: take a smaller batch_size (and a "
    "larger grad_accumulation), a smaller max_length or eval_batch_size"
)
LOCK = ".lock"  # held by the process that works in a run's folder, or in a grid's


def code_hash() -> str:
    """A hash of the package's source files, in 12 digits: which code a record came from."""
    digest = hashlib.sha256()
    root = Path(drlora_ref.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class ReadyRun:
    """A run that is ready to go: everything that could be wrong has been looked at.

    `prepared` is None once what it trains has been put into a model of many replicas. `rank_map` is
    what the settings name, as it was found; None if they name none.
    """

    settings: Settings
    folder: Path
    data: TaskData
    source: ModelSource
    schedule: BudgetSchedule
    prepared: methods.Prepared | None
    inputs: Inputs
    accelerator: Accelerator
    rank_map: RankMap | None = None

    @property
    def key(self) -> str:
        """`run_key` of this run."""
        hashes = self.data.fingerprint, self.source.sha256, sha256_of(self.rank_map)
        return run_key(self.settings, *hashes)


def rows_of(settings: Settings) -> dict:
    """All that decides which encoded rows a run reads: the seed only where it draws a part.

    >>> rows_of(Settings(seed=1)) == rows_of(Settings(seed=2, learning_rate=0.1))
    True
    >>> rows_of(Settings(seed=1, train_size=50)) == rows_of(Settings(seed=2, train_size=50))
    False
    """
    places = ("task", "data_dir", "model_name")
    names = (*places, "train_size", "holdout", *FAMILIES[settings.task].OPTIONS)
    drawn_with = settings.seed if settings.train_size else None
    return {name: getattr(settings, name) for name in names} | {"drawn_with": drawn_with}


def set_up(settings: Settings, like: ReadyRun | None = None, may_be_done: bool = False) -> ReadyRun:
    """Look everything up, load data and model, and put the method's parameters into the model.

    Where the rows are those of the run `like`, its encoded data are taken. `may_be_done`: there may
    be a record, as of one of several replicas.
    Raises, before any training: FileExistsError (there is a record), ValueError, FileNotFoundError,
    ImportError or ConnectionError (a name, a number, a file or the hub), as the parts do.
    """
    folder = records.check_output_dir(settings.output_dir, settings.overwrite or may_be_done)
    family = FAMILIES[settings.task]
    source = resolve_model(settings.model_name)
    rank_map = find_rank_map(settings, source.sha256)
    if like is not None and rows_of(like.settings) == rows_of(settings):
        data, inputs = like.data, like.inputs
    else:
        sizes = settings.train_size, settings.seed, settings.holdout
        data, inputs = family.load_task(settings.task, settings.data_dir, *sizes), None
    # What does not fit together shows before the data is encoded.
    settings.schedule(settings.total_steps(len(data.train)))
    accelerator = make_accelerator(settings.precision)
    if settings.frozen_bf16 and accelerator.mixed_precision != "bf16":
        raise ValueError(
            "frozen_bf16 = True: needs precision bf16, and this machine computes in fp32"
        )
    if data is not (like and like.data) and data.warning():
        accelerator.print(data.warning(), flush=True)
    set_seed(settings.seed)
    model, tokenizer = load_model(source, settings)
    check_together(source, model, tokenizer)
    if inputs is None:
        options = {name: getattr(settings, name) for name in family.OPTIONS}
        inputs = family.make_inputs(data, tokenizer, **options)
    # An epoch is a pass over the encoded rows: a long text of SQuAD is several windows.
    schedule = settings.schedule(settings.total_steps(len(inputs.train)))
    own = {name: getattr(settings, name) for name in methods.METHODS[settings.method].own}
    if "rank_map" in own:  # the settings say where it is, the method takes what is there
        own["rank_map"] = rank_map.ranks if rank_map else None
    prepared = methods.prepare(settings.method, model, schedule, **own)
    return ReadyRun(
        settings, folder, data, source, schedule, prepared, inputs, accelerator, rank_map
    )


def load_model(
    source: ModelSource, settings: Settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(the task's model, with the kind of attention that is asked for; its tokenizer).

    Raises what the family's load_model raises, and ValueError where a model has no such attention.
    """
    model, tokenizer = FAMILIES[settings.task].load_model(source, settings.task)
    if settings.attention != "auto":
        try:
            model.set_attn_implementation(settings.attention)
        except (ValueError, ImportError) as error:
            reason = " ".join(screen(error).split())
            raise ValueError(f"attention = {settings.attention!r}: {reason}") from None
    return model, tokenizer


def make_accelerator(precision: str = "auto") -> Accelerator:
    """accelerate's view of the machine: its devices, its processes, and how precise to be.

    Raises ValueError where bf16 is asked for and the GPU does not have it.
    """
    on_gpu = torch.cuda.is_available()
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise ValueError("precision = 'bf16': this GPU does not have it, take fp32 or auto")
    if precision == "auto":
        precision = "bf16" if on_gpu and has_bf16 else "fp32"
    # While the main process evaluates, the others wait: longer than the usual ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # of other accelerators nothing has been tried
        mixed_precision=PRECISIONS[precision],
        kwargs_handlers=[patience],
    )


def train(run: ReadyRun) -> Trained:
    """Train to the end, from the checkpoint if there is one.

    Raises ValueError for a checkpoint that is damaged or of another run, OSError where none can
    be written, BlockingIOError if another process is at work in the folder, Terminated after
    SIGTERM; ValueError, too, where the GPU's memory does not hold the run.
    """
    settings, accelerator = run.settings, run.accelerator
    with claim(run.folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:  # another process may have finished it since set_up
            records.check_output_dir(run.folder, settings.overwrite)
        engine = OneModel(run.prepared, run.inputs, run.schedule, settings, accelerator)
        order = make_order([run.inputs], [settings])
        loop = Loop(engine, order, run.schedule, settings, accelerator, _checkpoint(run))
        try:
            return loop.run()[0]
        except torch.OutOfMemoryError:
            free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
            raise ValueError(TOO_LITTLE.format(free / 2**30)) from None


def _checkpoint(run: ReadyRun) -> Checkpoint:
    return Checkpoint(
        run.folder,
        {
            **{k: v for k, v in asdict(run.settings).items() if k not in NOT_IN_KEY},
            "data": run.data.fingerprint,
            "model": run.source.sha256,
            "rank_map": sha256_of(run.rank_map),
            **circumstances(run),
        },
    )


def circumstances(run: ReadyRun) -> dict:
    """With what model files, by what code and on what machine a run trains.

    A run is not continued by another: its record would claim those of the last few steps for all
    of them. Versions of libraries may change: a record names them all.
    """
    accelerator = run.accelerator
    return {
        "config.json": run.source.config_sha256,
        "tokenizer": run.source.tokenizer_sha256,
        "code": code_hash(),
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the claim ends with the process, however it ends.

    What a killed process left there half-written is removed.
    Raises BlockingIOError if another process has it.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{folder} is in use by another process: wait for it, or take another folder"
        ) from None
    except OSError as error:  # a link, a folder, a disk that is full
        raise OSError(f"{folder / LOCK} cannot be locked ({error.strerror}): remove it") from None
    try:
        for leftover in folder.glob(f"{records.UNFINISHED}*"):
            if not leftover.is_dir():
                leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def write(run: ReadyRun, trained: Trained) -> records.Record:
    """Write predictions, events and record of a run and drop its checkpoint; returns the record.

    In a notebook that run_notebook executes, the checkpoint stays until the notebook has ended.
    """
    record = write_results(run, trained)
    if run.accelerator.is_main_process and not records.is_of(records.NOTEBOOK, run.folder):
        _checkpoint(run).remove()
    return record


def write_results(run: ReadyRun, trained: Trained) -> records.Record:
    """Write predictions, events and record of a run; returns the record.

    Where a notebook is finished that was killed after this, it is the record that is there.
    """
    record = make_record(run, trained)
    if run.accelerator.is_main_process:
        records.check_output_dir(run.folder, run.settings.overwrite)
        if earlier := records.earlier_record(run.folder):
            return earlier
        if trained.final and trained.final.predictions:
            written = records.write_predictions(trained.final.predictions, run.folder)
            record["predictions"] = written
        if trained.events and trained.events.steps:
            record["events"] = records.write_events(trained.events, run.folder)
        records.write_record(record, run.folder, run.settings.overwrite)
    return record


def make_record(run: ReadyRun, trained: Trained) -> records.Record:
    """All that is kept of a run, from what went in and what came out."""
    settings, history = run.settings, trained.history
    record: records.Record = {
        **verdict(history.evaluations, run.schedule, history.flagged_at),
        "metric_name": FAMILIES[settings.task].metric_name(settings.task),
        "metric_before_training": history.before["metric"],
        "forgetting": _forgetting(history),
        "loss_curve": _rounded(history.losses),
        "gradient_norm_curve": _rounded(history.norms),
        "budget_curve": history.kept,
        **trained.outcome,
        "surviving_components": sum(trained.outcome["rank_pattern"].values()),
        "holdout": trained.final.holdout if trained.final else None,
        "predictions": None,  # write() names them once they are on the disk
        "events": None,  # and these
        "steps": len(history.losses),
        "total_steps": run.schedule.total_steps,
        "seconds": round(trained.seconds, 2),
        "evaluation_seconds": round(trained.evaluation_seconds, 2),
        "peak_memory_mib": trained.peak_memory_mib,
        "adapter_bytes": 4 * sum(trained.outcome["trainable_parameters"].values()),
        "tokens_per_second": _tokens_per_second(trained),
        "earlier_environments": trained.earlier_environments,
        **_what_went_in(run),
    }
    if trained.replicas > 1:
        record["replicas"] = trained.replicas
    return record


def _forgetting(history: History) -> dict[str, float | None] | None:
    if "other_text_loss" not in history.before:
        return None
    after = history.evaluations[-1]["other_text_loss"] if history.evaluations else None
    return {"before": history.before["other_text_loss"], "after": after}


def _tokens_per_second(trained: Trained) -> float | None:
    spent = trained.seconds - trained.evaluation_seconds
    return round(trained.tokens / spent, 1) if spent > 0 else None  # 0: the first step diverged


def _what_went_in(run: ReadyRun) -> dict:
    settings, accelerator, rank_map = run.settings, run.accelerator, run.rank_map
    return {
        "seed": settings.seed,
        "data": records.without_places(run.data.about()),
        "model": records.without_places(run.source.about()),
        "environment": {
            **records.environment(accelerator.device.type),
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        },
        "code": code_hash(),
        "key": run.key,
        "rank_map": rank_map and {"source": rank_map.source, "sha256": sha256_of(rank_map)},
        "parameters": records.without_places(asdict(settings)),
    }


def _rounded(numbers: list[float]) -> list[float | None]:
    # None for NaN and infinity, which JSON does not have
    return [round(x, 5) if math.isfinite(x) else None for x in numbers]


def run(settings: Settings) -> records.Record:
    """A whole run; returns its record, which is then in the folder. Raises as its three parts."""
    ready = set_up(settings)
    return write(ready, train(ready))
