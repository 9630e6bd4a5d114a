"""What the evaluations of all families share: modes, batches of similar lengths, predictions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from drlora_ref.experiments.tasks.data import Batch, Collate, Final, Inputs, TaskData

SAME = 1e-5  # scores this close are equal: padding to another length changes one by about 1e-6


def check_positive(**settings: int) -> None:
    """Raise ValueError, naming it, if one of these settings is less than 1.

    >>> check_positive(num_beams=3, eval_batch_size=64)
    """
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


def check_lengths(tokenizer: PreTrainedTokenizerBase, **lengths: int) -> None:
    """Raise ValueError, naming it, for a length below 1 or above what the model can read."""
    for name, length in lengths.items():
        if not 0 < length <= tokenizer.model_max_length:
            raise ValueError(f"{name} = {length}: must be 1 to {tokenizer.model_max_length}")


def check_room(tokenizer: PreTrainedTokenizerBase, texts: int, **lengths: int) -> None:
    """check_lengths, and ValueError for a length that leaves no token for each of so many texts."""
    check_lengths(tokenizer, **lengths)
    for name, length in lengths.items():
        empty = tokenizer(*[[""]] * texts, truncation=False, max_length=length)
        special = len(empty["input_ids"][0])
        if length < special + texts:
            raise ValueError(
                f"{name} = {length}: must be {special + texts} or more, since {special} tokens are "
                "special ones"
            )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards each module is in its own mode again.

    The training loop decides how precise the forward pass is: it evaluates within its autocast.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches_by_length(
    model: nn.Module, rows: Dataset, collate: Collate, batch_size: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(indices of some rows, their batch on the model's device), rows of similar length together.

    Every row comes once.
    """
    device = next(model.parameters()).device
    # No DataLoader: it would draw a random number, and training would then go on differently.
    order = np.argsort(row_lengths(rows), kind="stable")
    for chosen in np.split(order, range(batch_size, len(order), batch_size)):
        batch = collate(rows.select(chosen).to_list())
        yield chosen, {name: tensor.to(device) for name, tensor in batch.items()}


def count_tokens(rows: list[dict]) -> int:
    """How many tokens are read of some encoded rows; of a multiple-choice row, of all choices.

    >>> count_tokens([{"input_ids": [0, 5, 2]}, {"input_ids": [[0, 2], [0, 7, 2]]}])
    8
    """
    ids = [row["input_ids"] for row in rows]
    return sum(sum(map(len, one)) if isinstance(one[0], list) else len(one) for one in ids)


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each encoded row; a multiple-choice row is as long as its longest choice."""
    return [
        max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)
        for ids in rows["input_ids"][:]
    ]


def evaluate_labels(
    model: nn.Module,
    encoded_validation: dict[str, Dataset],
    metric: Callable[[np.ndarray, list], float],
    collate: Collate,
    batch_size: int = 64,
) -> dict[str, float | bool]:
    """metric(predictions, labels), as the mean over the validation splits; whether it `collapsed`.

    Shapes: the model's logits (batch, classes or choices), or (batch, 1) for a score.

    Collapsed: the model says the same of every row, or NaN of any. Such a run has failed, even with
    an accuracy of 0.68 (MRPC's majority). Afterwards the model is in the mode it was in; no random
    number is drawn.
    """
    predictions = predict_labels(model, encoded_validation, collate, batch_size)
    return _scored(predictions, encoded_validation, metric)


def predict_labels(
    model: nn.Module, splits: dict[str, Dataset], collate: Collate, batch_size: int
) -> dict[str, np.ndarray]:
    """What the model says of each row of each split: classes, choices or scores, (n,) of float.

    NaN where a logit is not finite.
    """
    with evaluation_mode(model):
        return {split: _predict(model, rows, collate, batch_size) for split, rows in splits.items()}


def _scored(
    predictions: dict[str, np.ndarray],
    splits: dict[str, Dataset],
    metric: Callable[[np.ndarray, list], float],
) -> dict[str, float | bool]:
    pooled = np.concatenate(list(predictions.values()))
    if not np.isfinite(pooled).all():
        return {"metric": 0.0, "collapsed": True}
    scores = [metric(predictions[split], rows["labels"][:]) for split, rows in splits.items()]
    return {"metric": float(np.mean(scores)), "collapsed": bool(np.ptp(pooled) < SAME)}


def final_labels(
    model: nn.Module,
    encoded_validation: dict[str, Dataset],
    encoded_holdout: dict[str, Dataset],
    metric: Callable[[np.ndarray, list], float],
    collate: Collate,
    batch_size: int = 64,
) -> Final:
    """The Final of a model that gives a class, a choice or a score for each row.

    encoded_holdout: {"holdout": rows}, or {} where nothing is held out.
    """
    splits = encoded_validation | encoded_holdout
    predictions = predict_labels(model, splits, collate, batch_size)
    scored = None
    if encoded_holdout:
        held = {"holdout": predictions["holdout"]}
        size = len(encoded_holdout["holdout"])
        scored = {"size": size, **_scored(held, encoded_holdout, metric)}
    kept = {}
    for split, rows in splits.items():
        labels = np.asarray(rows["labels"][:])
        kept[f"{split}_predictions"] = _compact(predictions[split], labels)
        kept[f"{split}_labels"] = _compact(labels, labels)
    return Final(scored, kept)


def _compact(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores as float32; classes in one byte, or four where there are many; NaN is class -1."""
    if labels.dtype.kind == "f":
        return values.astype(np.float32)
    return np.where(np.isfinite(values), values, -1).astype(np.int8 if labels.max() < 128 else "i4")


def label_inputs(
    data: TaskData,
    encoded: Callable[[Dataset], Dataset],
    metric: Callable[[np.ndarray, list], float],
    collate: Collate,
    batch_size: int,
) -> Inputs:
    """The Inputs of a task whose answers are labels, its rows as `encoded` gives them.

    Raises ValueError for a batch_size below 1, and as `encoded` does.
    """
    check_positive(eval_batch_size=batch_size)
    given: dict[str, Any] = dict(
        encoded_validation={split: encoded(rows) for split, rows in data.validation.items()},
        metric=metric,
        collate=collate,
        batch_size=batch_size,
    )
    held = {"holdout": encoded(data.holdout)} if data.holdout else {}
    score = partial(evaluate_labels, **given)
    final = partial(final_labels, encoded_holdout=held, **given)
    return Inputs(encoded(data.train), collate, score, final)


def final_texts(
    scored: Callable[[Dataset], Callable[[nn.Module], dict]], held: Dataset | None
) -> Callable[[nn.Module], Final]:
    """The `final` of a task whose answers are texts: scored(rows) gives the `evaluate` of rows."""
    if held is None:
        return lambda model: Final()
    evaluate = scored(held)
    return lambda model: Final({"size": len(held), **evaluate(model)})


def _predict(model: nn.Module, rows: Dataset, collate: Collate, batch_size: int) -> np.ndarray:
    predictions = np.empty(len(rows))
    for chosen, batch in batches_by_length(model, rows, collate, batch_size):
        del batch["labels"]
        logits = model(**batch).logits.float()
        best = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        # argmax would make a class of NaN
        predictions[chosen] = best.float().where(logits.isfinite().all(-1), torch.nan).cpu()
    return predictions
