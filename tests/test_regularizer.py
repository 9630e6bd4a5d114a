"""Eq. 10, DEM."""

import pytest
import torch
from conftest import layers_of_two_shapes, random_components
from torch import nn

from drlora_ref import DynamicLoRALinear, dem_loss, dem_penalty, dynamic_layers


def test_dem_equals_eq_10_term_by_term():
    A, B, _ = random_components()
    total = sum(A[i].var() + B[:, i].var() for i in range(5))  # torch.var is the unbiased one
    torch.testing.assert_close(dem_penalty(A, B), total / 5)


def test_dem_loss_averages_over_all_components_of_layers_of_several_shapes():
    model = layers_of_two_shapes()
    terms = [
        m.lora_A[i].var() + m.lora_B[:, i].var()
        for m in dynamic_layers(model).values()
        for i in range(3)
    ]
    torch.testing.assert_close(dem_loss(model), torch.stack(terms).mean())


def test_dem_loss_weighs_every_component_alike_when_ranks_differ():
    layers = [DynamicLoRALinear(nn.Linear(4, 4), r) for r in (1, 3)]
    terms = [m.lora_A[i].var() + m.lora_B[:, i].var() for m in layers for i in range(len(m.lora_A))]
    torch.testing.assert_close(dem_loss(nn.Sequential(*layers)), torch.stack(terms).mean())


def test_gradient_is_the_deviation_from_the_mean():
    A, B, _ = random_components()
    A.requires_grad_()
    dem_penalty(A, B).backward()
    expected = 2 * (A - A.mean(-1, keepdim=True)).detach() / (5 * (7 - 1))
    torch.testing.assert_close(A.grad, expected)


def test_an_even_vector_costs_nothing_whatever_its_length():
    A, B = torch.full((2, 4), 9.0), torch.full((6, 2), -3.0)
    assert dem_penalty(A, B) == 0


def test_dem_does_not_touch_c():
    model = layers_of_two_shapes()
    dem_loss(model).backward()
    for layer in dynamic_layers(model).values():
        assert layer.lora_A.grad.abs().min() > 0 and layer.lora_B.grad.abs().min() > 0
        assert layer.lora_c.grad is None or not layer.lora_c.grad.any()


def test_a_vector_of_one_element_has_no_variance():
    with pytest.raises(ValueError, match="fewer than two elements"):
        dem_penalty(torch.ones(2, 1), torch.ones(4, 2))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="call inject_adapters first"):
        dem_loss(nn.Linear(2, 2))


@pytest.mark.parametrize("d_in, d_out", [(1, 4), (4, 1), (1, 1)])
def test_a_layer_whose_vectors_are_single_numbers_is_named(d_in, d_out):
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "gate": nn.Linear(d_in, d_out)})
    for name, linear in model.items():
        model[name] = DynamicLoRALinear(linear, r=2)
    with pytest.raises(ValueError, match=f"gate has {d_in} inputs and {d_out} outputs, and DEM"):
        dem_loss(model)
