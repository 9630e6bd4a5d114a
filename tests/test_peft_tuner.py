"""The PEFT tuner: every method that PEFT's users know, and the equations behind it."""

import copy
import inspect
import json
import pickle
import re
import runpy
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainer_script import adapted, base_model, token_ids

from drlora_ref import (
    SCORES,
    BudgetSchedule,
    RankAllocator,
    RankOneComponents,
    ZWatch,
    count_parameters,
    dem_loss,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
    merge_adapters,
)
from drlora_ref.tuner.export import export_lora
from drlora_ref.tuner.model import DynamicRankConfig, DynamicRankModel, find_tuner

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
]
STEPS = 12


def batch(n: int = 16) -> dict:
    ids = token_ids(n)
    return {"input_ids": ids, "labels": (ids[:, 0] > 25).long()}


def train(model, steps: int = STEPS, first: int = 1) -> list[float]:
    """The loop that a user of PEFT writes, with the two calls of dynamic rank."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        loss = model(**batch()).loss + 0.1 * model.dem_loss()
        loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def trained():
    model = adapted(total_step=STEPS)
    train(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(16)).logits


def test_components_and_head_train_and_nothing_else(capsys):
    model = adapted()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    components = {n for n in trainable if ".dynamic_rank_components.default.lora_" in n}
    assert len(components) == 12 * 3
    assert all(".classifier.modules_to_save.default." in name for name in trainable - components)
    model.print_trainable_parameters()
    counts = count_parameters(model)
    c_is_not_counted = 12 * 3
    assert (
        f"trainable params: {sum(counts.values()) + c_is_not_counted:,}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("score", SCORES)
def test_the_tuner_computes_what_the_package_computes(score):
    """Same seed, same loop: losses, masks, scores and DEM of inject_adapters, to the last bit."""
    base = base_model(hidden_dropout_prob=0.0)
    model = adapted(base, total_step=STEPS, lora_dropout=0.0, score=score)
    ours = inject_adapters(base_model(hidden_dropout_prob=0.0), r=3, lora_dropout=0.0)
    mark_only_adapters_trainable(ours)
    allocator = RankAllocator(ours, BudgetSchedule(3, 2, STEPS, deltaT=2), score=score)
    torch.manual_seed(7)
    theirs = train(model)
    ours.dem_loss, ours.update_and_allocate = lambda: dem_loss(ours), allocator.step
    torch.manual_seed(7)
    assert train(ours) == theirs
    assert model.rank_pattern() == allocator.rank_pattern()
    assert len(set(model.rank_pattern().values())) > 1  # not one rank for all
    assert torch.equal(model.base_model.allocator().ema, allocator.ema)
    torch.testing.assert_close(logits(merge_adapters(ours)), logits(model), atol=1e-6, rtol=0)


def test_saved_and_loaded_it_is_the_same_and_trains_on(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded), logits(trained))
    assert loaded.rank_pattern() == trained.rank_pattern()
    state, before = loaded.base_model.dynamic_rank_state.default, trained.base_model.allocator()
    assert torch.equal(state.ema, before.ema) and int(state.last_step) == STEPS
    with pytest.raises(ValueError, match=re.escape("step(1) after step 12")):
        loaded.update_and_allocate(1)


def test_training_that_stops_and_loads_goes_on_as_if_it_had_not(tmp_path):
    torch.manual_seed(3)
    straight = adapted(total_step=STEPS, score="random", lora_dropout=0.0)
    stopped = adapted(total_step=STEPS, score="random", lora_dropout=0.0)
    for model in (straight, stopped):
        train(model.eval(), steps=5)  # a new optimizer in the sixth step, in both
    stopped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    assert train(loaded.eval(), 7, first=6) == train(straight.eval(), 7, first=6)
    assert loaded.rank_pattern() == straight.rank_pattern()


@pytest.mark.parametrize("is_trainable", [True, False])
def test_what_was_loaded_for_inference_can_be_trained_after_all(is_trainable, tmp_path):
    """The score of the answers then leaves out padding, as it does without the detour."""
    model = adapted(total_step=STEPS, score="output_norm", lora_dropout=0.0, dem_weight=0.0)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        tmp_path,
        is_trainable=is_trainable,
    )
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(".lora_" in name or "modules_to_save" in name)
    padded = batch() | {"attention_mask": torch.ones_like(batch()["input_ids"])}
    padded["attention_mask"][:, 3:] = 0
    averages = []
    for tuned in (model.train(), loaded.train()):
        for part in (padded, batch()):  # the allocator is not made before the first of them
            tuned(**part).loss.backward()
        tuned.update_and_allocate(4)
        averages.append(tuned.base_model.allocator().ema)
    torch.testing.assert_close(*averages)


def hooks_of_a_watch(model) -> list:
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), ZWatch)]


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_the_model_that_is_left_is_not_watched(leave):
    model = adapted(total_step=STEPS, tfinal=0, score="output_norm")
    train(model, 2)
    assert hooks_of_a_watch(model)
    if leave == "merge_and_unload":
        train(model, STEPS - 2, first=3)
    assert not hooks_of_a_watch(getattr(model, leave)())


def test_a_merge_that_fails_leaves_the_watch():
    model = adapted(total_step=STEPS, init_r=2, target_r=2, score="output_norm")
    train(model, 1)
    next(iter(model.base_model.adapted_layers().values())).lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert hooks_of_a_watch(model)


def test_loading_into_a_live_model_replaces_its_allocator(trained, tmp_path):
    early = adapted(total_step=STEPS)
    train(early, steps=3)
    early.save_pretrained(tmp_path)
    trained.load_adapter(tmp_path, "default", is_trainable=True)
    assert trained.base_model.allocator().last_step == 3
    train(trained, steps=1, first=4)


def test_merge_and_unload_gives_the_base_class_with_the_same_logits(trained):
    expected = logits(trained)
    merged = trained.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model())
    assert not [m for m in merged.modules() if isinstance(m, BaseTunerLayer)]
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=0)


def test_merged_adapters_can_be_taken_apart_again(trained):
    expected = logits(trained)
    weight = trained.get_base_model().roberta.encoder.layer[0].output.dense.base_layer.weight
    before = weight.clone()
    trained.merge_adapter()
    assert not torch.equal(weight, before)
    torch.testing.assert_close(logits(trained), expected, atol=1e-6, rtol=0)
    trained.unmerge_adapter()
    torch.testing.assert_close(weight, before, atol=1e-6, rtol=0)


def test_safe_merge_refuses_a_weight_that_is_not_finite(trained):
    next(iter(trained.base_model.adapted_layers().values())).lora_A.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="adapter 'default': the merged weight has NaN"):
        trained.merge_and_unload(safe_merge=True)


def test_disabled_adapters_leave_the_base_model_head_included(trained):
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(base_model()))
    assert not torch.allclose(logits(trained), logits(base_model()))


def test_disabling_a_merged_adapter_takes_it_out_of_the_weights_first(trained):
    trained.merge_adapter()
    with trained.disable_adapter():
        torch.testing.assert_close(logits(trained), logits(base_model()), atol=1e-6, rtol=0)


def test_two_adapters_live_side_by_side(trained, tmp_path):
    expected, ranks = logits(trained), trained.rank_pattern()
    other = DynamicRankConfig(init_r=4, target_r=1, total_step=8, deltaT=1, task_type="SEQ_CLS")
    trained.add_adapter("other", other)
    assert torch.equal(logits(trained), expected)  # adding one does not switch to it
    trained.set_adapter("other")
    train(trained, steps=8)
    assert sum(trained.rank_pattern().values()) == 12 * 1
    assert trained.rank_pattern("default") == ranks
    theirs = logits(trained)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(loaded), expected)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), theirs)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), theirs)
    assert list(loaded.base_model.dynamic_rank_state) == ["other"]


def test_several_active_adapters_must_be_told_apart():
    model = adapted(total_step=STEPS, task_type=None)
    model.add_adapter("other", DynamicRankConfig(target_r=2, init_r=3, total_step=12))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 adapters are active: name one of them"):
        model.update_and_allocate(1)
    model.update_and_allocate(1, "other")
    assert len(model.rank_pattern("other")) == 12


def test_all_linear_adapts_the_encoder_and_leaves_the_head():
    names = list(adapted(target_modules="all-linear").base_model.adapted_layers())
    assert len(names) == 12 and not [name for name in names if "classifier" in name]


def test_targets_can_be_a_pattern_a_list_or_indices_of_layers():
    by_pattern = adapted(target_modules=r".*layer\.1\..*query", exclude_modules=None)
    assert list(by_pattern.base_model.adapted_layers()) == [
        "roberta.encoder.layer.1.attention.self.query"
    ]
    by_list = adapted(target_modules=["query", "key"], exclude_modules=["key"])
    assert len(by_list.base_model.adapted_layers()) == 2
    assert (
        len(adapted(target_modules=["query"], layers_to_transform=[1]).base_model.adapted_layers())
        == 1
    )


def test_other_modules_can_be_trained_whole():
    model = adapted(modules_to_save=["LayerNorm"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len([name for name in trainable if "LayerNorm.modules_to_save" in name]) == 2 * (1 + 4)


def test_gradient_checkpointing_changes_no_gradient():
    def gradients(checkpointing):
        base = base_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapted(base, lora_dropout=0.0).train()
        torch.manual_seed(0)
        for layer in model.base_model.adapted_layers().values():
            nn.init.normal_(layer.lora_c)
        model(**batch()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other) and one.any()


def test_a_bfloat16_model_trains_its_components_in_float32():
    model = adapted(base_model().to(torch.bfloat16), total_step=STEPS)
    assert {layer.lora_A.dtype for layer in model.base_model.adapted_layers().values()} == {
        torch.float32
    }
    assert model.base_model.dynamic_rank_state.default.ema.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model)
    assert losses[-1] < losses[0] and sum(model.rank_pattern().values()) == 24
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=0.05, rtol=0.05)


def test_low_memory_loading_is_loading(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(trained))


def test_the_configuration_survives_its_file(tmp_path):
    config = DynamicRankConfig(init_r=5, target_r=2, total_step=40, score="abs_c", curve="adalora")
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(init_r=2, target_r=3), "target_r = 3 is above init_r = 2"),
        (dict(total_step=10, tinit=6, tfinal=4), r"tinit \+ tfinal = 6 \+ 4 leaves no step"),
        (dict(total_step=0), "total_steps = 0: must be a whole number, at least 1"),
        (dict(init_r=3.0), r"init_r = 3\.0: must be a whole number"),
        (dict(init_r="3"), "init_r = '3': must be a whole number"),
        (dict(tinit=-5), "tinit = -5: must be a whole number, at least 0"),
        (dict(tfinal=2.5), r"tfinal = 2\.5: must be a whole number"),
        (dict(seed="a"), "seed = 'a': must be a whole number"),
        (dict(lora_dropout=1.5), r"lora_dropout = 1\.5: must be at least 0, below 1"),
        (dict(lora_alpha=-1), "lora_alpha = -1: must be above 0"),
        (dict(dem_weight=float("nan")), "dem_weight = nan: must be 0"),
        (dict(score=abs), "score = <built-in function abs>: must be a name, since it is saved"),
        (dict(deltaT=0), "deltaT = 0: must be a whole number, at least 1"),
        (dict(curve="cubic"), "curve = 'cubic': must be one of paper, adalora"),
        (dict(score="norm"), "score = 'norm': must be one of frobenius_share"),
        (dict(beta=1.0), "beta = 1.0: must be at least 0 and less than 1"),
        (dict(dem_weight=-1.0), "dem_weight = -1.0: must be 0"),
    ],
)
def test_a_wrong_configuration_is_refused_where_it_is_written(given, message):
    with pytest.raises(ValueError, match=message):
        DynamicRankConfig(**dict(init_r=3, target_r=2) | given)


def test_a_missing_total_step_is_an_error_at_the_first_step():
    with pytest.raises(ValueError, match="total_step is missing: give DynamicRankConfig"):
        adapted().update_and_allocate(1)


def test_a_loop_that_ends_too_early_cannot_merge_its_wrong_ranks():
    model = adapted(total_step=100)  # but only 12 steps are taken
    train(model)
    message = "pruning has not ended.*12 steps.*pruned at step 50 of total_step = 100"
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()


def test_a_loop_that_forgets_to_allocate_cannot_merge():
    with pytest.raises(ValueError, match="0 steps of update_and_allocate"):
        adapted(total_step=100).merge_and_unload()


def test_a_loop_that_goes_on_after_its_last_step_is_stopped():
    model = adapted(total_step=STEPS)
    train(model)
    with pytest.raises(ValueError, match=r"step 13 of total_step = 12: the budget was spread over"):
        train(model, steps=1, first=13)


def test_a_component_that_came_back_after_the_end_cannot_be_merged(trained):
    """Who stops calling the allocator after the last event leaves pruned components training."""
    for layer in trained.base_model.adapted_layers().values():
        layer.lora_c.data += 0.1
    with pytest.raises(ValueError, match="a component that was pruned is not zero"):
        trained.merge_and_unload()


def test_merging_asks_for_the_adapters_that_are_merged(trained):
    trained.add_adapter("fresh", DynamicRankConfig(init_r=3, target_r=2, total_step=100))
    with pytest.raises(ValueError, match="adapter 'fresh': pruning has not ended"):
        trained.merge_adapter(adapter_names=["fresh"])
    with pytest.raises(ValueError, match="adapter 'fresh': pruning has not ended"):
        trained.merge_and_unload(adapter_names=["fresh"])
    trained.set_adapter("fresh")
    trained.merge_and_unload(adapter_names=["default"])


def test_an_unfinished_adapter_warns_where_it_is_used(tmp_path):
    model = adapted(total_step=100)
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="unfinished: pruning was to end at step 50, and it has 12"
    ):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_a_name_that_no_adapter_has_is_refused(trained):
    with pytest.raises(ValueError, match="no adapter 'nope', only default"):
        trained.rank_pattern("nope")


def test_rows_of_one_batch_cannot_have_adapters_of_their_own(trained):
    with pytest.raises(ValueError, match="one batch cannot mix adapters"):
        trained(**batch(), adapter_names=["default"] * 16)


def test_a_refused_target_leaves_the_model_as_it_was():
    base = base_model()
    with pytest.raises(TypeError, match=r"LayerNorm is LayerNorm; only nn\.Linear"):
        adapted(base, target_modules=["query", "layer.1.output.LayerNorm"])
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer)]
    assert len(adapted(base, target_modules=["query"]).base_model.adapted_layers()) == 2


def test_a_model_spread_over_devices_is_refused():
    base = base_model()
    base.roberta.encoder.layer[1].output.dense.to("meta")
    with pytest.raises(ValueError, match="the model is on cpu, meta: scores need one device"):
        adapted(base)
    assert not [m for m in base.modules() if isinstance(m, BaseTunerLayer)]


def test_the_model_can_be_copied_and_pickled(trained):
    copied = pickle.loads(pickle.dumps(copy.deepcopy(trained)))
    assert torch.equal(logits(copied), logits(trained))
    assert copied.base_model.allocator().last_step == STEPS


def test_nothing_to_prune_can_be_merged_at_any_time():
    adapted(total_step=100, init_r=2, target_r=2).merge_and_unload()


def test_a_left_out_step_is_an_error():
    model = adapted(total_step=STEPS)
    model.update_and_allocate(1)
    with pytest.raises(ValueError, match=re.escape("step(3) after step 1")):
        model.update_and_allocate(3)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
@pytest.mark.parametrize("method", ["lora", "drlora"])
def test_a_model_that_has_adapters_is_refused(method):
    base = base_model()
    if method == "lora":
        get_peft_model(base, LoraConfig(target_modules=["query"]))
    else:
        inject_adapters(base, ["query"], r=2)
    with pytest.raises(ValueError, match=r"has adapters already, in roberta\.encoder\.layer\.0"):
        adapted(base)


def test_targets_that_are_no_linear_layers_are_refused():
    message = "target_modules: roberta.embeddings.word_embeddings is Embedding; only nn.Linear"
    with pytest.raises(TypeError, match=message):
        adapted(target_modules=["word_embeddings"])


def test_quantised_weights_are_refused():
    base = base_model()
    weight = base.roberta.encoder.layer[0].attention.self.query.weight
    whole = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    base.roberta.encoder.layer[0].attention.self.query.weight = whole
    with pytest.raises(TypeError, match=r"query is Linear with a weight of torch\.int8; quantised"):
        adapted(base)
    marked = base_model()
    marked.is_quantized = True  # as transformers marks what it has loaded in 4 or 8 bits
    with pytest.raises(TypeError, match="quantised models cannot be adapted"):
        adapted(marked)


class Params4bit(nn.Parameter):
    """What bitsandbytes calls its weights: two numbers in a byte."""


class Linear4bit(nn.Linear):
    """As bitsandbytes' layer is, to those who look at it from outside."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features)
        packed = torch.zeros(whole.weight.numel() // 2, 1, dtype=torch.uint8)
        self.bias = whole.bias
        self.weight = Params4bit(packed, requires_grad=False)
        self.whole = [whole.weight.detach()]

    def forward(self, x):
        return nn.functional.linear(x, *self.whole, self.bias)


def base_in_4_bits():
    base = base_model()
    for name in ("query", "value"):
        for layer in base.roberta.encoder.layer:
            self_attention = layer.attention.self
            setattr(self_attention, name, Linear4bit(getattr(self_attention, name)))
    base.is_quantized = True
    return base


@pytest.mark.parametrize("targets", [["query"], ["query", "value"], ["key"], None])
def test_4_bits_without_a_gpu_are_refused_before_anything_is_changed(targets):
    base = base_in_4_bits()
    with pytest.raises(TypeError, match="4-bit weights are adapted on a GPU only, and these"):
        adapted(base, target_modules=targets)
    assert not find_adapted(base)


def find_adapted(model):
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def test_4_bits_train_and_are_exported_and_nothing_is_merged_into_them(monkeypatch, tmp_path):
    """Where a GPU is; here it is said to be one."""
    monkeypatch.setattr("drlora_ref.tuner.model.check_quantised", lambda model: None)
    model = adapted(base_in_4_bits(), target_modules=["query", "value"], total_step=STEPS)
    losses = train(model)
    assert losses[-1] < losses[0]
    layer = find_adapted(model)[0]
    assert (layer.in_features, layer.out_features) == (16, 16)
    with pytest.raises(TypeError, match=r"nothing is merged into 4-bit.*: save the adapter"):
        model.merge_and_unload()
    ranks = export_lora(model.eval(), tmp_path)
    assert sum(ranks.values()) == 2 * len(ranks) == 8
    stock = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    torch.testing.assert_close(stock(**batch()).logits, model(**batch()).logits)


GGUF = SimpleNamespace(quant_method="gguf", to_dict=dict)


def test_a_gguf_file_that_was_unpacked_is_not_quantised_any_more():
    base = base_model()
    base.is_quantized = True
    base.config.quantization_config = GGUF
    assert find_adapted(adapted(base))
    packed = base_in_4_bits()
    packed.roberta.encoder.layer[0].attention.self.query = nn.Linear(16, 16)
    packed.config.quantization_config = GGUF
    with pytest.raises(TypeError, match="4-bit weights are adapted on a GPU only"):
        adapted(packed)


def test_components_that_fsdp2_has_cut_are_refused():
    """In a loop of one's own, where no Trainer looks."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = adapted(total_step=STEPS)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="query is sharded: FSDP and DeepSpeed shard the comp"):
            model.update_and_allocate(1)
        with pytest.raises(ValueError, match="query is sharded"):
            model.dem_loss()
    finally:
        torch.distributed.destroy_process_group()


def test_components_that_zero_3_has_cut_are_refused():
    model = adapted(total_step=STEPS)
    last = list(model.base_model.adapted_layers().values())[-1]
    last.lora_A.ds_id = 3  # as DeepSpeed marks it
    with pytest.raises(ValueError, match="is sharded: FSDP and DeepSpeed shard the components"):
        model.update_and_allocate(1)


def test_a_checkpoint_of_other_ranks_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    wider = adapted(init_r=4, target_r=2, total_step=STEPS)
    with pytest.raises(ValueError, match=r"other ranks or targets: .*\(3.* there and \(4.* here"):
        wider.load_adapter(tmp_path, "default")
    fewer = adapted(target_modules=["query"], total_step=STEPS)
    with pytest.raises(ValueError, match=r"other ranks or targets: .*ema is \(36,\) there"):
        fewer.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("given", [dict(total_step=20), dict(beta=0.5), dict(score="abs_c")])
def test_going_on_under_other_settings_is_refused(given, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    other = adapted(**dict(total_step=STEPS) | given)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(ValueError, match="12 steps so far were taken with another schedule, beta"):
        other.update_and_allocate(13)


def test_injection_without_the_wrapper_is_refused():
    config = DynamicRankConfig(init_r=3, target_r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="use `get_peft_model`"):
        inject_adapter_in_model(config, base_model())


def test_merge_adapters_is_not_for_peft_models(trained):
    with pytest.raises(TypeError, match="PEFT's model: merge_and_unload"):
        merge_adapters(trained)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="RobertaForSequenceClassification has no dynamic-rank"):
        find_tuner(base_model())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_an_untested_version_of_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    with pytest.raises(ImportError, match=re.escape("pip install 'peft>=0.21,<0.22'")):
        runpy.run_module("drlora_ref.tuner.model")


# --- what PEFT does, on which the tuner rests --------------------------------------------------


def test_peft_still_has_no_door_for_methods_it_does_not_know():
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        peft.utils.register_peft_method(
            name="dynamic_rank_too", config_cls=DynamicRankConfig, model_cls=DynamicRankModel
        )
        pytest.fail("PEFT's register_peft_method takes new names now: use it in peft_tuner.py")


def test_peft_still_reads_its_tables_at_call_time():
    config = adapted().peft_config["default"]
    assert PEFT_TYPE_TO_TUNER_MAPPING.get("drlora_ref.DYNAMIC_RANK") is DynamicRankModel, (
        "PEFT's tables no longer find a method under the plain string of adapter_config.json"
    )
    assert json.loads(json.dumps(config.peft_type)) == "drlora_ref.DYNAMIC_RANK"
    assert config.peft_type.value == config.peft_type.name == "drlora_ref.DYNAMIC_RANK"


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("inject_adapter", ["self", "model", "adapter_name"]),
        ("_replace_module", ["self", "parent", "child_name", "new_module", "child"]),
        ("merge_adapter", ["self", "adapter_names"]),
        ("_unload_and_optionally_merge", ["self", "merge"]),
        ("delete_adapter", ["self", "adapter_name"]),
        (
            "_remap_adapter_state_dict_for_load",
            ["model", "config", "adapter_name", "state_dict"],
        ),
    ],
)
def test_peft_still_has_the_methods_that_the_tuner_overrides(name, parameters):
    method = getattr(BaseTuner, name, None)
    message = f"PEFT's BaseTuner.{name} is gone or takes other arguments: adapt DynamicRankModel"
    assert method and list(inspect.signature(method).parameters)[: len(parameters)] == parameters, (
        message
    )


def test_pefts_own_replacement_still_fails_on_a_head_of_several_layers():
    class Stock(DynamicRankModel):
        _replace_module = BaseTuner._replace_module

    config = DynamicRankConfig(init_r=3, target_r=3, modules_to_save=["classifier"])
    model = Stock(base_model(), {"a": config}, "a")
    try:
        model.merge_and_unload()
    except AttributeError as error:
        assert "weight" in str(error)
    else:
        pytest.fail("PEFT's _replace_module copes with RoBERTa's head: drop our override")


def test_peft_still_saves_what_the_tuner_itself_holds(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("ema", "last_step", "settings"):
        assert f"base_model.dynamic_rank_state.{name}" in saved, (
            "PEFT no longer saves buffers of the BaseTuner: resuming would lose the allocator"
        )


def test_no_part_of_the_tuner_has_a_name_that_peft_takes_for_a_head(trained):
    names = {name.split(".")[-1] for name, _ in trained.base_model.named_modules()}
    ours = {n for n in names if n.startswith("dynamic_rank")} | {"lora_dropout"}
    assert "dynamic_rank_components" in ours and not [
        n for n in ours if n.endswith(tuple(SEQ_CLS_HEAD_NAMES))
    ]
    assert dynamic_layers(trained).keys() and isinstance(
        next(iter(dynamic_layers(trained).values())), RankOneComponents
    )
