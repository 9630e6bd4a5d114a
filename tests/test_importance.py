"""Eq. 7-8, in float64 at random points, against what the equations say literally."""

import itertools

import pytest
import torch
from conftest import random_components, random_extras
from hypothesis import given
from hypothesis import strategies as st

from drlora_ref import (
    SCORES,
    component_norms,
    ema_update,
    importance_scores,
    loss_sensitivity,
    output_norms,
    update_norm,
)


def materialised(A, B, c):
    """The r components as matrices: (..., r, d_out, d_in)."""
    return torch.einsum("...r,...or,...ri->...roi", c, B, A)


def test_component_norm_equals_norm_of_materialised_component():
    A, B, c = random_components()
    torch.testing.assert_close(
        component_norms(A, B, c), torch.linalg.matrix_norm(materialised(A, B, c))
    )


def test_update_norm_equals_norm_of_materialised_update():
    A, B, c = random_components()
    torch.testing.assert_close(
        update_norm(A, B, c), torch.linalg.matrix_norm(materialised(A, B, c).sum(-3))
    )


def test_score_equals_eq_7_on_materialised_matrices():
    A, B, c = random_components()
    parts = materialised(A, B, c)
    expected = torch.linalg.matrix_norm(parts) / torch.linalg.matrix_norm(parts.sum(-3))
    torch.testing.assert_close(importance_scores(A, B, c), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", sorted(SCORES.keys() - {"random"}))
def test_stacked_layers_score_as_each_alone(name):
    A, B, c = random_components(2, 3)
    seen = random_extras(SCORES[name], c)
    alone = [
        SCORES[name](A[i, j], B[i, j], c[i, j], **{name: own[i, j] for name, own in seen.items()})
        for i in range(2)
        for j in range(3)
    ]
    torch.testing.assert_close(SCORES[name](A, B, c, **seen), torch.stack(alone).view(2, 3, -1))


def test_squared_scores_sum_to_one_when_components_are_orthogonal():
    A, B, c = random_components(r=5)
    A = torch.linalg.qr(A.mT).Q.mT  # orthonormal rows are enough: ⟨aᵢ, aⱼ⟩ = 0 for i ≠ j
    total = importance_scores(A, B, c).square().sum()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-7, atol=0)
    assert importance_scores(A, B, c).sum() > 1.01


def test_cancelling_components_score_above_one():
    A, B, _ = random_components(r=2)
    A[1], B[:, 1] = A[0], B[:, 0]
    scores = importance_scores(A, B, torch.tensor([1.0, -0.9], dtype=torch.float64))
    expected = torch.tensor([10.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_zero_update_scores_zero():
    A, B, c = random_components()
    assert importance_scores(A, B, torch.zeros_like(c)).tolist() == [0.0] * 5


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_layers_last_component_scores_one_whatever_its_size(size):
    A, B, _ = random_components()
    c = torch.zeros(5, dtype=torch.float64)
    c[2] = size
    score = importance_scores(A, B, c)
    assert score[2].item() == pytest.approx(1, rel=1e-4) and score.sum() == score[2]


def test_share_ignores_the_layers_scale_and_the_norm_does_not():
    A, B, c = random_components()
    torch.testing.assert_close(
        importance_scores(A, B, 10 * c), importance_scores(A, B, c), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(component_norms(A, B, 10 * c), 10 * component_norms(A, B, c))


def test_abs_c_depends_on_the_factorisation_and_eq_7_does_not():
    A, B, c = random_components()
    A2, c2 = A.clone(), c.clone()
    A2[0], c2[0] = 2 * A[0], c[0] / 2  # the same component, written differently
    torch.testing.assert_close(importance_scores(A2, B, c2), importance_scores(A, B, c))
    assert SCORES["abs_c"](A2, B, c2)[0] == SCORES["abs_c"](A, B, c)[0] / 2


def mean_z_square(A, x):
    return (x @ A.mT).square().mean(dim=-2)


def test_output_norm_is_the_root_mean_square_of_the_materialised_answers():
    A, B, c = random_components()
    x = torch.randn(20, 7, dtype=torch.float64)
    answers = torch.einsum("roi,ni->rno", materialised(A, B, c), x)
    expected = answers.square().sum(dim=-1).mean(dim=-1).sqrt()
    found = output_norms(A, B, c, z_square=mean_z_square(A, x))
    torch.testing.assert_close(found, expected)


def test_for_white_inputs_the_output_norm_is_the_norm_of_the_weights():
    A, B, c = random_components()
    x = torch.linalg.qr(torch.randn(20, 7, dtype=torch.float64)).Q * 20**0.5  # xᵀx / 20 = I
    found = output_norms(A, B, c, z_square=mean_z_square(A, x))
    torch.testing.assert_close(found, component_norms(A, B, c))
    stretched = x * torch.logspace(-1, 1, 7)
    other = output_norms(A, B, c, z_square=mean_z_square(A, stretched))
    assert not torch.allclose(other, component_norms(A, B, c), rtol=0.1)


def test_output_norm_ignores_the_units_of_the_inputs_and_the_norm_does_not():
    A, B, c = random_components()
    x = torch.randn(20, 7, dtype=torch.float64)
    here = output_norms(A, B, c, z_square=mean_z_square(A, x))
    there = output_norms(A / 10, B, c, z_square=mean_z_square(A / 10, 10 * x))
    torch.testing.assert_close(here, there)
    torch.testing.assert_close(component_norms(A / 10, B, c), component_norms(A, B, c) / 10)


def test_dropout_adds_the_square_of_each_weight_to_the_mean_square():
    A, _, _ = random_components(r=2, d_in=3)
    x = torch.randn(4, 3, dtype=torch.float64)
    p = 0.25
    keep = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    chance = ((1 - p) * keep + p * (1 - keep)).prod(dim=1)
    dropped = x * keep.unsqueeze(1) / (1 - p)  # every way to drop: (8, 4, 3)
    exact = (mean_z_square(A, dropped) * chance.unsqueeze(1)).sum(dim=0)
    added = p / (1 - p) * A.square() @ x.square().mean(dim=0)
    torch.testing.assert_close(exact, mean_z_square(A, x) + added)


def test_loss_sensitivity_is_the_measured_change_of_the_loss_for_small_c():
    A, B, c = random_components()
    x, y = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)

    def loss(c):
        return ((x @ A.mT * c) @ B.mT - y).sin().square().mean()

    c = (1e-5 * c).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(c), c)
    without = torch.stack([loss(c * (torch.arange(5) != i)) for i in range(5)])
    found = loss_sensitivity(A, B, c, c_grad=gradient)
    torch.testing.assert_close(found, (without - loss(c)).abs(), rtol=1e-2, atol=0)


def test_at_a_minimum_the_first_order_sees_nothing_and_the_loss_would_rise():
    A, B, c = random_components()
    x = torch.randn(20, 7, dtype=torch.float64)
    y = ((x @ A.mT * c) @ B.mT).detach()

    def loss(c):
        return ((x @ A.mT * c) @ B.mT - y).square().mean()

    c.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(c), c)
    assert loss_sensitivity(A, B, c, c_grad=gradient).max() < 1e-12
    assert min(loss(c * (torch.arange(5) != i)) for i in range(5)) > 1e-3


def test_float32_scores_of_a_large_layer_agree_with_float64():
    A, B, c = random_components(r=12, d_in=768, d_out=3072)
    exact = importance_scores(A, B, c)
    in_float32 = importance_scores(A.float(), B.float(), c.float())
    torch.testing.assert_close(in_float32.double(), exact, rtol=1e-5, atol=0)


def test_nearly_annulled_update_never_gives_nan():
    A, B, _ = random_components(r=2)
    A[1], B[:, 1] = A[0], B[:, 0]
    A, B = A.float(), B.float()
    for gap in (1e-3, 1e-5, 1e-7, 0.0):
        assert importance_scores(A, B, torch.tensor([1.0, gap - 1.0])).isfinite().all()


@given(beta=st.floats(0, 0.999), values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_ema_equals_the_weighted_sum_of_the_past(beta, values):
    smoothed = torch.zeros((), dtype=torch.float64)
    for value in values:
        smoothed = ema_update(smoothed, torch.tensor(value, dtype=torch.float64), beta)
    age = range(len(values) - 1, -1, -1)
    expected = sum((1 - beta) * beta**k * v for k, v in zip(age, values, strict=True))
    assert smoothed.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, float("nan")])
def test_ema_refuses_a_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=r"beta = .*at least 0 and less than 1"):
        ema_update(torch.zeros(2), torch.ones(2), beta)
