"""What the evaluations of all families share: modes, batches of similar lengths, predictions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from drlora_ref.experiments.tasks.data import Batch, Collate

SAME = 1e-5  # scores this close are equal: padding to another length changes one by about 1e-6


def check_positive(**settings: int) -> None:
    """Raise ValueError, naming it, if one of these settings is less than 1.

    >>> check_positive(num_beams=3, eval_batch_size=64)
    """
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


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

    Every row comes once. A multiple-choice row is as long as its longest choice.
    """
    device = next(model.parameters()).device
    # No DataLoader: it would draw a random number, and training would then go on differently.
    order = np.argsort([_length(ids) for ids in rows["input_ids"][:]], kind="stable")
    for chosen in np.split(order, range(batch_size, len(order), batch_size)):
        batch = collate(rows.select(chosen).to_list())
        yield chosen, {name: tensor.to(device) for name, tensor in batch.items()}


def _length(ids: list[int] | list[list[int]]) -> int:
    return max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


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
    with evaluation_mode(model):
        predictions = [
            _predict(model, rows, collate, batch_size) for rows in encoded_validation.values()
        ]
    pooled = np.concatenate(predictions)
    if not np.isfinite(pooled).all():
        return {"metric": 0.0, "collapsed": True}
    labels = [rows["labels"][:] for rows in encoded_validation.values()]
    scores = list(map(metric, predictions, labels))
    return {"metric": float(np.mean(scores)), "collapsed": bool(np.ptp(pooled) < SAME)}


def _predict(model: nn.Module, rows: Dataset, collate: Collate, batch_size: int) -> np.ndarray:
    predictions = np.empty(len(rows))
    for chosen, batch in batches_by_length(model, rows, collate, batch_size):
        del batch["labels"]
        logits = model(**batch).logits.float()
        best = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        # argmax would make a class of NaN
        predictions[chosen] = best.float().where(logits.isfinite().all(-1), torch.nan).cpu()
    return predictions
