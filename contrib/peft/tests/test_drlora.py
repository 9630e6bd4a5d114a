# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What is particular to DrLora. What all methods share is tested by its cases in test_custom_models.py."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import DrLoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 16)
        self.lin2 = nn.Linear(16, 2)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, X):
        X = self.relu(self.lin0(X))
        X = self.relu(self.lin1(X))
        return self.sm(self.lin2(X))


TOTAL_STEP = 12
X = torch.rand(9, 10, generator=torch.Generator().manual_seed(0))
y = torch.arange(9) % 2


def get_config(**kwargs):
    given = {"init_r": 6, "target_r": 2, "total_step": TOTAL_STEP, "deltaT": 2, "lora_dropout": 0.0}
    return DrLoraConfig(**{**given, "target_modules": ["lin0", "lin1"], **kwargs})


def get_model(**kwargs):
    torch.manual_seed(0)
    return get_peft_model(MLP(), get_config(**kwargs))


def train(model, steps):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        loss = nn.functional.nll_loss(model(X), y)
        if model.active_peft_config.dem_weight:
            loss = loss + model.active_peft_config.dem_weight * model.dem_loss()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


class TestDrLora:
    def test_is_registered(self):
        config = get_config()
        assert config.peft_type == PeftType.DRLORA == "DRLORA"

    def test_starts_as_the_base_model(self):
        model = get_model()
        model.eval()
        with model.disable_adapter():
            base = model(X)
        assert torch.equal(model(X), base)

    def test_random_weights_change_the_output(self):
        model = get_model(init_weights=False).eval()
        with model.disable_adapter():
            base = model(X)
        assert not torch.allclose(model(X), base)

    def test_only_components_are_trainable(self):
        trainable = [n for n, p in get_model().named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 3
        assert all("drlora_components.default.lora_" in name for name in trainable)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"target_modules": "lin0"},
            {"target_modules": ["lin0"]},
            {"target_modules": "all-linear"},
            {"curve": "adalora"},
            {"score": "frobenius_norm"},
            {"score": "output_norm"},
            {"score": "loss_sensitivity"},
            {"score": "abs_c"},
            {"score": "random"},
        ],
    )
    def test_ends_with_the_budget(self, kwargs):
        model = train(get_model(**kwargs), range(1, TOTAL_STEP + 1))
        ranks = model.rank_pattern()
        assert sum(ranks.values()) == 2 * len(ranks)
        # what was pruned is zero, and what is left is not
        for layer in model.base_model.adapted_layers().values():
            assert torch.equal(layer.lora_c != 0, layer.component_mask)

    def test_the_base_weights_do_not_change(self):
        model = get_model()
        before = model.base_model.model.lin0.base_layer.weight.clone()
        train(model, range(1, TOTAL_STEP + 1))
        assert torch.equal(model.base_model.model.lin0.base_layer.weight, before)

    def test_save_and_load(self, tmp_path):
        model = train(get_model(), range(1, TOTAL_STEP + 1))
        model.save_pretrained(tmp_path)
        assert isinstance(PeftConfig.from_pretrained(tmp_path), DrLoraConfig)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(MLP(), tmp_path)
        assert torch.equal(loaded(X), model(X))
        assert loaded.rank_pattern() == model.rank_pattern()

    def test_training_goes_on_after_loading(self, tmp_path):
        half, end = TOTAL_STEP // 2 - 1, TOTAL_STEP + 1
        whole = train(train(get_model(), range(1, half)), range(half, end))
        first = train(get_model(), range(1, half))
        first.save_pretrained(tmp_path)
        torch.manual_seed(0)
        second = train(PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True), range(half, end))
        assert torch.equal(whole(X), second(X))
        assert whole.rank_pattern() == second.rank_pattern()

    def test_merge_and_unload(self):
        model = train(get_model(), range(1, TOTAL_STEP + 1))
        expected = model(X)
        merged = model.merge_and_unload(safe_merge=True)
        assert isinstance(merged, MLP)
        assert isinstance(merged.lin0, nn.Linear)
        assert torch.allclose(merged(X), expected, atol=1e-6)

    def test_merge_and_unmerge(self):
        model = train(get_model(), range(1, TOTAL_STEP + 1))
        expected = model(X)
        model.merge_adapter()
        assert torch.allclose(model(X), expected, atol=1e-6)
        model.unmerge_adapter()
        assert torch.allclose(model(X), expected, atol=1e-6)

    def test_merging_before_pruning_has_ended_raises(self):
        model = train(get_model(), range(1, 4))
        with pytest.raises(ValueError, match="pruning has not ended"):
            model.merge_and_unload()

    def test_two_adapters(self):
        model = train(get_model(), range(1, TOTAL_STEP + 1))
        expected = model(X)
        model.add_adapter("other", get_config(target_modules=["lin1"]))
        model.set_adapter("other")
        train(model, range(1, TOTAL_STEP + 1))
        assert len(model.rank_pattern()) == 1
        assert not torch.allclose(model(X), expected)
        model.set_adapter("default")
        assert torch.equal(model(X), expected)
        model.delete_adapter("other")
        assert torch.equal(model(X), expected)

    def test_steps_left_out_raise(self):
        model = train(get_model(), range(1, 3))
        with pytest.raises(ValueError, match="after step 2"):
            model.base_model.update_and_allocate(4)

    def test_regularizer(self):
        plain, with_dem = (train(get_model(dem_weight=w), range(1, TOTAL_STEP + 1)) for w in (0.0, 1.0))
        assert with_dem.dem_loss() < plain.dem_loss()

    def test_a_step_without_the_regularizer_raises(self):
        model = get_model(dem_weight=0.5)
        nn.functional.nll_loss(model(X), y).backward()
        with pytest.raises(ValueError, match="dem_weight is set"):
            model.base_model.update_and_allocate(1)

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"init_r": 2, "target_r": 3}, "target_r = 3 is above init_r"),
            ({"score": "size"}, "must be one of"),
            ({"beta": 1.0}, "beta"),
            ({"tinit": 6, "tfinal": 6}, "leaves no step"),
            ({"lora_dropout": 1.0}, "lora_dropout"),
        ],
    )
    def test_wrong_values_raise(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            get_config(**wrong)

    def test_training_without_total_step_raises(self):
        model = get_model(total_step=None)
        nn.functional.nll_loss(model(X), y).backward()
        with pytest.raises(ValueError, match="total_step"):
            model.base_model.update_and_allocate(1)

    def test_decoder_in_half_precision(self, tmp_path):
        torch.manual_seed(0)
        kwargs = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, **kwargs)).bfloat16()
        fresh = copy.deepcopy(base)
        model = get_peft_model(base, get_config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        words = torch.arange(24).reshape(2, 12)
        for step in range(1, TOTAL_STEP + 1):
            optimizer.zero_grad()  # as in method_comparison: at the start of a step
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
        model.eval()
        ranks = model.rank_pattern()
        assert sum(ranks.values()) == 2 * len(ranks) == 8
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert torch.equal(loaded(input_ids=words).logits, model(input_ids=words).logits)
        assert model.generate(input_ids=words[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)
