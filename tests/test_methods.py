"""The methods of the paper's tables: what trains, what is counted, and that AdaLoRA is driven."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from drlora_ref import BudgetSchedule, dem_loss, dynamic_layers, penalty_loss
from drlora_ref.experiments.methods import METHODS, Prepared, count_trainable, prepare, rank_pattern
from drlora_ref.experiments.methods.bottleneck import BottleneckAdapter, insert_adapters
from drlora_ref.experiments.sources.models import load_pretrained, resolve_model
from drlora_ref.inject import BASE_MODELS, in_head
from drlora_ref.train import train

MODELS = {
    "roberta": ("tiny-roberta", AutoModelForSequenceClassification),
    "bart": ("tiny-bart", AutoModelForSeq2SeqLM),
    "llama": ("tiny-llama", AutoModelForCausalLM),
}
SCHEDULE = BudgetSchedule(3, 2, 30, tinit=4, tfinal=10, deltaT=4)
WITH_RANKS = ("drlora", "lora", "adalora", "dora-wd", "prune-once")
every_method = pytest.mark.parametrize("method", METHODS)
# A Llama has no bias.
each_pair = pytest.mark.parametrize(
    "kind, method", [(k, m) for k in MODELS for m in METHODS if (k, m) != ("llama", "bitfit")]
)


def fresh(kind: str = "roberta"):
    torch.manual_seed(0)
    name, auto_class = MODELS[kind]
    return load_pretrained(resolve_model(name), auto_class)[0]


def batch(kind: str = "roberta", seed: int = 0) -> dict:
    tokens = torch.randint(4, 90, (6, 9), generator=torch.Generator().manual_seed(seed))
    labels = {"bart": tokens[:, 1:5].clone(), "llama": tokens.clone()}
    return {"input_ids": tokens, "labels": labels.get(kind, tokens[:, 1] % 2)}


def base_name(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def train_steps(prepared: Prepared, optimizer, steps: range) -> None:
    """The order in which a training loop must do things; dropout off."""
    prepared.model.eval()
    for step in steps:
        loss = prepared.model(**batch(seed=step)).loss
        if prepared.loss_term and (term := prepared.loss_term(step)) is not None:
            loss = loss + term
        loss.backward()
        optimizer.step()
        if prepared.allocator:
            prepared.allocator.step(step)
        optimizer.zero_grad()


def adam(prepared: Prepared) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in prepared.model.parameters() if p.requires_grad], lr=1e-2)


@each_pair
def test_each_method_trains_the_head_and_exactly_its_own_parameters(method, kind):
    model = fresh(kind)
    given = {name for name, _ in model.named_parameters()}
    adapted = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
               and any(name.endswith("." + t) for t in BASE_MODELS[kind].matrices)]  # fmt: skip
    assert len(adapted) == {"roberta": 2 * 6, "bart": 4 * 6, "llama": 2 * 7}[kind]
    last = ("output.dense", "out_proj", "fc2", "o_proj", "down_proj")  # of a sub-layer
    in_sub_layers = {
        "h-adapter": [n for n in adapted if n.endswith(last)],
        "p-adapter": [n for n in adapted if n.endswith(("fc2", "down_proj")) or
                      (n.endswith("output.dense") and "attention" not in n)],
    }  # fmt: skip
    extra = {
        "drlora": ["lora_A", "lora_B", "lora_c"],
        "lora": ["lora_A.default.weight", "lora_B.default.weight"],
        "prune-once": ["lora_A.default.weight", "lora_B.default.weight"],
        "adalora": ["lora_A.default", "lora_B.default", "lora_E.default"],
        "dora-wd": ["lora_A.default.weight", "lora_B.default.weight",
                    "lora_magnitude_vector.default.weight"],
        "h-adapter": ["down.weight", "down.bias", "up.weight", "up.bias"],
        "p-adapter": ["down.weight", "down.bias", "up.weight", "up.bias"],
    }  # fmt: skip
    expected = {name for name in given if in_head(name)}
    for name in in_sub_layers.get(method, adapted):
        expected |= {f"{name}.{part}" for part in extra.get(method, [])}
    if method == "bitfit":
        expected |= {name for name in given if name.endswith(".bias")}
    if method == "full":
        expected |= given

    model = prepare(method, model, SCHEDULE).model
    trained = {base_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert trained == expected


@each_pair
def test_a_prepared_model_starts_as_the_model_was_and_one_step_changes_it(method, kind):
    model, inputs = fresh(kind).eval(), batch(kind)
    before = model(**inputs).logits.detach()
    prepared = prepare(method, model, SCHEDULE)
    prepared.model.eval()
    loss = prepared.model(**inputs).loss
    start = prepared.model(**inputs).logits
    # adapters start near the identity; weight decomposition divides by a norm and multiplies again
    tolerance = {"h-adapter": 1e-3, "p-adapter": 1e-3, "dora-wd": 1e-5}.get(method, 0)
    torch.testing.assert_close(start, before, atol=tolerance, rtol=0)
    assert "adapter" not in method or not torch.equal(start, before)

    frozen = {n: p.clone() for n, p in prepared.model.named_parameters() if not p.requires_grad}
    loss.backward()
    adam(prepared).step()
    assert (prepared.model(**inputs).logits - before).abs().max() > 1e-5
    for name, parameter in prepared.model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


@every_method
def test_ranks_are_named_by_the_modules_of_the_model_as_it_was_given(method):
    model = fresh()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not in_head(n)]
    ranks = rank_pattern(prepare(method, model, SCHEDULE))
    expected = {"drlora": 3, "adalora": 3, "prune-once": 3, "lora": 2, "dora-wd": 2}
    assert ranks == (dict.fromkeys(names, expected[method]) if method in expected else {})


@pytest.mark.parametrize("method", METHODS)
def test_preparing_a_model_warns_of_nothing(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(method, fresh(), SCHEDULE)


def test_an_adapter_computes_what_its_formula_says():
    adapter = BottleneckAdapter(nn.Linear(3, 2), bottleneck=1)
    with torch.no_grad():
        adapter.base_layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
        adapter.base_layer.bias.copy_(torch.tensor([0.5, -1.0]))
        adapter.down.weight.copy_(torch.tensor([[2.0, -1.0]]))
        adapter.down.bias.fill_(0.25)
        adapter.up.weight.copy_(torch.tensor([[3.0], [-2.0]]))
        adapter.up.bias.copy_(torch.tensor([0.1, 0.2]))
    # x = (1, 1, 5): h = (1.5, 1), the narrow layer is 2·1.5 - 1 + 0.25 = 2.25
    z = 2.25 * 0.5 * (1 + math.erf(2.25 / math.sqrt(2)))
    expected = torch.tensor([1.5 + 3 * z + 0.1, 1 - 2 * z + 0.2])
    torch.testing.assert_close(adapter(torch.tensor([1.0, 1.0, 5.0])), expected)


@pytest.mark.parametrize("config", [RobertaConfig, BertConfig, MPNetConfig])
def test_adapters_stand_at_the_end_of_both_sub_layers_before_the_residual(config):
    model = AutoModelForSequenceClassification.from_config(config(vocab_size=50, **TINY))
    insert_adapters(model, bottleneck=4, after_attention=True)
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, BottleneckAdapter)}
    assert len(adapters) == 2 * 2 and sum("attention" in name for name in adapters) == 2
    assert not [m for m in adapters.values() if isinstance(m.base_layer, BottleneckAdapter)]


def test_an_adapter_of_no_width_is_refused():
    with pytest.raises(ValueError, match=r"bottleneck = 0: .* at least 1"):
        prepare("p-adapter", fresh(), SCHEDULE, bottleneck=0)


def test_dem_is_the_loss_term_of_the_dynamic_method_until_pruning_has_ended():
    prepared = prepare("drlora", fresh(), SCHEDULE, dem_weight=0.3)
    term = prepared.loss_term(SCHEDULE.t_end)
    torch.testing.assert_close(term, 0.3 * dem_loss(prepared.model))
    assert term.requires_grad and prepared.loss_term(SCHEDULE.t_end + 1) is None
    assert prepare("drlora", fresh(), SCHEDULE).loss_term is None
    assert prepare("lora", fresh(), SCHEDULE, dem_weight=0.3).loss_term is None


def test_another_penalty_takes_dems_place_under_the_same_weight():
    prepared = prepare("drlora", fresh(), SCHEDULE, dem_weight=0.3, penalty="l1")
    expected = 0.3 * penalty_loss(prepared.model, "l1")
    torch.testing.assert_close(prepared.loss_term(1), expected)
    assert expected != 0.3 * dem_loss(prepared.model)


def test_the_settings_reach_the_layers():
    given = dict(lora_alpha=6, lora_dropout=0.25)
    for method in WITH_RANKS:
        model = prepare(method, fresh(), SCHEDULE, **given).model
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        dropout = getattr(layer.lora_dropout, "default", layer.lora_dropout)
        assert dropout.p == 0.25
    layer = next(iter(dynamic_layers(prepare("drlora", fresh(), SCHEDULE, **given).model).values()))
    assert layer.scaling == 6 / 3
    allocator = prepare("drlora", fresh(), SCHEDULE, beta=0.5, score="abs_c").allocator
    assert (allocator.beta, allocator.score_name) == (0.5, "abs_c")


@pytest.mark.parametrize(
    "method, given, message",
    [
        ("dora", {}, "unknown method 'dora' \\(nearest: drlora\\): use drlora, lora, .*, dora-wd"),
        ("drlora", {"dem_weight": -1.0}, "dem_weight = -1.0: must be 0"),
        ("drlora", {"score": "norm"}, "score = 'norm': must be one of"),
        ("drlora", {"penalty": "l3"}, "penalty = 'l3': must be one of"),
    ],
)
def test_what_cannot_be_is_named(method, given, message):
    with pytest.raises(ValueError, match=message):
        prepare(method, fresh(), SCHEDULE, **given)


# ---------------------------------------------------------------- parameters, as the paper counts


def on_meta(model_class, config):
    with torch.device("meta"):  # sizes without memory
        return model_class(config)


def roberta_base():
    return on_meta(RobertaForSequenceClassification, RobertaConfig(vocab_size=50265,
                   max_position_embeddings=514, type_vocab_size=1))  # fmt: skip


def millions(count: int) -> float:
    return round(count / 1e6, 2)


@pytest.mark.parametrize(
    "method, size, expected",
    [("lora", 2, 0.33), ("lora", 8, 1.33), ("h-adapter", 8, 0.31), ("h-adapter", 32, 1.20),
     ("p-adapter", 16, 0.30), ("p-adapter", 64, 1.19), ("bitfit", 0, 0.10)],
)  # fmt: skip
def test_roberta_base_trains_as_many_parameters_as_table_2_says(method, size, expected):
    schedule = BudgetSchedule(max(size, 1), max(size, 1), 100)
    counts = count_trainable(prepare(method, roberta_base(), schedule, bottleneck=size))
    assert millions(counts["adapter"]) == expected
    assert counts["head"] == (768 * 768 + 768) + (768 * 2 + 2)


def test_full_fine_tuning_counts_encoder_and_head():
    counts = count_trainable(prepare("full", roberta_base(), BudgetSchedule(3, 2, 100)))
    assert millions(sum(counts.values())) == 124.65


def test_weight_decomposition_adds_one_number_for_every_output():
    schedule = BudgetSchedule(2, 2, 100)
    lora, decomposed = (
        count_trainable(prepare(method, roberta_base(), schedule))["adapter"]
        for method in ("lora", "dora-wd")
    )
    assert decomposed - lora == 12 * (4 * 768 + 3072 + 768)


def keep(prepared: Prepared, ranks: dict[str, int], init_r: int) -> None:
    """Let that many components of each layer survive; on the meta device masks hold no values."""
    for name, rank in ranks.items():
        mask = torch.arange(init_r) < rank
        if layer := dynamic_layers(prepared.model).get(name):
            layer.component_mask = mask
        else:
            prepared.allocator.config.rank_pattern[f"{name}.lora_E.default"] = mask.tolist()


@pytest.mark.parametrize(
    "method, target_r, uniform, printed",
    [("drlora", 2, 0.33, 0.34), ("drlora", 8, 1.33, 1.31),
     ("adalora", 2, 0.33, 0.32), ("adalora", 8, 1.33, 1.27)],
)  # fmt: skip
def test_which_components_survive_decides_the_count_and_table_2_is_possible(
    method, target_r, uniform, printed
):
    init_r = target_r * 3 // 2
    prepared = prepare(method, roberta_base(), BudgetSchedule(init_r, target_r, 100))
    names = list(prepared.allocator.layers)
    assert len(names) == 72
    keep(prepared, dict.fromkeys(names, target_r), init_r)
    assert sum(rank_pattern(prepared).values()) == 72 * target_r
    assert millions(count_trainable(prepared)["adapter"]) == uniform

    bounds = []
    for kept_whole in ("attention", "feed_forward"):
        small = [name for name in names if "attention" in name]
        whole = small if kept_whole == "attention" else [n for n in names if n not in small]
        rest = [name for name in names if name not in whole]
        each, more = divmod(72 * target_r - len(whole) * init_r, len(rest))
        ranks = dict.fromkeys(whole, init_r) | dict.fromkeys(rest, each)
        keep(prepared, ranks | dict.fromkeys(rest[:more], each + 1), init_r)
        assert sum(rank_pattern(prepared).values()) == 72 * target_r
        bounds.append(count_trainable(prepared)["adapter"])
    # a component has 768 + 768 numbers in attention, 768 + 3072 in a feed-forward matrix
    assert bounds[0] == 48 * init_r * 1536 + (72 * target_r - 48 * init_r) * 3840
    assert bounds[1] == 24 * init_r * 3840 + (72 * target_r - 24 * init_r) * 1536
    assert bounds[0] < printed * 1e6 < bounds[1]


@pytest.mark.parametrize("method", ["lora", "drlora"])
def test_bart_base_without_cross_attention_counts_as_table_4(method):
    config = BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072,
                        decoder_ffn_dim=3072)  # fmt: skip
    model = on_meta(BartForConditionalGeneration, config)
    prepared = prepare(method, model, BudgetSchedule(3, 2, 100))
    if method == "drlora":
        keep(prepared, dict.fromkeys(prepared.allocator.layers, 2), init_r=3)
    assert {k: millions(n) for k, n in count_trainable(prepared).items()} == {
        "adapter": 0.33,
        "head": 0,
    }


# ---------------------------------------------------------------- AdaLoRA


def singular_values(prepared: Prepared) -> dict[str, torch.Tensor]:
    return {name: layer.lora_E["default"].detach().flatten()
            for name, layer in prepared.allocator.layers.items()}  # fmt: skip


def test_adalora_prunes_from_tinit_to_t_end_and_then_its_mask_is_fixed():
    prepared = prepare("adalora", fresh(), SCHEDULE)
    optimizer, left, masks = adam(prepared), {}, {}
    for step in range(1, SCHEDULE.total_steps + 1):
        train_steps(prepared, optimizer, range(step, step + 1))
        left[step] = prepared.allocator.surviving()
        masks[step] = copy.deepcopy(prepared.allocator.config.rank_pattern)
    changed = [step for step in range(2, 31) if left[step] != left[step - 1]]
    assert min(changed) > SCHEDULE.tinit == 4 and max(changed) <= SCHEDULE.t_end == 20
    assert left[4] == 12 * 3 and left[20] == left[30] == 12 * 2
    assert masks[20] == masks[30]
    ranks = prepared.allocator.rank_pattern()
    assert {name: int((E != 0).sum()) for name, E in singular_values(prepared).items()} == ranks
    assert len(set(ranks.values())) > 1  # a map that a uniform one would not pass for


def test_adalora_resumed_from_its_state_is_bit_identical():
    def start() -> tuple[Prepared, torch.optim.Optimizer]:
        prepared = prepare("adalora", fresh(), SCHEDULE)
        return prepared, adam(prepared)

    straight, optimizer = start()
    train_steps(straight, optimizer, range(1, 31))

    first, optimizer = start()
    train_steps(first, optimizer, range(1, 18))
    saved = copy.deepcopy({
        "weights": {n: p.data for n, p in first.model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "allocator": first.allocator.state_dict(),
    })  # fmt: skip
    second, optimizer = start()
    second.model.load_state_dict(saved["weights"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    second.allocator.load_state_dict(saved["allocator"])
    assert second.allocator.rank_pattern() == first.allocator.rank_pattern()
    train_steps(second, optimizer, range(18, 31))

    assert second.allocator.rank_pattern() == straight.allocator.rank_pattern()
    assert second.allocator.config.rank_pattern == straight.allocator.config.rank_pattern
    other = dict(straight.model.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in second.model.named_parameters())


def test_adalora_without_its_averages_would_go_another_way():
    """What the test above would miss if the scores after step 17 decided nothing."""
    patterns = []
    for keep_scores in (True, False):
        prepared = prepare("adalora", fresh(), SCHEDULE)
        optimizer = adam(prepared)
        train_steps(prepared, optimizer, range(1, 18))
        if not keep_scores:
            prepared.model.base_model.rankallocator.reset_ipt()
        train_steps(prepared, optimizer, range(18, 31))
        patterns.append(prepared.allocator.config.rank_pattern)
    assert patterns[0] != patterns[1]


def test_adalora_says_so_when_it_ends_with_another_number_than_the_budget():
    prepared = prepare("adalora", fresh(), SCHEDULE)
    prepared.allocator.config.total_step = 300  # what PEFT alone would accept in silence
    with pytest.raises(ValueError, match=r"ends with \d+ components, the budget is 24"):
        train_steps(prepared, adam(prepared), range(1, 31))


def test_adalora_refuses_a_step_left_out_a_foreign_state_and_nothing_to_prune():
    prepared = prepare("adalora", fresh(), SCHEDULE)
    with pytest.raises(ValueError, match=r"step\(2\) after step 0"):
        prepared.allocator.step(2)
    other = prepare("adalora", fresh(), BudgetSchedule(3, 2, 60)).allocator.state_dict()
    with pytest.raises(ValueError, match="of another schedule"):
        prepared.allocator.load_state_dict(other)
    bart = prepare("adalora", fresh("bart"), SCHEDULE).allocator.state_dict()
    with pytest.raises(ValueError, match="of another set of layers"):
        prepared.allocator.load_state_dict(bart)
    with pytest.raises(ValueError, match="init_r must be above target_r = 2"):
        prepare("adalora", fresh(), BudgetSchedule(2, 2, 30))


def test_adaloras_penalty_is_pefts_and_no_part_of_the_models_own_loss():
    prepared, inputs = prepare("adalora", fresh(), SCHEDULE), batch()
    prepared.model.eval()
    output = prepared.model(**inputs)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, inputs["labels"]))
    for matrix in singular_values(prepared).values():
        nn.init.normal_(matrix)
    # PEFT's AdaLoRA adds it in its own forward, which the plain PeftModel around it passes by
    with_penalty = prepared.model.base_model(**inputs).loss
    expected = with_penalty - prepared.model(**inputs).loss
    torch.testing.assert_close(prepared.loss_term(1), expected)
    assert prepared.loss_term(SCHEDULE.total_steps).requires_grad and expected > 0.1


def test_the_page_long_loop_trains_what_needs_no_more_than_an_allocator():
    rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(6)]
    collate = lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]}  # noqa: E731
    evaluate = lambda model: {"metric": 0.0, "collapsed": False}  # noqa: E731
    for method in ("drlora", "lora", "dora-wd", "bitfit", "prune-once"):
        prepared = prepare(method, fresh(), SCHEDULE)
        record = train(prepared.model, rows, collate, evaluate, SCHEDULE, prepared.allocator,
                       learning_rate=1e-2, batch_size=6)  # fmt: skip
        assert record["loss_curve"][-1] < record["loss_curve"][0]
