"""Which checkpoint of a Trainer to resume from: a kill may have left the last one half-written.

So may a disk have changed it since: what a training goes on from has its checksums beside it.
"""

import hashlib
import json
import os
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

SUMMED = ("**/adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt",
          "rng_state.pth", "trainer_state.json")  # fmt: skip


def last_whole(output_dir: str, wanted: str | bool) -> str | bool:
    """The checkpoint to resume from: the one wanted (True: the last), or the last whole one before.

    Warns where that is not the one wanted. Where the last was wanted and none is whole it is False,
    and training starts anew. Raises ValueError if one was named and neither it nor one before it is
    whole.
    """
    path = Path((get_last_checkpoint(output_dir) or "") if wanted is True else str(wanted))
    if not path.name or not path.is_dir() or not (reason := incomplete(path)):
        return wanted  # Trainer knows what to say of a folder that is not there
    before = [p for p in path.parent.iterdir() if 0 < _number(p) < _number(path)]
    instead = max((p for p in before if not incomplete(p)), key=_number, default=None)
    if instead is None and wanted is not True:
        raise ValueError(f"{path} is not a whole checkpoint, and none before it is: {reason}")
    then = f"resuming from {instead.name}" if instead else "training starts from the beginning"
    warnings.warn(f"{path.name} is not a whole checkpoint ({reason}): {then}", stacklevel=3)
    return str(instead) if instead else False


def incomplete(checkpoint: Path) -> str:
    """What tells that a checkpoint is not as it should have been written: a file, its state; or "".

    trainer_state.json is written last. And a file that was cut off shows it: JSON does not parse, a
    safetensors file is shorter than its head says, and what torch.save writes is a zip archive,
    whose table of contents comes last. A file that was changed later is not that of its checksum,
    and one that was deleted later still has one.
    """
    training = ["optimizer.pt", "scheduler.pt", "rng_state*.pth"]
    if not any(any(checkpoint.glob(pattern)) for pattern in training):
        training = []  # saved with save_only_model
    for pattern in ["**/adapter_model.safetensors", *training, "trainer_state.json"]:
        if not any(checkpoint.glob(pattern)):
            return f"{pattern.removeprefix('**/')} is missing"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{path.name} is cut off"
        except (ValueError, SafetensorError):
            return f"{path.name} is cut off"
    for sums in sorted(checkpoint.glob("checksums*.json")):  # an older checkpoint has none
        noted = json.loads(sums.read_bytes())
        if not isinstance(noted, dict):
            return f"{sums.name} is damaged"
        for name, digest in noted.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _digest(checkpoint / name) != digest:
                return f"{name} is damaged"
    return ""


def write_checksums(checkpoint: Path) -> None:
    """Note what is in the files of a checkpoint that a training goes on from."""
    _note(checkpoint, "checksums.json", SUMMED)


def write_checksum_of_random_numbers(checkpoint: Path, process: int) -> None:
    """The same for the random numbers of one process of several: each has written its own file."""
    _note(checkpoint, f"checksums_{process}.json", (f"rng_state_{process}.pth",))


def _note(checkpoint: Path, name: str, patterns: tuple[str, ...]) -> None:
    paths = sorted(path for pattern in patterns for path in checkpoint.glob(pattern))
    digests = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in paths}
    unfinished = checkpoint / f".unfinished-{name}"
    unfinished.write_text(json.dumps(digests, indent=2))
    os.replace(unfinished, checkpoint / name)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(checkpoint: Path) -> int:
    """n of a folder checkpoint-n, else 0."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else 0
