"""Where adapters go, what is trained, what is counted, and folding them away."""

import pytest
import torch
from conftest import TINY, TINY_LLAMA, randomised
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from drlora_ref import (
    BudgetSchedule,
    RankAllocator,
    count_parameters,
    default_target_modules,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
    merge_adapters,
)
from drlora_ref.inject import matrix_label

BART = dict(
    vocab_size=50,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=40,
)


@pytest.mark.parametrize("config", [RobertaConfig, BertConfig, MPNetConfig])
def test_all_six_matrices_of_every_layer_are_adapted_and_the_head_never(config):
    model = AutoModelForSequenceClassification.from_config(config(vocab_size=50, **TINY))
    inject_adapters(model, r=3)
    names = list(dynamic_layers(model))
    assert len(names) == 2 * 6
    assert all(".layer." in name for name in names)
    linear = [n for n, m in model.named_modules() if type(m) is nn.Linear and "base_layer" not in n]
    assert linear and all("classifier" in n or "pooler" in n for n in linear)


DECODERS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", DECODERS)
def test_all_seven_matrices_of_a_decoder_are_adapted_and_pruned_whatever_their_shapes(config, tied):
    """Two query heads share one of key and value: Wk and Wv are half as tall as Wq."""
    sizes = dict(head_dim=4) if "head_dim" in vars(config()) else {}
    model = AutoModelForCausalLM.from_config(
        config(**TINY_LLAMA, **sizes, tie_word_embeddings=tied)
    )
    mark_only_adapters_trainable(inject_adapters(model, r=3))
    layers = dynamic_layers(model)
    labels = [matrix_label(name) for name in layers]
    assert labels == 2 * ["Wq", "Wk", "Wv", "Wo", "Wg", "Wf1", "Wf2"]
    heights = dict(zip(labels, (len(layer.lora_B) for layer in layers.values()), strict=False))
    assert heights["Wk"] == heights["Wv"] == heights["Wq"] // 2
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "lora_c"
    }  # fmt: skip
    ids = torch.randint(3, 50, (2, 6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = RankAllocator(model, BudgetSchedule(3, 2, 4, tinit=0, tfinal=1, deltaT=1))
    for step in range(1, 5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    assert sum(allocator.rank_pattern().values()) == 2 * 14
    before = model.eval()(ids).logits
    torch.testing.assert_close(merge_adapters(model)(ids).logits, before, atol=1e-5, rtol=1e-4)


TIED = [
    (["lm_head"], ValueError, "lm_head has its weight in common with model.embed_tokens.weight"),
    (["q_proj", "lm_head"], ValueError, "lm_head has its weight in common with"),
    (["embed_tokens"], TypeError, r"model.embed_tokens is \w*Embedding; only nn.Linear"),
]


@pytest.mark.parametrize("config", DECODERS[::2])
@pytest.mark.parametrize("targets, error, message", TIED)
def test_tied_embeddings_of_a_decoder_are_no_target(targets, error, message, config):
    model = AutoModelForCausalLM.from_config(config(**TINY_LLAMA, tie_word_embeddings=True))
    with pytest.raises(error, match=message):
        inject_adapters(model, targets, r=2)
    assert not dynamic_layers(model)
    if "lm_head" in targets:
        untied = AutoModelForCausalLM.from_config(config(**TINY_LLAMA, tie_word_embeddings=False))
        assert "lm_head" in dynamic_layers(inject_adapters(untied, targets, r=2))


@pytest.mark.parametrize("cross_attention, per_decoder_layer", [(False, 6), (True, 10)])
def test_bart_is_adapted_with_or_without_cross_attention(cross_attention, per_decoder_layer):
    model = BartForConditionalGeneration(BartConfig(**BART))
    inject_adapters(model, default_target_modules(model, cross_attention), r=2)
    names = list(dynamic_layers(model))
    assert sum("encoder.layers" in n for n in names) == 2 * 6
    assert sum("decoder.layers" in n for n in names) == 2 * per_decoder_layer


@pytest.mark.parametrize("rank, millions", [(2, 0.33), (8, 1.33)])
def test_uniform_ranks_on_roberta_base_count_as_the_papers_lora(rank, millions):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(RobertaConfig())
    count = 12 * rank * (4 * 1536 + 2 * 3840)
    assert count == rank * 165_888
    inject_adapters(model, r=rank)
    # the mask lies on the meta device too: it holds no values to sum, so give it some
    for layer in dynamic_layers(model).values():
        layer.component_mask = torch.ones(rank, dtype=torch.bool)
    mark_only_adapters_trainable(model)
    assert count_parameters(model)["adapter"] == count
    assert round(count / 1e6, 2) == millions


def test_bart_base_without_cross_attention_counts_as_table_4():
    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig(d_model=768, encoder_layers=6,
            decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072))  # fmt: skip
    inject_adapters(model, r=2)
    count = sum(m.lora_A.numel() + m.lora_B.numel() for m in dynamic_layers(model).values())
    assert round(count / 1e6, 2) == 0.33 and round(4 * count / 1e6, 2) == 1.33


def test_only_adapters_and_head_train(tiny_roberta):
    model = mark_only_adapters_trainable(inject_adapters(tiny_roberta, r=3))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("classifier.") for n in trained)
    assert sum("lora_" in n for n in trained) == 12 * 3
    assert sum(n.startswith("classifier.") for n in trained) == 4


def test_berts_pooler_trains_and_counts_as_head():
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=50, **TINY))
    mark_only_adapters_trainable(inject_adapters(model, r=3))
    assert count_parameters(model)["head"] == (16 * 16 + 16) + (16 * 2 + 2)


def test_only_surviving_components_are_counted(tiny_roberta):
    model = mark_only_adapters_trainable(inject_adapters(tiny_roberta, r=3))
    attention, feed_forward = 16 + 16, 16 + 32
    full = 2 * 3 * (4 * attention + 2 * feed_forward)
    assert count_parameters(model)["adapter"] == full
    model.roberta.encoder.layer[0].attention.self.query.component_mask[:] = False
    assert count_parameters(model)["adapter"] == full - 3 * attention


def test_peft_lora_is_counted_alike(tiny_roberta):
    from peft import LoraConfig, TaskType, get_peft_model

    targets = default_target_modules(tiny_roberta)
    peft_model = get_peft_model(
        tiny_roberta, LoraConfig(r=2, target_modules=targets, task_type=TaskType.SEQ_CLS)
    )
    counts = count_parameters(peft_model)
    assert counts["adapter"] == 2 * 2 * (4 * 32 + 2 * 48)
    assert counts["head"] == (16 * 16 + 16) + (16 * 2 + 2)


def test_merged_model_gives_the_same_outputs_and_is_plain(tiny_roberta):
    model = inject_adapters(tiny_roberta, r=3).eval()
    for layer in dynamic_layers(model).values():
        randomised(layer)
        layer.component_mask[0] = False
        layer.lora_c.data[0] = 0
    tokens = torch.randint(3, 50, (4, 12))
    expected = model(tokens).logits
    assert merge_adapters(model) is model and not dynamic_layers(model)
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)


def test_merging_a_bare_layer_returns_a_linear():
    from drlora_ref import DynamicLoRALinear

    assert type(merge_adapters(DynamicLoRALinear(nn.Linear(3, 3), r=1))) is nn.Linear


def test_a_target_that_matches_nothing_is_named_with_near_names(tiny_roberta):
    with pytest.raises(ValueError, match=r"'querry' matches no module .* near name: query"):
        inject_adapters(tiny_roberta, ["querry", "key"])
    assert not dynamic_layers(tiny_roberta)  # nothing was changed


def test_a_target_in_the_head_matches_nothing(tiny_roberta):
    with pytest.raises(ValueError, match="'out_proj' matches no module outside the head"):
        inject_adapters(tiny_roberta, ["out_proj"])


def test_a_target_that_is_not_linear_is_refused(tiny_roberta):
    with pytest.raises(TypeError, match=r"word_embeddings is Embedding; only nn.Linear"):
        inject_adapters(tiny_roberta, ["query", "word_embeddings"])
    assert not dynamic_layers(tiny_roberta)


def test_adapting_twice_is_refused(tiny_roberta):
    inject_adapters(tiny_roberta, r=2)
    with pytest.raises(TypeError, match=r"is DynamicLoRALinear; only nn.Linear"):
        inject_adapters(tiny_roberta, r=2)


def test_an_impossible_rank_changes_nothing(tiny_roberta):
    with pytest.raises(ValueError, match="r = 0"):
        inject_adapters(tiny_roberta, r=0)
    assert not dynamic_layers(tiny_roberta)


def test_a_model_without_default_targets_is_refused_by_its_kind():
    with pytest.raises(ValueError, match=r"no default target_modules for 'Linear' .*roberta, bert"):
        inject_adapters(nn.Linear(2, 2))


def test_quantised_weights_are_refused_before_anything_is_changed():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    whole = model["key"].weight.detach().to(torch.int8)
    model["key"].weight = nn.Parameter(whole, requires_grad=False)
    with pytest.raises(TypeError, match=r"key is Linear with a weight of torch\.int8; quantised"):
        inject_adapters(model, ["query", "key"], r=2)
    assert type(model["query"]) is nn.Linear


@pytest.mark.parametrize(
    "given, matched",
    [
        ("query", 2),
        (("query", "key"), 4),
        ({"query"}, 2),
        ((name for name in ["query", "key"]), 4),
        (dict.fromkeys(["query"]), 2),
        (None, 12),
    ],
)
def test_targets_may_come_in_any_form(given, matched, tiny_roberta):
    assert len(dynamic_layers(inject_adapters(tiny_roberta, given, r=2))) == matched


@pytest.mark.parametrize("given", [[], (), set(), iter([]), (name for name in [])])
def test_no_targets_at_all_are_refused(given, tiny_roberta):
    """They do not mean the default ones."""
    with pytest.raises(ValueError, match="target_modules is empty: name linear layers, or leave"):
        inject_adapters(tiny_roberta, given, r=2)
    assert not dynamic_layers(tiny_roberta)


@pytest.mark.parametrize("lora_alpha", [0, 0.0, -1, float("nan"), float("inf")])
def test_an_impossible_alpha_changes_nothing(lora_alpha, tiny_roberta):
    with pytest.raises(ValueError, match=r"lora_alpha = .*: must be above 0"):
        inject_adapters(tiny_roberta, r=2, lora_alpha=lora_alpha)
    assert not dynamic_layers(tiny_roberta)
    assert all(p.requires_grad for p in tiny_roberta.parameters())


class Shared(nn.Module):
    """Two modules with one weight: an output layer tied to the embedding, or a layer used twice."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.query, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "twice":
            self.query = self.head


@pytest.mark.parametrize("kind, other", [("tied", "embed.weight"), ("twice", "head.weight")])
def test_a_weight_that_is_another_modules_too_is_refused(kind, other):
    target = "head" if kind == "tied" else "query"
    with pytest.raises(ValueError, match=f"{target} has its weight in common with {other}: merged"):
        inject_adapters(Shared(kind), [target], r=2)
    assert list(dynamic_layers(inject_adapters(Shared("none"), [target], r=2))) == [target]


def test_a_compiled_model_is_adapted_trained_and_merged_under_its_own_names(tiny_roberta):
    model = torch.compile(tiny_roberta, backend="eager")
    mark_only_adapters_trainable(inject_adapters(model, ["query"], r=2))
    assert next(iter(dynamic_layers(model))) == "roberta.encoder.layer.0.attention.self.query"
    assert count_parameters(model) == count_parameters(tiny_roberta)
    assert count_parameters(model)["head"] == (16 * 16 + 16) + (16 * 2 + 2)
    assert not dynamic_layers(merge_adapters(model))


def test_model_code_that_reads_weights_runs():
    """T5 asks for the type of one before it calls it."""
    ids = torch.randint(3, 50, (2, 6))
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                      decoder_start_token_id=0)  # fmt: skip
    model = inject_adapters(T5ForConditionalGeneration(config), ["q", "wi", "wo"], r=2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.lora_c.grad.any() for layer in dynamic_layers(model).values())
