"""Which checkpoint of a Trainer to resume from: a kill may have left the last one half-written."""

import json
import re
import warnings
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint


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
    """What tells that the writing of a checkpoint was not finished: a file and its state; or "".

    trainer_state.json is written last. And a file that was cut off shows it: JSON does not parse, a
    safetensors file is shorter than its head says, and what torch.save writes is a zip archive,
    whose table of contents comes last.
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
    return ""


def _number(checkpoint: Path) -> int:
    """n of a folder checkpoint-n, else 0."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else 0
