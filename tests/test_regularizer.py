"""Eq. 10, DEM, and its rivals."""

import pytest
import torch
from conftest import layers_of_two_shapes, random_components
from torch import nn

from drlora_ref import (
    PENALTIES,
    DynamicLoRALinear,
    dem_loss,
    dem_penalty,
    dynamic_layers,
    penalty_loss,
)


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


def test_l1_and_l2_average_the_elements_of_each_vector_term_by_term():
    A, B, _ = random_components()
    for name, size in (("l1", torch.abs), ("l2", torch.square)):
        total = sum(size(A[i]).mean() + size(B[:, i]).mean() for i in range(5))
        torch.testing.assert_close(PENALTIES[name](A, B), total / 5)


def test_l2_is_dem_for_vectors_whose_mean_is_zero():
    """Up to the d / (d - 1) of the unbiased variance; and a constant vector costs L2 alone."""
    A, B, _ = random_components()
    A, B = A - A.mean(dim=-1, keepdim=True), B - B.mean(dim=-2, keepdim=True)
    flat = torch.zeros_like(B)
    torch.testing.assert_close(PENALTIES["l2"](A, flat) * 7 / 6, dem_penalty(A, flat))
    torch.testing.assert_close(
        PENALTIES["l2"](A, B + 1) - PENALTIES["l2"](A, B), torch.tensor(1.0).double()
    )
    torch.testing.assert_close(dem_penalty(A, B + 1), dem_penalty(A, B))


def test_the_spectral_penalty_is_the_strongest_directions_part_of_l2():
    A, B, _ = random_components(4)
    parts = [torch.linalg.svdvals(M).square() / M[0].numel() for M in (A, B)]
    by_largest = sum(squares[:, 0] for squares in parts)
    torch.testing.assert_close(PENALTIES["spectral"](A, B), by_largest)
    torch.testing.assert_close(PENALTIES["l2"](A, B), sum(squares.sum(1) for squares in parts))
    assert (PENALTIES["spectral"](A, B) < PENALTIES["l2"](A, B)).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_takes_stacked_layers_and_falls_along_its_gradient(name):
    A, B, _ = random_components(3, 2)
    alone = [PENALTIES[name](A[i, j], B[i, j]) for i in range(3) for j in range(2)]
    torch.testing.assert_close(PENALTIES[name](A, B).flatten(), torch.stack(alone))
    (gradient,) = torch.autograd.grad(PENALTIES[name](A.requires_grad_(), B).sum(), A)
    assert (PENALTIES[name](A - 1e-3 * gradient, B) < PENALTIES[name](A, B)).all()


@pytest.mark.parametrize("name", PENALTIES)
def test_components_of_zeros_add_nothing_to_any_penalty_of_a_model(name):
    """A mean over n components, times n: so replicas may be padded, and ranks may differ."""
    A, B, _ = random_components(r=5)
    A, B = (torch.nn.functional.pad(M, p) for M, p in ((A, (0, 0, 0, 2)), (B, (0, 2))))
    A.requires_grad_()
    whole = PENALTIES[name](A, B) * 7
    torch.testing.assert_close(whole, PENALTIES[name](A[:5], B[:, :5]) * 5)
    (gradient,) = torch.autograd.grad(whole, A)
    assert not gradient[5:].any() and gradient[:5].any()


@pytest.mark.parametrize("name", PENALTIES)
def test_the_penalty_of_a_model_weighs_layers_by_their_components(name):
    layers = [DynamicLoRALinear(nn.Linear(4, 4), r) for r in (1, 3, 3)]
    terms = [PENALTIES[name](m.lora_A, m.lora_B) * len(m.lora_c) for m in layers]
    model = nn.Sequential(*layers)
    torch.testing.assert_close(penalty_loss(model, name), sum(terms) / 7)
    assert penalty_loss(model, PENALTIES[name]) == penalty_loss(model, name)
    assert (penalty_loss(model) == dem_loss(model)).all()


def test_an_unknown_penalty_is_named():
    with pytest.raises(ValueError, match="penalty = 'l3': must be one of dem, l1, l2, spectral"):
        penalty_loss(layers_of_two_shapes(), "l3")
