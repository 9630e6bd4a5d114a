"""What all families of tasks share: where data comes from, and what a run is handed.

A family is a module (tasks for GLUE, squad, xsum, commonsense) with the same few names: TASKS,
OPTIONS, and the functions metric_name, load_task, load_model and prepare.
"""

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

GENERATED = "generated"  # the data_dir that means: a tiny set of the same format, made up


@dataclass(frozen=True)
class TaskData:
    """The splits of a task, where they came from, and a hash of all that they held."""

    task: str
    train: Dataset
    validation: dict[str, Dataset]
    source: str
    fingerprint: str


class Inputs(NamedTuple):
    """What a training loop needs of a task.

    `train` is a sequence of encoded rows, `collate` makes a batch of tensors from a list of them,
    `evaluate(model)` gives {"metric": float, "collapsed": bool, and any further metric by name}.
    """

    train: Dataset
    collate: Callable[[list[dict]], dict]
    evaluate: Callable[..., dict]


class PaddedRows:
    """Encoded rows of one or more readers, padded once: a batch is an index, not a loop over rows.

    `rows[[3, 1], [0]]` is what collate makes of rows 3 and 1 of the first reader's set and row 0 of
    the second's, padded to the longest of them. A set that several read is kept once, its ids in
    32 bits. Raises ValueError for rows that are padded on the left.
    """

    def __init__(self, sets: list[Dataset], collate: Callable, at_a_time: int = 1000):
        distinct = {id(one): one for one in sets}
        starts = itertools.accumulate(map(len, distinct.values()), initial=0)
        starts = dict(zip(distinct, starts, strict=False))
        self.starts = [starts[id(one)] for one in sets]
        rows = concatenate_datasets(list(distinct.values()))
        self.lengths = torch.tensor([len(ids) for ids in rows["input_ids"][:]])
        longest = rows[int(self.lengths.argmax())]
        parts = []
        for start in range(0, len(rows), at_a_time):
            some = rows.select(range(start, min(start + at_a_time, len(rows)))).to_list()
            # With the longest row beside them, all parts come out equally wide.
            parts.append({n: t[:-1] for n, t in collate([*some, longest]).items()})
        self.columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not self.columns["attention_mask"][:, 0].all():
            raise ValueError("these rows are padded on the left: only padding on the right is cut")
        for name, column in self.columns.items():
            if column.dim() == 2:
                self.columns[name] = column.int()

    def __getitem__(self, numbers: tuple[list[int], ...]) -> dict[str, Tensor]:
        own = zip(self.starts, numbers, strict=True)
        chosen = torch.tensor([start + number for start, some in own for number in some])
        width = int(self.lengths[chosen].max())
        return {
            name: column[chosen, :width].long() if column.dim() == 2 else column[chosen]
            for name, column in self.columns.items()
        }


def find_splits(
    task: str,
    data_dir: str,
    variable: str,
    from_folder: Callable[[str, str], tuple[dict[str, Dataset], str]],
    from_hub: Callable[[str], tuple[dict[str, Dataset], str]],
    generate: Callable[[str, Path], None],
) -> tuple[dict[str, Dataset], str]:
    """({split: rows}, source) from the one place that was named; a source that fails is an error.

    `data_dir` is a folder in the original distribution's format, or "generated"; if it is empty,
    the environment variable `variable` names the folder; if that is not set, the hub is asked.
    """
    if data_dir == GENERATED:
        with TemporaryDirectory() as folder:
            generate(task, Path(folder))
            return from_folder(task, folder)[0], f"generated {task} set"
    if folder := str(data_dir) or os.environ.get(variable, ""):
        return from_folder(task, folder)
    return from_hub(task)


def task_data(
    task: str, splits: dict[str, Dataset], source: str, train_size: int = 0, seed: int = 0
) -> TaskData:
    """TaskData of all splits but "train" as validation; train_size > 0 draws that many rows.

    The fingerprint is of the whole data, whatever is drawn. Raises ValueError for a train_size
    that is negative or larger than the training set.
    """
    fingerprint = _fingerprint(splits)
    splits = dict(splits)
    train = splits.pop("train")
    if not 0 <= train_size <= len(train):
        raise ValueError(
            f"train_size = {train_size}: {task} has {len(train)} training rows; 0 takes them all"
        )
    if train_size:
        train = train.shuffle(seed=seed).select(range(train_size))
    return TaskData(task, train, splits, source, fingerprint)


def _fingerprint(splits: dict[str, Dataset]) -> str:
    """A hash of all rows, in 16 digits; in pieces, since XSum as one text would take gigabytes."""
    digest = hashlib.sha256()
    for split, rows in splits.items():
        # Without idx: the hub numbers MRPC's rows otherwise than the folder does.
        rows = rows.remove_columns([c for c in rows.column_names if c == "idx"])
        digest.update(split.encode())
        for piece in rows.iter(1000):
            digest.update(repr(piece).encode())
    return digest.hexdigest()[:16]


def check_name(task: str, known) -> None:
    """Raise ValueError, with the nearest name and all of them, if `task` is none of `known`.

    >>> check_name("cola", ["cola", "rte"])
    """
    if task not in known:
        near = "".join(difflib.get_close_matches(str(task).lower(), known, n=1)) or "none"
        raise ValueError(f"unknown task {task!r} (nearest: {near}): use {', '.join(known)}")


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
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{path}, line {number} lacks {missing}; it holds {sorted(row)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no row")
    return rows


def loss_weight(batch: dict[str, Tensor]) -> int:
    """What the loss of a batch is a mean over: its examples, or for summaries their tokens.

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


def share(batch: dict[str, Tensor], rank: int, processes: int) -> tuple[dict[str, Tensor], int]:
    """(every processes-th example from number `rank` on, and the loss weight of these).

    A process without any takes the first one with weight 0: all must go through the same motions.

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
