"""Algorithm 1: the whole training loop, in plain PyTorch, on one page."""

import itertools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from drlora_ref.allocator import Diverged, RankAllocator
from drlora_ref.events import Events
from drlora_ref.inject import count_parameters
from drlora_ref.regularizer import dem_loss
from drlora_ref.schedule import BudgetSchedule

CHECK_EVERY = 10  # steps between two looks at the loss: each look makes a GPU wait


def count_steps(
    examples: int, batch_size: int, epochs: int, grad_accumulation: int = 1, max_steps: int = 0
) -> int:
    """T, the number of optimizer steps: max_steps if that is not 0, else what the epochs make.

    Raises ValueError for a number out of range.

    >>> count_steps(100, batch_size=16, epochs=3, grad_accumulation=2)  # 4 steps an epoch
    12
    """
    given = dict(
        examples=examples, batch_size=batch_size, epochs=epochs, grad_accumulation=grad_accumulation
    )
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if max_steps < 0:
        raise ValueError(f"max_steps = {max_steps}: must be 0 (the epochs decide) or more")
    return max_steps or epochs * math.ceil(math.ceil(examples / batch_size) / grad_accumulation)


def grouped_batches(loader: DataLoader, grad_accumulation: int) -> Iterator[tuple[int, list]]:
    """(epoch, the micro-batches of one optimizer step), for ever. An epoch's last may be fewer."""
    for epoch in itertools.count(1):
        batches = iter(loader)
        while group := list(itertools.islice(batches, grad_accumulation)):
            yield epoch, group


def linear_warmup_and_decay(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor of the learning rate after `step` steps: from 0 up to 1 at warmup_steps, 0 at the end.

    >>> [linear_warmup_and_decay(step, 2, 6) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where it pays, on a GPU; float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def backward(model: nn.Module, group: list[dict[str, Tensor]]) -> Tensor:
    """Accumulate the gradient of the mean loss over all examples of a group; returns that loss.

    Each micro-batch is weighted by its number of examples, so that k batches of n give the
    gradient of one batch of k · n, also when the last one is smaller.
    """
    device = next(model.parameters()).device
    examples = sum(len(batch["labels"]) for batch in group)
    total = torch.zeros((), device=device)
    for batch in group:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with autocast(device):
            loss = model(**batch).loss * (len(batch["labels"]) / examples)
        loss.backward()
        total += loss.detach()
    return total


def train(
    model: nn.Module,
    train_data,
    collate: Callable,
    evaluate: Callable[[nn.Module], dict],
    schedule: BudgetSchedule,
    allocator: RankAllocator | None = None,
    dem_weight: float = 0.0,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    grad_accumulation: int = 1,
    weight_decay: float = 0.0,
    warmup: float = 0.06,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    events: Events | None = None,
) -> dict:
    """Algorithm 1 for schedule.total_steps optimizer steps; returns the run's record.

    Trains whatever of `model` requires a gradient, where the model is, by AdamW with linear
    warm-up (a share of all steps) and decay. Without an allocator it is plain fine-tuning (LoRA,
    ...) under the same rules. `evaluate(model)` gives {"metric": float, "collapsed": bool}, after
    every epoch and at the end. `seed` orders the data; dropout follows the global generator.
    `events`, if given, takes the scores and the mask of every pruning event (plotting.plot_ranks).

    Choice: DEM is part of the loss until pruning has ended, as in the authors' code; the paper does
    not say how long. No weight decay by default (theirs: 0.01), and bfloat16 on a GPU (theirs: full
    precision).

    The record: status ("completed", or "diverged" or "collapsed", with `flagged_at` the step),
    evaluations, best (over evaluations after t_end only, for every method alike), best_ever, last,
    loss_curve, budget_curve [[step, components kept], ...], rank_pattern, surviving_components,
    trainable_parameters, steps, seconds, evaluation_seconds. Raises ValueError for an allocator
    with another schedule.

    Read with care: a non-finite loss or gradient ends the run, at most 10 steps later, and scores
    that are not finite end it at the pruning event; the record says so. That a run diverges is a
    result: it must reach the table.
    """
    if allocator and allocator.schedule != schedule:
        raise ValueError(
            f"the allocator has another schedule: {allocator.schedule}, not {schedule}"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay)
    T = schedule.total_steps
    warmup_steps = int(warmup * T)
    lr_schedule = LambdaLR(optimizer, lambda t: linear_warmup_and_decay(t, warmup_steps, T))
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train_data, batch_size, shuffle=True, generator=order, collate_fn=collate)
    steps_per_epoch = count_steps(len(train_data), batch_size, 1, grad_accumulation)

    health, evaluations, kept, flagged_at, looked_at = [], [], [], None, 0
    started, evaluation_seconds = time.perf_counter(), 0.0
    model.train()
    groups = grouped_batches(loader, grad_accumulation)
    for step, (epoch, group) in zip(range(1, T + 1), groups, strict=False):
        optimizer.zero_grad()  # here, since line 7 may need the last step's gradients
        loss = backward(model, group)  # lines 3 and 6
        if dem_weight and not schedule.pruning_ended(step):  # lines 4 and 5
            # DEM depends on the weights alone: added to every micro-batch it would count k times.
            (dem_weight * dem_loss(model)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        optimizer.step()
        lr_schedule.step()

        health.append(torch.stack([loss, norm]))
        evaluation_due = step % steps_per_epoch == 0 or step == T
        if evaluation_due or step % CHECK_EVERY == 0 or schedule.prunes_at(step):
            if bad := first_non_finite(health[looked_at:]):
                flagged_at = looked_at + bad
                break
            looked_at = step
        if allocator:
            try:
                allocator.step(step)  # lines 7-9
            except Diverged:  # the loss is finite still, the scores are not
                flagged_at = step
                break
            if schedule.prunes_at(step):
                kept.append([step, int(allocator.mask.sum())])
                if events is not None:
                    events.add(step, allocator)
        if evaluation_due:
            before = time.perf_counter()
            with autocast(loss.device):
                evaluations.append({"step": step, "epoch": epoch, **evaluate(model)})
            evaluation_seconds += time.perf_counter() - before
            left = (time.perf_counter() - started) / step * (T - step)
            metric = evaluations[-1]["metric"]
            print(f"step {step} of {T}, epoch {epoch}: {metric:.4f}; about {left:.0f} s left")
    ranks = allocator.rank_pattern() if allocator else {}
    return {
        "steps": step,
        "seconds": round(time.perf_counter() - started, 2),
        "evaluation_seconds": round(evaluation_seconds, 2),
        # None for NaN and infinity, which JSON does not have
        "loss_curve": [
            round(x, 5) if math.isfinite(x) else None for x in torch.stack(health)[:, 0].tolist()
        ],
        "budget_curve": kept,
        "trainable_parameters": count_parameters(model),
        "rank_pattern": ranks,
        "surviving_components": sum(ranks.values()),
        **verdict(evaluations, schedule, flagged_at),
    }


def first_non_finite(health: list[Tensor]) -> int | None:
    """The first step (from 1) whose loss or gradient norm is NaN or infinite, or None.

    >>> first_non_finite([torch.tensor([0.7, 1.0]), torch.tensor([float("nan"), 1.0])])
    2
    """
    bad = torch.stack(health).isfinite().all(dim=1).logical_not().nonzero()
    return int(bad[0]) + 1 if len(bad) else None


def verdict(evaluations: list[dict], schedule: BudgetSchedule, diverged_at: int | None) -> dict:
    """status, flagged_at, evaluations, best, best_ever and last of a run.

    A run is "collapsed" if its last evaluation gave every example the same answer; `flagged_at` is
    then the first evaluation from which on it did. Metrics are None if there is no evaluation.
    Best is taken where schedule.settled: after t_end, or at the last step.
    """
    status, flagged_at = ("diverged", diverged_at) if diverged_at else ("completed", None)
    if not diverged_at and evaluations and evaluations[-1]["collapsed"]:
        tail = list(itertools.takewhile(lambda e: e["collapsed"], reversed(evaluations)))
        status, flagged_at = "collapsed", tail[-1]["step"]
    settled = [e["metric"] for e in evaluations if schedule.settled(e["step"])]
    return {
        "status": status,
        "flagged_at": flagged_at,
        "evaluations": evaluations,
        "best": max(settled, default=None),
        "best_ever": max((e["metric"] for e in evaluations), default=None),
        "last": evaluations[-1]["metric"] if evaluations else None,
    }
