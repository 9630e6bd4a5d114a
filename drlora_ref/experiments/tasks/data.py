"""What all families of tasks share: where data come from, and what a training loop gets of them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from drlora_ref.experiments.given import parse_json, read_lines, shown

GENERATED = "generated"  # the data_dir that means: make up a tiny set in the same format
TRAIN_ROWS, VALIDATION_ROWS = 64, 24  # of a generated set
HOLDOUT_SEED = 20240527  # whatever the seed of a run, the same examples are held out

# Columns that nothing reads.
NO_TEXT = ("idx", "id", "title", "label", "answer", "answers", "summary")

Batch = dict[str, Tensor]
Collate = Callable[[list[dict]], Batch]


@dataclass(frozen=True)
class TaskData:
    """The splits of a task, where they came from, and a hash of all that they held.

    `holdout`: rows of the training set that are not trained on; None where none are held out.
    `also_in_train`: how many rows of a split have the same text as a row that is trained on, for
    each split that has any.
    """

    task: str
    train: Dataset
    validation: dict[str, Dataset]
    source: str
    fingerprint: str
    holdout: Dataset | None = None
    also_in_train: dict[str, int] = field(default_factory=dict)

    def about(self) -> dict:
        """What a record says of its data."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "train": len(self.train),
            "also_in_train": self.also_in_train,
        }

    def warning(self) -> str:
        """One line, if texts that a run is measured on are also trained on; else ""."""
        splits = self.validation | ({"holdout": self.holdout} if self.holdout else {})
        found = [f"{n:,} of {len(splits[s]):,} in {s}" for s, n in self.also_in_train.items()]
        return f"{self.task}: texts that are in train too: {', '.join(found)}" if found else ""


class Final(NamedTuple):
    """What only the last model of a run is asked, once.

    holdout: "size" and what `evaluate` gives, on the rows that were held out; None without any.
    predictions: what it says of every example, {"<split>_predictions": (n,), "<split>_labels":
    (n,)} in the order of the split's rows; empty where the answers are texts. "holdout" is a split.
    """

    holdout: dict | None = None
    predictions: dict[str, np.ndarray] = {}  # noqa: RUF012 (never changed)


class Inputs(NamedTuple):
    """What a training loop needs of a task.

    `train` holds encoded rows, `collate` makes a batch of tensors from a list of them, and
    `evaluate(model)` gives {"metric": float, "collapsed": bool, and any further metric by name}.
    `final(model)` is for the end of a run.
    """

    train: Dataset
    collate: Collate
    evaluate: Callable[[nn.Module], dict[str, float | bool]]
    final: Callable[[nn.Module], Final] = lambda model: Final()


def find_splits(
    task: str,
    data_dir: str,
    variable: str,
    from_folder: Callable[[str, str], tuple[dict[str, Dataset], str]],
    from_hub: Callable[[str], tuple[dict[str, Dataset], str]],
    generate: Callable[[str, Path], None],
) -> tuple[dict[str, Dataset], str]:
    """({split: rows}, source) from the first of these places that is named.

    1. `data_dir`: a folder in the original distribution's format, or "generated"
    2. the folder that the environment variable `variable` names
    3. the hub

    A place that fails is an error: the next one is not tried. Raises what that place raises.
    """
    if data_dir == GENERATED:
        with TemporaryDirectory() as folder:
            generate(task, Path(folder))
            return from_folder(task, folder)[0], f"generated {task} set"
    if folder := str(data_dir) or os.environ.get(variable, ""):
        return from_folder(task, folder)
    return from_hub(task)


def task_data(
    task: str,
    splits: dict[str, Dataset],
    source: str,
    train_size: int = 0,
    seed: int = 0,
    holdout: int = 0,
) -> TaskData:
    """The TaskData of these splits: "train", and all others as validation.

    First `holdout` training rows are put aside, the same for every seed (and a smaller number of
    them is a part of a larger one). Of the others a train_size above 0 draws that many with `seed`.
    The fingerprint is of the whole data, whatever is drawn. Raises ValueError as check_sizes does.

    Read with care: held-out rows come from where the training rows come from. Sentences that share
    a source (grammar's pairs, SQuAD's paragraphs) may lie on both sides.
    """
    fingerprint = _fingerprint(splits)
    splits = dict(splits)
    train, held = splits.pop("train"), None
    check_sizes(task, len(train), train_size, holdout)
    if holdout:
        mixed = train.shuffle(seed=HOLDOUT_SEED)
        held, train = mixed.select(range(holdout)), mixed.select(range(holdout, len(train)))
    if train_size:
        train = train.shuffle(seed=seed).select(range(train_size))
    also = _also_in_train(train, splits | ({"holdout": held} if held else {}))
    return TaskData(task, train, splits, source, fingerprint, held, also)


def _also_in_train(train: Dataset, splits: dict[str, Dataset]) -> dict[str, int]:
    trained_on = set(_texts(train))
    counts = {
        split: sum(text in trained_on for text in _texts(rows)) for split, rows in splits.items()
    }
    return {split: n for split, n in counts.items() if n}


def _texts(rows: Dataset) -> Iterator[int]:
    """A hash of what is read of each row; the labels do not count."""
    columns = [name for name in rows.column_names if name not in NO_TEXT]
    for piece in rows.select_columns(columns).iter(1000):
        yield from (hash(repr(row)) for row in zip(*piece.values(), strict=True))


def check_sizes(task: str, rows: int, train_size: int, holdout: int = 0) -> None:
    """Raise ValueError unless so many training rows can be drawn, and held out before that.

    >>> check_sizes("cola", 64, train_size=50, holdout=20)
    Traceback (most recent call last):
    ValueError: train_size = 50 and holdout = 20: cola has 64 training rows; train_size 0 takes all
    """
    if train_size < 0 or holdout < 0 or max(train_size, 1) + holdout > rows:
        given = f"train_size = {train_size}" + (f" and holdout = {holdout}" if holdout else "")
        raise ValueError(f"{given}: {task} has {rows} training rows; train_size 0 takes all")


def _fingerprint(splits: dict[str, Dataset]) -> str:
    """A hash of all rows, in 16 digits; in pieces, since XSum as one text would take gigabytes."""
    digest = hashlib.sha256()
    for split, rows in splits.items():
        # Without idx: the hub and the folder number MRPC's rows differently.
        rows = rows.remove_columns([c for c in rows.column_names if c == "idx"])
        digest.update(split.encode())
        for piece in rows.iter(1000):
            digest.update(repr(piece).encode())
    return digest.hexdigest()[:16]


def find_files(root: Path, names: list[str]) -> list[Path]:
    """The paths of these files in a folder; FileNotFoundError names all that are missing."""
    paths = [root / name for name in names]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found: such a folder holds {', '.join(names)}"
        )
    return paths


def read_json_lines(path: Path, keys: list[str]) -> list[dict]:
    """The objects of a .jsonl file, one a line; ValueError names a line that lacks a key."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {shown(row)}: must be an object, {{...}}")
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{path}, line {number} lacks {missing}; it holds {shown([*row])}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


def loss_weight(batch: Batch) -> int:
    """How many terms the loss of a batch is the mean of: its examples, or its summaries' tokens.

    >>> import torch
    >>> loss_weight({"labels": torch.tensor([[5, 7, -100], [8, -100, -100]])})
    3
    >>> loss_weight({"labels": torch.tensor([0, 1, 1, 0])})
    4
    """
    labels = batch.get("labels")
    if labels is not None and labels.dim() > 1:
        return int((labels != -100).sum())
    return len(next(iter(batch.values())))


def share(batch: Batch, rank: int, processes: int) -> tuple[Batch, int]:
    """(the part of a batch that process number `rank` trains on, its loss weight).

    Each process takes every processes-th example. One for which none is left takes the first
    example with weight 0, since every process must take part in every exchange of gradients. Such
    a row must count nowhere else either: a ZWatch leaves it out.

    >>> import torch
    >>> share({"labels": torch.arange(5)}, rank=1, processes=2)
    ({'labels': tensor([1, 3])}, 2)
    """
    if processes == 1:
        return batch, loss_weight(batch)
    mine = {name: tensor[rank::processes] for name, tensor in batch.items()}
    if len(next(iter(mine.values()))):
        return mine, loss_weight(mine)
    return {name: tensor[:1] for name, tensor in batch.items()}, 0
