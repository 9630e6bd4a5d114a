"""Eq. 5-6: the adapted layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised
from torch import nn

from drlora_ref import DynamicLoRALinear, dynamic_layers, inject_adapters


def layer(**given) -> DynamicLoRALinear:
    base = nn.Linear(7, 9, dtype=torch.float64)
    return DynamicLoRALinear(base, r=4, **{"lora_dropout": 0.0, **given})


def test_output_equals_eq_6_summed_component_by_component():
    adapted, x = randomised(layer()), torch.randn(2, 3, 7, dtype=torch.float64)
    W = adapted.base_layer.weight.clone()
    for i in range(4):
        component = torch.outer(adapted.lora_B[:, i], adapted.lora_A[i])
        W = W + adapted.scaling * adapted.lora_c[i] * component
    torch.testing.assert_close(adapted(x), F.linear(x, W, adapted.base_layer.bias))


def test_a_fresh_layer_is_the_base_layer():
    adapted, x = layer(), torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(adapted(x), adapted.base_layer(x))


def test_at_the_first_step_only_c_has_a_gradient_and_at_the_second_all_three():
    adapted, x = layer(), torch.randn(3, 7, dtype=torch.float64)
    adapted(x).square().sum().backward()
    assert adapted.lora_c.grad.abs().min() > 0
    assert not adapted.lora_A.grad.any() and not adapted.lora_B.grad.any()
    with torch.no_grad():
        adapted.lora_c -= 0.1 * adapted.lora_c.grad
    adapted(x).square().sum().backward()
    assert adapted.lora_A.grad.abs().min() > 0 and adapted.lora_B.grad.abs().min() > 0


def test_the_base_layer_is_frozen():
    assert [n for n, p in layer().named_parameters() if p.requires_grad] == [
        "lora_A",
        "lora_B",
        "lora_c",
    ]


def test_both_matrices_start_uniform_within_the_kaiming_bound():
    adapted = DynamicLoRALinear(nn.Linear(300, 200), r=3)
    for tensor, fan_in in ((adapted.lora_A, 300), (adapted.lora_B, 3)):
        bound = (6 / fan_in) ** 0.5
        assert 0.98 * bound < tensor.abs().max().item() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_scaling_stays_lora_alpha_over_the_initial_rank_when_components_go():
    adapted = layer(lora_alpha=6)
    adapted.component_mask[:3] = False
    assert (adapted.scaling, adapted.rank) == (1.5, 1)


def test_rank_and_delta_weight_go_by_the_mask_not_by_c():
    adapted = randomised(layer())
    adapted.component_mask[1] = False
    without = copy.deepcopy(adapted)
    without.lora_c.data[1] = 0
    assert adapted.rank == 3 and adapted.lora_c[1] != 0
    torch.testing.assert_close(adapted.delta_weight(), without.delta_weight())


def test_merged_layer_is_an_ordinary_linear_with_equal_outputs():
    adapted, x = randomised(layer().float()), torch.randn(5, 7)
    adapted.component_mask[2] = False
    adapted.lora_c.data[2] = 0
    before = adapted.base_layer.weight.clone()
    merged = adapted.merge()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), adapted(x), atol=1e-5, rtol=0)
    assert torch.equal(adapted.base_layer.weight, before)  # merging twice gives the same


def test_dropout_acts_on_the_adapters_input_in_training_only():
    adapted, x = randomised(layer(lora_dropout=0.5)), torch.randn(5, 7, dtype=torch.float64)
    assert not torch.equal(adapted(x), adapted(x))
    adapted.lora_c.data.zero_()
    assert torch.equal(adapted(x), adapted.base_layer(x))
    randomised(adapted.eval())
    assert torch.equal(adapted(x), adapted(x))


def test_half_precision_base_keeps_float32_adapters():
    adapted = randomised(DynamicLoRALinear(nn.Linear(7, 9, dtype=torch.bfloat16), r=2))
    assert adapted.lora_A.dtype == torch.float32
    assert adapted(torch.randn(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "base, given, error, message",
    [
        (nn.Embedding(3, 4), dict(r=2), TypeError, "only nn.Linear can be adapted, not Embedding"),
        (nn.Linear(3, 4), dict(r=0), ValueError, "r = 0: a layer needs at least one component"),
        (nn.Linear(3, 4), dict(r=2, lora_dropout=1.0), ValueError, "lora_dropout = 1.0"),
        (nn.Linear(3, 4), dict(r=2, lora_alpha=0), ValueError, "lora_alpha = 0: must be above 0"),
        (nn.Linear(3, 4), dict(r=2, lora_alpha=-8), ValueError, "lora_alpha = -8"),
        (nn.Linear(3, 4), dict(r=2, lora_alpha=float("nan")), ValueError, "lora_alpha = nan"),
        (nn.Linear(3, 4), dict(r=2, lora_alpha=float("inf")), ValueError, "lora_alpha = inf"),
    ],
)
def test_impossible_layers_are_refused(base, given, error, message):
    with pytest.raises(error, match=message):
        DynamicLoRALinear(base, **given)


@pytest.mark.parametrize("bias", [True, False])
def test_to_who_reads_it_a_wrapped_layer_is_a_linear_layer(bias):
    base = nn.Linear(7, 9, bias=bias, dtype=torch.float64)
    adapted, x = randomised(DynamicLoRALinear(base, r=4)), torch.randn(5, 7, dtype=torch.float64)
    assert (adapted.in_features, adapted.out_features) == (7, 9)
    assert adapted.bias is base.bias and adapted.weight is base.weight  # dropout needs the call
    adapted.component_mask[0] = False  # the forward pass goes by c all the same
    by_hand = F.linear(x, adapted.eval().weight, adapted.bias)
    torch.testing.assert_close(by_hand, adapted(x))
    by_hand.sum().backward()
    assert adapted.lora_c.grad.all()


class Fused(nn.Module):
    """A transformer encoder of torch, which in evaluation may read weights past its layers."""

    def __init__(self, padded: bool):
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.padding = torch.arange(5).expand(3, 5) > torch.tensor([[4], [3], [2]])
        self.padding = self.padding if padded else None

    def forward(self, x):
        out = self.encoder(x, src_key_padding_mask=self.padding)
        return (
            out[self.padding.logical_not()[:, : out.shape[1]]] if self.padding is not None else out
        )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", [["linear1"], ["linear1", "linear2"]])
def test_evaluation_in_a_fused_kernel_is_that_of_the_layers_one_by_one(targets, padded):
    model = inject_adapters(Fused(padded), targets, r=3, lora_dropout=0.0)
    for layer in dynamic_layers(model).values():
        randomised(layer)
    x = torch.randn(3, 5, 16)
    one_by_one = model.train()(x)
    with torch.no_grad():
        fused = model.eval()(x)
    torch.testing.assert_close(fused, one_by_one, atol=1e-5, rtol=1e-5)
    for layer in dynamic_layers(model).values():
        layer.lora_c.data.zero_()
    with torch.no_grad():
        assert not torch.allclose(model(x), fused, atol=1e-2)


def test_names_are_those_of_the_plain_model_whatever_wraps_it():
    model = inject_adapters(
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), "0", r=2
    )
    plain = list(dynamic_layers(model))
    assert plain == ["0", "1.0"]
    assert list(dynamic_layers(torch.compile(model, backend="eager"))) == plain
    assert list(dynamic_layers(nn.DataParallel(model))) == plain
    model[1] = torch.compile(model[1], backend="eager")  # a part of it
    assert list(dynamic_layers(model)) == plain
    assert list(dynamic_layers(torch.compile(nn.DataParallel(model), backend="eager"))) == plain
