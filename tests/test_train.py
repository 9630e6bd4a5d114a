"""Algorithm 1 as a loop, on a toy model and on a tiny random RoBERTa."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drlora_ref import (
    BudgetSchedule,
    DynamicLoRALinear,
    RankAllocator,
    dem_loss,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.events import Events
from drlora_ref.train import (
    backward,
    count_steps,
    first_non_finite,
    grouped_batches,
    linear_warmup_and_decay,
    train,
    verdict,
)


class Regression(nn.Module):
    """What train() needs of a model: keyword arguments in, an object with a loss out."""

    def __init__(self, n_layers: int = 3, r: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(
            DynamicLoRALinear(nn.Linear(4, 4), r, lora_dropout=0.0) for _ in range(n_layers)
        )

    def forward(self, x, labels):
        return SimpleNamespace(loss=(sum(m(x) for m in self.layers) - labels).square().mean())


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def rows(n: int = 30) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    xs = torch.randn(n, 4, generator=generator)
    return [{"x": x, "labels": x.flip(0)} for x in xs]


def evaluator(model):
    with torch.no_grad():
        return {"metric": -model(**collate(rows())).loss.item(), "collapsed": False}


def run(model, schedule, data=None, evaluate=evaluator, **given):
    allocator = RankAllocator(model, schedule)
    defaults = dict(learning_rate=0.02, batch_size=8)
    record = train(
        model, data or rows(), collate, evaluate, schedule, allocator, **defaults | given
    )
    return record, allocator


def test_steps_are_counted_as_the_data_loader_makes_them():
    for n, batch_size, grad_accumulation in [(30, 8, 1), (30, 8, 3), (32, 8, 4), (5, 8, 2)]:
        loader = torch.utils.data.DataLoader(rows(n), batch_size, collate_fn=collate)
        epochs = (epoch for epoch, _ in grouped_batches(loader, grad_accumulation))
        first_epoch = list(itertools.takewhile(lambda epoch: epoch == 1, epochs))
        assert len(first_epoch) == count_steps(n, batch_size, 1, grad_accumulation)


def test_max_steps_is_the_total_and_zero_lets_the_epochs_decide():
    assert count_steps(100, 16, epochs=3, max_steps=5) == 5
    assert count_steps(100, 16, epochs=3, max_steps=0) == 21


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(batch_size=0), "batch_size = 0: must be at least 1"),
        (dict(epochs=0), "epochs = 0: must be at least 1"),
        (dict(grad_accumulation=0), "grad_accumulation = 0: must be at least 1"),
        (dict(max_steps=-1), "max_steps = -1: must be 0"),
    ],
)
def test_impossible_step_counts_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        count_steps(**{**dict(examples=10, batch_size=2, epochs=1), **given})


def test_accumulating_small_batches_gives_the_gradient_of_one_large_batch():
    model, data = Regression().double(), collate(rows(30))
    for layer in model.layers:
        nn.init.normal_(layer.lora_c)
    data = {name: tensor.double() for name, tensor in data.items()}
    other = copy.deepcopy(model)
    loss = backward(model, [data])
    # ten batches of 8, 8, 8 and a smaller last one
    parts = [{k: v[i : i + 8] for k, v in data.items()} for i in range(0, 30, 8)]
    torch.testing.assert_close(backward(other, parts), loss)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_training_lowers_the_loss_and_meets_the_budget_exactly():
    model, schedule = Regression(), BudgetSchedule(3, 2, 120)
    record, allocator = run(model, schedule)
    assert record["status"] == "completed" and record["steps"] == 120
    assert sum(record["loss_curve"][-10:]) < 0.5 * sum(record["loss_curve"][:10])
    assert record["budget_curve"][-1] == [60, 6]
    assert sum(record["rank_pattern"].values()) == int(allocator.mask.sum()) == 6
    assert record["trainable_parameters"] == {"adapter": 6 * 8, "head": 0}
    for layer in model.layers:
        assert not layer.lora_c[~layer.component_mask].any()


@pytest.mark.parametrize("warmup_steps, total_steps", [(0, 7), (1, 7), (6, 100), (7, 7), (59, 983)])
def test_the_learning_rate_is_that_of_transformers_to_the_last_bit(warmup_steps, total_steps):
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, warmup_steps, total_steps).lr_lambdas[0]
    for step in range(total_steps + 3):
        assert linear_warmup_and_decay(step, warmup_steps, total_steps) == theirs(step)


def test_evaluation_comes_after_every_epoch_and_at_the_end():
    record, _ = run(Regression(), BudgetSchedule(3, 2, 10))  # 4 steps an epoch
    assert [(e["step"], e["epoch"]) for e in record["evaluations"]] == [(4, 1), (8, 2), (10, 3)]


def test_events_hold_what_every_pruning_event_left():
    events, schedule = Events(), BudgetSchedule(3, 2, total_steps=30, deltaT=3)
    record, allocator = run(Regression(), schedule, events=events)
    assert [[t, int(m.sum())] for t, m in zip(events.steps, events.masks, strict=True)] == (
        record["budget_curve"]
    )
    assert torch.equal(events.masks[-1], allocator.mask)


def test_a_seed_decides_the_run():
    records = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        records.append(run(Regression(), BudgetSchedule(3, 2, 20), seed=seed)[0]["loss_curve"])
    assert records[0] == records[1] != records[2]


def test_dem_is_added_once_a_step_and_only_until_pruning_has_ended(monkeypatch):
    calls = []
    monkeypatch.setattr("drlora_ref.train.dem_loss", lambda m: calls.append(1) or dem_loss(m))
    schedule = BudgetSchedule(3, 2, 20)
    run(Regression(), schedule, dem_weight=0.5, grad_accumulation=4, batch_size=2)
    assert len(calls) == schedule.t_end == 10


def test_dem_makes_components_more_even():
    variances = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        model = Regression()
        run(model, BudgetSchedule(3, 2, 60), dem_weight=weight, weight_decay=0.0)
        variances.append(dem_loss(model).item())
    assert variances[1] < 0.5 * variances[0]


def test_a_nan_loss_stops_the_run_and_is_flagged_with_its_step():
    data = [{**row, "labels": row["labels"] * float("nan")} for row in rows()]
    record, _ = run(Regression(), BudgetSchedule(3, 2, 100), data=data)
    assert (record["status"], record["flagged_at"]) == ("diverged", 1)
    assert record["steps"] == 4 and record["evaluations"] == []  # found before the evaluation
    assert record["best"] is None and record["last"] is None


def test_an_infinite_gradient_is_found_though_the_loss_is_finite():
    health = [torch.tensor([0.5, 1.0]), torch.tensor([0.5, float("inf")]), torch.tensor([0.5, 1.0])]
    assert first_non_finite(health) == 2 and first_non_finite(health[:1]) is None


def test_scores_that_are_not_finite_end_the_run_at_the_pruning_event_with_a_record():
    """Before the loss shows it: the step that spoils the weights has a finite loss itself."""
    schedule = BudgetSchedule(3, 1, 20, tinit=0, deltaT=1)
    record, allocator = run(Regression(), schedule, learning_rate=1e30, warmup=0.0)
    assert record["status"] == "diverged" and record["flagged_at"] == record["steps"] < 20
    assert None not in record["loss_curve"] and record["best"] is None
    assert record["surviving_components"] == int(allocator.mask.sum())
    assert all(step < record["flagged_at"] for step, _ in record["budget_curve"])


def test_a_collapsed_run_is_flagged_at_the_first_evaluation_from_which_on_it_was():
    collapsed = [False, True, False, True, True]
    evaluations = [
        {"step": 10 * i, "epoch": i, "metric": 0.0 if c else 0.5, "collapsed": c}
        for i, c in enumerate(collapsed, start=1)
    ]
    found = verdict(evaluations, BudgetSchedule(3, 2, 50), diverged_at=None)
    assert (found["status"], found["flagged_at"], found["last"]) == ("collapsed", 40, 0.0)


def test_the_best_metric_is_taken_only_after_pruning_has_ended():
    schedule = BudgetSchedule(3, 2, 40)  # t_end = 20
    metrics = {10: 0.9, 20: 0.8, 30: 0.5, 40: 0.6}
    evaluations = [
        {"step": s, "epoch": 1, "metric": m, "collapsed": False} for s, m in metrics.items()
    ]
    found = verdict(evaluations, schedule, diverged_at=None)
    assert (found["best"], found["best_ever"], found["last"]) == (0.6, 0.9, 0.6)


def test_a_tiny_roberta_trains_adapters_and_head_and_nothing_else(tiny_roberta):
    model = mark_only_adapters_trainable(inject_adapters(tiny_roberta, r=3))
    before = {n: p.clone() for n, p in model.named_parameters()}
    tokens = torch.randint(3, 50, (24, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": t, "labels": (t[0] > 25).long()} for t in tokens]
    schedule = BudgetSchedule(3, 2, 30)
    fixed = lambda model: {"metric": 0.0, "collapsed": False}  # noqa: E731
    record = train(model, data, collate, fixed, schedule, RankAllocator(model, schedule),
                   learning_rate=1e-2, batch_size=8)  # fmt: skip
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum(record["rank_pattern"].values()) == 2 * len(dynamic_layers(model)) == 24
