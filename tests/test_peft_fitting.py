"""What an adapter of PEFT's is refused for, and that a refusal leaves the model as it was."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn
from trainer_script import adapted, base_model, token_ids
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
)

from drlora_ref.tuner import DynamicRankConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings"),
]


def train(model, steps=12, **batch):
    if not batch:
        ids = token_ids(16)
        batch = dict(input_ids=ids, labels=(ids[:, 0] > 25).long())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model(**batch).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=token_ids(16)).logits


class Gate(nn.Module):
    """A model without a configuration, in which one matrix has one output."""

    def __init__(self):
        super().__init__()
        self.query, self.gate = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.gate(self.query(x))


def tiny_llama(**config):
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    return LlamaConfig(**sizes, num_attention_heads=2, **config)


def tied():
    return LlamaForCausalLM(tiny_llama(tie_word_embeddings=True))


class Spread(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4, device="meta")


REFUSED = {
    "a target that is no linear layer": (
        base_model, dict(target_modules=["query", "layer.1.output.LayerNorm"]), {},
        TypeError, "only nn.Linear can be adapted"),
    "no target at all": (
        base_model, dict(target_modules=["nothing"]), {}, ValueError, "No modules were targeted"),
    "a module that cannot be saved whole": (
        base_model, dict(modules_to_save=["encoder.layer"], target_modules=["key"],
                         layers_to_transform=[7]), {}, ValueError, "No modules were targeted"),
    "a list of modules to be saved whole": (
        lambda: nn.ModuleDict({"query": nn.Linear(4, 4), "many": nn.ModuleList([nn.Linear(2, 2)])}),
        dict(target_modules=["query"], modules_to_save=["many"], task_type=None), {},
        TypeError, "cannot be applied to modules of type"),
    "a module to be saved that is not there": (
        base_model, dict(modules_to_save=["encodr"]), {},
        ValueError, "modules_to_save: no module has a name that ends with 'encodr'"),
    "a task that is not the model's": (
        base_model, dict(task_type="CAUSAL_LM"), {},
        ValueError, "CAUSAL_LM' is for models that generate, and RobertaForSequenceClassification"),
    "another task that is not the model's": (
        base_model, dict(task_type="SEQ_2_SEQ_LM"), {}, ValueError, "is for models that generate"),
    "one output under DEM": (
        Gate, dict(target_modules=["query", "gate"], dem_weight=0.1, task_type=None), {},
        ValueError, "gate has 8 inputs and 1 outputs, and DEM"),
    "a tied output layer": (
        tied, dict(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), {},
        ValueError, r"lm_head has its weight in common with model\.embed_tokens\.weight"),
    "several devices": (
        Spread, dict(target_modules=["query", "key"], task_type=None), {},
        ValueError, "the model is on cpu, meta"),
    "a name with a dot": (
        base_model, {}, dict(adapter_name="my.adapter"), ValueError, "must not be empty or have"),
    "the name of a head": (
        base_model, {}, dict(adapter_name="classifier"), ValueError, "name 'classifier': PEFT"),
}  # fmt: skip


def state_of(model) -> list:
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [modules, parameters, hooks, hasattr(model, "peft_config")]


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_refused_is_as_it_was(case):
    make, config, given, error, message = REFUSED[case]
    model = make()
    model.train().requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    config = DynamicRankConfig(**dict(init_r=3, target_r=2, task_type="SEQ_CLS") | config)
    with pytest.raises(error, match=message):
        get_peft_model(model, config, **given)
    assert state_of(model) == before
    if make is base_model:  # and may be adapted
        assert len(adapted(model).base_model.adapted_layers()) == 12


@pytest.mark.parametrize("given", [
    dict(target_modules=["nothing"]),
    dict(target_modules=["query", "layer.1.output.LayerNorm"]),
    dict(modules_to_save=["encoder.layer"], target_modules=["key"], layers_to_transform=[7]),
])  # fmt: skip
def test_a_second_adapter_that_is_refused_leaves_the_first_as_it_was(given):
    model = train(adapted(total_step=12, dem_weight=0.0))
    expected, before = logits(model), state_of(model)
    config = DynamicRankConfig(init_r=2, target_r=2, task_type="SEQ_CLS", **given)
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("other", config)
    assert state_of(model) == before and list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("other", DynamicRankConfig(init_r=2, target_r=2, task_type="SEQ_CLS"))
    model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


BAD_NAMES = [
    "",
    ".",
    "a.b",
    "default.",
    "classifier",
    "score",
    "my_score",
    "pre_classifier",
    "query",
    "encoder",
    "0",
    "layer",
    "base_layer",
    "lora_A",
    "modules_to_save",
    "ema",
    "model",
    "weight",
    "bias",
    "qa_outputs",
    "dynamic_rank_components",
    "original_module",
]
BAD_NAME = r"adapter name '.*': (it must not|PEFT would take it)"


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_by_which_tensors_cannot_be_told_apart_is_refused(name):
    with pytest.raises(ValueError, match=BAD_NAME):
        get_peft_model(base_model(), DynamicRankConfig(init_r=3, target_r=2), name)
    model = adapted(dem_weight=0.0)
    with pytest.raises(ValueError, match=BAD_NAME):
        model.add_adapter(name, DynamicRankConfig(init_r=3, target_r=2))


@pytest.mark.parametrize("name", ["rank", "a", "Query", "an adapter"])
@pytest.mark.filterwarnings("ignore:Adapter name")
def test_any_other_name_is_kept_apart_and_comes_back(name, tmp_path):
    model = train(adapted(total_step=12, dem_weight=0.0))
    given = dict(init_r=3, target_r=2, total_step=12, task_type="SEQ_CLS")
    model.add_adapter(name, DynamicRankConfig(**given))
    first = logits(model)
    model.set_adapter(name)
    second = logits(train(model, steps=2))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded), first) and not torch.allclose(first, second)
    loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(name)
    assert torch.equal(logits(loaded), second)


def test_a_wrapped_model_is_to_be_wrapped_afterwards():
    config = DynamicRankConfig(init_r=3, target_r=2, target_modules=["query"])
    for wrapped in (torch.compile(base_model(), backend="eager"), nn.DataParallel(base_model())):
        with pytest.raises(ValueError, match=r"wrapped in .*: adapt it first, and wrap what"):
            get_peft_model(wrapped, config)


def test_what_the_base_model_calls_its_own_is_reached_through_the_tuner():
    base = LlamaModel(tiny_llama())
    own = {name: getattr(base, name) for name in ("layers", "embed_tokens", "norm")}
    model = get_peft_model(base, DynamicRankConfig(task_type="FEATURE_EXTRACTION"))
    assert all(getattr(model, name) is part for name, part in own.items())


def test_compiled_parts_leave_no_trace_in_the_names(tmp_path):
    """Compiled before it was adapted, or after it was trained."""

    def compile_a_part(model):
        layers = model.roberta.encoder.layer
        layers[0] = torch.compile(layers[0], backend="eager")
        return model

    names = list(adapted().base_model.adapted_layers())
    assert list(adapted(compile_a_part(base_model())).base_model.adapted_layers()) == names
    model = train(adapted(total_step=12, dem_weight=0.0))
    expected, ranks = logits(model), model.rank_pattern()
    compile_a_part(model.get_base_model())
    assert model.rank_pattern() == ranks
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), expected)
    into = PeftModel.from_pretrained(compile_a_part(base_model()), tmp_path, is_trainable=True)
    assert into.base_model.memory().last_step == 12 and into.rank_pattern() == ranks


# --- layers that are not called ------------------------------------------------------------------

SPEECH = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
              conv_dim=(16,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1,
              num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
              classifier_proj_size=8, vocab_size=30)  # fmt: skip


def speech(model_class, config_class, total_step, **given):
    torch.manual_seed(0)
    base = model_class(config_class(**SPEECH, **given))
    targets = ["q_proj", "v_proj", "output_dense"]
    config = dict(init_r=3, target_r=2, deltaT=2, total_step=total_step, task_type="SEQ_CLS")
    return get_peft_model(base, DynamicRankConfig(**config, target_modules=targets))


def test_wavlms_fused_attention_is_refused_by_name_at_the_first_step():
    model = speech(WavLMForSequenceClassification, WavLMConfig, 100)
    sound = dict(input_values=torch.randn(2, 200), labels=torch.tensor([0, 1]))
    message = r"no gradient reaches wavlm\.encoder\.layers\.0\.attention\.v_proj, .* and 5 more"
    with pytest.raises(ValueError, match=message):
        train(model, steps=1, **sound)


def test_a_model_that_drops_whole_layers_at_random_is_not_refused():
    given = Wav2Vec2ForSequenceClassification, Wav2Vec2Config, 60
    model = speech(*given, layerdrop=0.4)
    sound = dict(input_values=torch.randn(2, 200), labels=torch.tensor([0, 1]))
    assert sum(train(model, steps=60, **sound).rank_pattern().values()) == 12 * 2


# --- what PEFT asks of a method -----------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 0.9999999])
def test_pefts_own_conversion_to_lora_gives_the_same_logits(rank):
    model = train(adapted(total_step=12, dem_weight=0.0, task_type=None))
    assert model.supports_lora_conversion()
    config, state = convert_to_lora(model, rank=rank)
    assert isinstance(config, peft.LoraConfig)
    stock = get_peft_model(base_model(), config)
    set_peft_model_state_dict(stock, state)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_may_be_numpys_or_torchs(number, tmp_path):
    config = DynamicRankConfig(init_r=number, target_r=2, total_step=number * 10, seed=number)
    config.save_pretrained(tmp_path)  # as JSON
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_r"] == 3
    assert peft.PeftConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, torch.tensor])
def test_numbers_may_be_numpys_or_torchs(kind):
    given = dict(
        lora_alpha=kind(8.0), dem_weight=kind(0.5), beta=kind(0.5), lora_dropout=kind(0.25)
    )
    config = DynamicRankConfig(**given)
    assert {type(getattr(config, name)) for name in given} == {float}


@pytest.mark.parametrize("given", [
    dict(lora_alpha=0), dict(lora_alpha=np.float32(0)), dict(target_modules=[]),
    dict(target_modules=()), dict(target_modules=iter([])), dict(init_r=np.float64(3.0)),
    dict(dem_weight=np.float32("nan")), dict(init_r=True),
])  # fmt: skip
def test_what_is_refused_is_refused_in_any_form(given):
    with pytest.raises(ValueError, match=r"must be|target_modules is empty"):
        DynamicRankConfig(**given)


def test_modules_to_save_may_come_in_any_form_and_stay_the_users():
    for given in ("LayerNorm", ("LayerNorm",), iter(["LayerNorm"])):
        assert len(adapted(modules_to_save=given).peft_config["default"].modules_to_save) == 6
    mine = ["LayerNorm"]
    adapted(modules_to_save=mine)
    assert mine == ["LayerNorm"]


def test_an_adapter_that_was_saved_with_a_smaller_head_is_loaded_as_it_is(tmp_path):
    """An older file says itself what was trained."""
    model = train(adapted(total_step=12, dem_weight=0.0))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["modules_to_save"] = ["classifier", "score"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
