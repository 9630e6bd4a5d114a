"""Where adapters go, what is trained, what is counted, and folding them away."""

import pytest
import torch
from conftest import TINY, randomised
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    MPNetConfig,
    RobertaConfig,
)

from drlora_ref import (
    count_parameters,
    default_target_modules,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
    merge_adapters,
)

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
