"""Numbers printed by the authors' released code (tests/data/official.json says how they were made).

One random RoBERTa layer, six adapted matrices, r' = 6, b(T) = 4, T = 100, pruning every 5 steps
from 15 to 50. Their steps are counted like ours.
"""

import json
from pathlib import Path

import pytest
import torch

from drlora_ref import (
    BudgetSchedule,
    dem_penalty,
    ema_update,
    importance_scores,
    select_components,
)

STEPS = json.loads((Path(__file__).parent / "data" / "official.json").read_text())["steps"]
WITH_INPUTS = [step for step in STEPS if "inputs" in step]
EVENTS = [step for step in STEPS if step.get("event")]
SCHEDULE = BudgetSchedule(init_r=6, target_r=4, total_steps=100, deltaT=5)


def tensors(layer: dict) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(layer[name]) for name in ("A", "B", "c"))


def flat(values: dict) -> torch.Tensor:
    return torch.cat([torch.tensor(layer) for layer in values.values()])


def test_scores_and_their_ema_agree_to_1e_6():
    ema = torch.zeros(36)
    for step in WITH_INPUTS:
        scores = [importance_scores(*tensors(layer)) for layer in step["inputs"].values()]
        ema = ema_update(ema, torch.cat(scores), beta=0.9)
        torch.testing.assert_close(ema, flat(step["ema"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", WITH_INPUTS, ids=lambda step: f"t={step['t']}")
def test_the_official_dem_is_half_of_eq_10_as_printed(step):
    penalties = [dem_penalty(*tensors(layer)[:2]) for layer in step["inputs"].values()]
    ours = torch.stack(penalties).mean().item()  # all layers have six components
    assert ours / 2 == pytest.approx(step["dem_official"], abs=1e-6)


def test_events_come_at_the_same_steps():
    assert [t for t in range(101) if SCHEDULE.prunes_at(t)] == [step["t"] for step in EVENTS]


@pytest.mark.parametrize("step", EVENTS, ids=lambda step: f"t={step['t']}")
def test_pruned_counts_agree_but_for_the_official_early_component(step):
    """The authors prune max(k, 1): one component goes even where the curve says none."""
    pruned = 36 - SCHEDULE.keep_count(step["t"], 36)
    assert (step["cur"], step["max"]) == (step["t"] - 15, 35)
    assert max(pruned, 1) == step["pruned"]
    assert (pruned == step["pruned"]) == (step["t"] >= 35)


@pytest.mark.parametrize("step", EVENTS, ids=lambda step: f"t={step['t']}")
def test_the_same_components_go(step):
    mask = select_components(flat(step["ema"]), 36 - step["pruned"])
    gone = [(~part).nonzero().flatten().tolist() for part in mask.split(6)]
    assert gone == [sorted(indices) for indices in step["zero"].values()]


def test_on_a_tie_the_official_rule_drops_more_than_the_budget_says():
    scores, k = torch.tensor([0.1, 0.1, 0.1, 0.5]), 1
    official = scores > scores.kthvalue(k).values  # their `<= kthvalue` is set to zero
    ours = select_components(scores, keep=3)
    assert (int(official.sum()), int(ours.sum())) == (1, 3)
