"""A run's record: one JSON file, written whole or not at all."""

import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import psutil
import torch

import drlora_ref
from drlora_ref.events import Events
from drlora_ref.experiments.given import place, read_json, screen, shown


class Record(TypedDict, total=False):
    """All that is kept of a run: what record.json holds. Made by one_run.make_record.

    A field that a run has nothing for is None, an empty list or an empty table; older records lack
    the newer fields. Metrics are fractions, not percent.
    """

    # What came out
    status: str  # "completed", "collapsed" (one answer for every example) or "diverged"
    flagged_at: int | None  # the step: of the first NaN, or of the first collapsed evaluation
    evaluations: list[dict]  # step, epoch, metric, collapsed, and further metrics of the task
    best: float | None  # highest metric of the evaluations after t_end
    best_ever: float | None  # highest metric of all evaluations
    last: float | None  # metric of the last evaluation
    metric_name: str
    metric_before_training: float
    # Loss on a text that is not the task's: before, after. None where the task has none.
    forgetting: dict[str, float | None] | None
    loss_curve: list[float | None]  # training loss of each step, DEM left out; None: not finite
    gradient_norm_curve: list[float | None]  # of each step, before clipping
    budget_curve: list[list[int]]  # [step, surviving components] of each pruning event
    rank_pattern: dict[str, int]  # surviving components of each matrix
    surviving_components: int
    holdout: dict[str, Any] | None  # of the last model: size, metric, collapsed, and further ones
    predictions: dict[str, str] | None  # of the last model: file (beside the record), sha256
    events: dict[str, str] | None  # scores and masks at pruning events, for a film: file, sha256
    trainable_parameters: dict[str, int]  # {"adapter", "head"}, counted as in the paper's tables
    # What it took
    adapter_bytes: int  # of what survives, head included, in float32: what there is to keep
    tokens_per_second: float | None  # read in training, without padding and evaluation
    trained_bytes: int  # of all tensors that were trained, without the optimizer's
    steps: int  # optimizer steps taken
    total_steps: int  # T
    seconds: float  # evaluation included, of all processes that the run was continued in
    evaluation_seconds: float
    peak_memory_mib: int  # of the GPU; else of the process, all libraries and earlier runs included
    replicas: int  # runs that shared the pass; seconds, memory, tokens are then of all of them
    capture: str  # of a run that asked for it: "captured", or why it was not, or not always
    # What went in
    seed: int
    data: dict[str, Any]  # source, fingerprint, train (examples), also_in_train ({split: rows})
    model: dict[str, str]  # source, sha256 (of its weights), config_sha256, tokenizer_sha256
    environment: dict[str, Any]  # versions, device, threads, processes, precision
    earlier_environments: list[dict]  # of a run that went on elsewhere: until_step, and the same
    code: str  # one_run.code_hash
    key: str  # settings.run_key
    rank_map: dict[str, str] | None  # what the run was given: source, sha256
    parameters: dict[str, Any]  # every field of Settings


PREDICTIONS, EVENTS = "predictions.npz", "events.npz"
CHECKPOINT = "checkpoint.pt"
LOG = "run.log"  # beside an executed notebook: what its cells printed
WRITTEN = ("record.json", PREDICTIONS, EVENTS, CHECKPOINT, LOG)  # files of a run
UNFINISHED = ".unfinished-"  # how the name of a file begins that is still being written
PENDING = ".notebook"  # a file in a folder whose notebook has not come to its end, see Pending
# Of the process that executes a notebook: its folder, and the folder whose notebook it finishes.
NOTEBOOK, FINISHES = "DRLORA_NOTEBOOK", "DRLORA_FINISHES"
TAKEN = "{} holds a record already: pass overwrite=True or take another output_dir"


def check_output_dir(output_dir: str | Path, overwrite: bool = False) -> Path:
    """The folder, made if need be; call it before the work whose record it is to hold.

    Raises FileExistsError if it holds a record already, OSError if nothing can be written there or
    a folder lies where a file will be, and as output_place does. A record of this very notebook,
    which was killed before its end, is no hindrance.
    """
    folder = make_folder(output_place(output_dir))
    for name in WRITTEN:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a folder: take another output_dir")
    if not overwrite and os.path.lexists(folder / "record.json") and not is_of(FINISHES, folder):
        raise FileExistsError(TAKEN.format(folder / "record.json"))
    return folder


def output_place(output_dir: str | Path) -> Path:
    """`given.place`, which no empty name has; ValueError, too, where that raises it."""
    if not str(output_dir):
        raise ValueError("output_dir is empty: expected a folder, as runs/mine")
    return place(output_dir)


def make_folder(folder: Path, name: str = "output_dir") -> Path:
    """The folder that `name` stands for, made if need be; OSError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} is not a folder: take another {name}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to: take another {name}")
    return folder


class Pending:
    """The file PENDING: what a notebook was given, from its start to its end.

    It also names the record that was there before, which the notebook may have been told to
    replace: so a record of its own is told from that one.
    """

    def __init__(self, folder: Path):
        self.path, self.record = folder / PENDING, folder / "record.json"

    def begin(self, given: list) -> None:
        """Note what the notebook is given; JSON."""
        with whole_file(self.path, overwrite=True) as file:
            file.write(json.dumps({"given": given, "replaces": self._record()}).encode())

    def given(self) -> list | None:
        """What was given to a notebook that has its record but not its end; else None.

        Raises ValueError for a file that is none of begin()'s.
        """
        if not self.path.is_file() or not self._record():
            return None
        found = read_json(self.path)
        if not isinstance(found, dict) or found.keys() != {"given", "replaces"}:
            raise ValueError(f"{self.path} is damaged: remove it")
        return found["given"] if found["replaces"] != self._record() else None

    def end(self) -> None:
        """The notebook has come to its end."""
        self.path.unlink(missing_ok=True)

    def _record(self) -> str:
        return hashlib.sha256(self.record.read_bytes()).hexdigest() if self.record.is_file() else ""


def is_of(variable: str, folder: Path) -> bool:
    """Whether NOTEBOOK or FINISHES names this folder."""
    return os.environ.get(variable) == str(folder.resolve())


def unfinished(folder: str | Path) -> list[Path]:
    """The runs in or below a folder that have begun and not ended: a checkpoint and no record."""
    begun = sorted(path.parent for path in place(folder).rglob(CHECKPOINT))
    return [run for run in begun if not (run / "record.json").exists()]


def earlier_record(output_dir: str | Path) -> Record | None:
    """The record of this notebook, if it was killed after it had written that; else None."""
    folder = place(output_dir)
    return cast(Record, read_record(folder)) if is_of(FINISHES, folder) else None


def write_record(record: dict, output_dir: str | Path, overwrite: bool = False) -> Path:
    """Write record.json in one go; without `overwrite` a record that is there stays as it is.

    Absolute paths are cut to their last name, as without_place does it.
    Raises ValueError naming the key whose value is not JSON (NaN is not), FileExistsError.
    """
    record = without_places(record)
    _check_json(record, "record")
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    target = check_output_dir(output_dir, overwrite) / "record.json"
    if is_of(FINISHES, target.parent):
        return target
    try:
        with whole_file(target, overwrite) as file:
            file.write(text.encode())
    except FileExistsError:  # another process was faster
        raise FileExistsError(TAKEN.format(target)) from None
    return target


def write_predictions(arrays: dict[str, Any], output_dir: str | Path) -> dict[str, str]:
    """Write PREDICTIONS whole, in place of one that is there; returns what the record says of it.

    Call it before write_record: a record names its predictions by their hash, so that whoever is
    killed between the two leaves predictions without a record, and never the other way round.
    """
    return _write_arrays(arrays, output_dir, PREDICTIONS)


def write_events(events: Events, output_dir: str | Path) -> dict[str, str]:
    """Write EVENTS as write_predictions does PREDICTIONS.

    Its arrays: names (matrices), steps (E,), scores (E, N) in float32, masks (E, N).
    """
    arrays = {
        "names": np.array(events.names),
        "steps": np.array(events.steps),
        "scores": torch.stack(events.scores).float().numpy(),
        "masks": torch.stack(events.masks).numpy(),
    }
    return _write_arrays(arrays, output_dir, EVENTS)


def _write_arrays(arrays: dict[str, Any], output_dir: str | Path, name: str) -> dict[str, str]:
    content = _as_npz(arrays)
    with whole_file(Path(output_dir, name), overwrite=True) as file:
        file.write(content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}


def _as_npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_predictions(folder: str | Path) -> dict[str, np.ndarray]:
    """{"<split>_predictions": (n,), "<split>_labels": (n,)} of the run in a folder; {} without any.

    Raises ValueError for a record that is cut short, and for predictions that are not those which
    the record names.
    """
    return _read_arrays(folder, "predictions", PREDICTIONS)


def read_events(folder: str | Path) -> Events | None:
    """The events that the run in a folder has kept; None if it kept none.

    Raises ValueError as read_predictions does.
    """
    arrays = _read_arrays(folder, "events", EVENTS)
    if not arrays:
        return None
    scores, masks = map(torch.from_numpy, (arrays["scores"], arrays["masks"]))
    names, steps = arrays["names"].tolist(), arrays["steps"].tolist()
    return Events(names, steps, list(scores), list(masks))


def _read_arrays(folder: str | Path, field: str, name: str) -> dict[str, np.ndarray]:
    named = read_record(folder).get(field)
    if not named:
        return {}
    path = Path(folder, name)
    if not (isinstance(named, dict) and "sha256" in named):
        raise ValueError(f"{folder}: {field} = {shown(named)}: must name a file and its sha256")
    if not path.exists():
        raise ValueError(f"{path} is missing: the record beside it names it")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != named["sha256"]:
        raise ValueError(f"{path} is not the file that the record beside it names: it was changed")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


@contextmanager
def whole_file(target: Path, overwrite: bool):
    """A new binary file that becomes `target` once it is whole and on the disk, or never.

    Whoever is killed meanwhile, and a full disk (OSError), leave what was at `target` untouched.
    Raises FileExistsError if target exists by then and is not to be overwritten.
    """
    temporary = target.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _move(temporary, target, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, target: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            return os.link(temporary, target)  # unlike os.replace, fails if the name is taken
        except FileExistsError:
            raise
        except OSError:  # no links on this file system: claim the name, then fill it
            open(target, "xb").close()
    os.replace(temporary, target)


def _check_json(value, key: str) -> None:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        for name, item in value.items():
            _check_json(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _check_json(item, f"{key}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} = {value}: JSON has no such number")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{key} = {shown(value)}: not JSON (keys must be words, arrays become lists)"
        )


def read_record(path: str | Path) -> dict:
    """The record in a file, or in a folder's record.json; ValueError if it is cut short."""
    path = place(path) / "record.json" if place(path).is_dir() else place(path)
    try:
        record = read_json(path)
        _check_json(record, "record")
        if isinstance(record, dict):
            return record
        raise ValueError(f"{shown(record)} must be an object, {{...}}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole, strict JSON record: {screen(error)}") from None


def environment(device: str = "") -> dict[str, str | int]:
    """Versions, device and threads for a record; no path and no machine's name.

    `device`: "cpu" or "cuda"; by default the GPU if there is one.
    """
    name = platform.processor() or platform.machine()
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cpu":
        name = torch.cuda.get_device_name(device or None)
    elif Path("/proc/cpuinfo").exists():  # Linux knows the model's name, platform does not
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = named[1] if named else name
    # By name: to import them all takes seconds, and who writes a record has what it needs.
    libraries = ("transformers", "peft", "datasets", "accelerate")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    versions["torch"] = str(torch.__version__)  # with the build, as +cpu: a wheel may leave it out
    versions["drlora_ref"] = drlora_ref.__version__  # which may run from a folder, not installed
    python, threads = platform.python_version(), torch.get_num_threads()
    return {"python": python, **versions, "device": name, "threads": threads}


def without_place(source: str) -> str:
    """A source of data or of a model, with an absolute path cut to its last name.

    >>> without_place("GLUE folder /home/some body/glue (4 incomplete rows dropped)")
    'GLUE folder glue (4 incomplete rows dropped)'
    >>> without_place("/glue"), without_place("~/glue"), without_place("../glue")
    ('glue', '~/glue', '../glue')
    """
    return re.sub(r"(?<!\S)/(.*/)?(?=[^/\s])", "", source)


def without_places(value: Any) -> Any:
    """without_place of every word in a record."""
    if isinstance(value, str):
        return without_place(value)
    if isinstance(value, dict):
        return {name: without_places(item) for name, item in value.items()}
    return [without_places(item) for item in value] if isinstance(value, list | tuple) else value


def peak_memory_mib(device: torch.device) -> int:
    """The most memory that was in use so far, in MiB.

    On a GPU, what torch has allocated there since its statistics were reset. On a CPU, the largest
    resident size of this process since it began: libraries, data, and earlier runs in it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset // 2**20
    import resource  # which Windows does not have

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux
