"""The tuner in contrib/peft against the package's own, where PEFT has both (test_contrib.py)."""

from pathlib import Path

import pytest
import torch
from peft import DrLoraConfig, PeftConfig, get_peft_model
from torch import nn

from drlora_ref import SCORES
from drlora_ref.tuner import DynamicRankConfig

EXPERIMENTS = Path(__file__).parents[1] / "contrib/peft/method_comparison/MetaMathQA/experiments"
STEPS = 12


def trained(config):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    masks = []
    for step in range(1, STEPS + 1):
        loss = model(torch.randn(16, 6)).square().mean()
        if not model.base_model.schedule().pruning_ended(step):
            loss = loss + 0.1 * model.dem_loss()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        layers = [module for module in model.modules() if hasattr(module, "component_mask")]
        masks.append(torch.stack([layer.component_mask for layer in layers]))
    cs = torch.stack([layer.lora_c.detach() for layer in layers])
    return torch.stack(masks), cs, model.rank_pattern()


@pytest.mark.parametrize("score, curve", [*((s, "paper") for s in SCORES), ("abs_c", "adalora")])
def test_every_mask_of_a_run_is_the_packages_own(score, curve):
    given = dict(init_r=5, target_r=2, total_step=STEPS, deltaT=2, dem_weight=0.1)
    given |= dict(score=score, curve=curve, target_modules=["0", "2", "4"])
    ours, theirs = trained(DynamicRankConfig(**given)), trained(DrLoraConfig(**given))
    assert ours[0].any() and not ours[0].all()  # something was pruned
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2] and sum(ours[2].values()) == 3 * 2


def test_the_experiment_of_the_comparison_is_a_configuration_at_loras_scale():
    (folder,) = EXPERIMENTS.glob("drlora/*")
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, DrLoraConfig) and config.task_type == "CAUSAL_LM"
    assert config.schedule().t_end == 2500 and config.schedule().prunes_at(2500)
    assert (config.init_r, config.target_r) == (48, 32)
    assert config.lora_alpha / config.init_r == 64 / 32 and config.dem_weight == 0
