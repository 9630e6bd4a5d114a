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

"""How much each rank-1 component matters, and the average of it over steps."""

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from .precision import at_least_float32


def component_norms(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor) -> Tensor:
    """Frobenius norm of each rank-1 component, the numerator of Eq. 7.

        ‖ΔWᵢ‖_F = ‖cᵢ bᵢaᵢᵀ‖_F = |cᵢ| ‖bᵢ‖₂ ‖aᵢ‖₂

    An identity: the entries of b aᵀ are bⱼaₖ, so their squares sum to ‖b‖²‖a‖². No matrix of
    d_out × d_in is built.

    As a score of its own it is the rival that Eq. 7 argues against: it compares components across
    layers by absolute size, without asking what share of its layer's update each one carries.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r), lora_c (..., r) -> (..., r)
    """
    return lora_c.abs() * lora_A.norm(dim=-1) * lora_B.norm(dim=-2)


def update_norm(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor) -> Tensor:
    """Frobenius norm of a layer's whole update, the denominator of Eq. 7.

        ‖ΔW‖²_F = Σᵢⱼ cᵢcⱼ ⟨bᵢ, bⱼ⟩ ⟨aᵢ, aⱼ⟩ = cᵀ [(BᵀB) ∘ (AAᵀ)] c

    Two Gram matrices of r × r instead of one update of d_out × d_in.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r), lora_c (..., r) -> (...)

    Read with care: the sum cancels. With x = ‖ΔW‖ / (norm of a component), its relative error in
    float32 is about 6e-8 / x²: a thousandth at x = 0.01, nothing but noise (cut off at zero) below
    x ≈ 3e-4. A materialised update keeps 1e-7 down to x ≈ 1e-3. Random and trained components lie
    above x = 1.
    """
    gram = (lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)  # (..., r, r)
    squared = torch.einsum("...i,...ij,...j->...", lora_c, gram, lora_c)
    return squared.clamp(min=0).sqrt()


def importance_scores(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor, eps: float = 1e-8) -> Tensor:
    """Share of a layer's update carried by each rank-1 component (Eq. 7).

        ΔW = Σᵢ cᵢ bᵢaᵢᵀ                             the update: r rank-1 matrices, summed
        sᵢ = ‖cᵢ bᵢaᵢᵀ‖_F / (‖ΔW‖_F + ε)             what the paper defines
           = |cᵢ| ‖bᵢ‖₂ ‖aᵢ‖₂ / (‖ΔW‖_F + ε)          what we compute

    Nothing of the size of the weight is built, which spares the (r, d_out, d_in) stack of
    components: 113 MB for one RoBERTa-base feed-forward weight at r = 12.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r), lora_c (..., r) -> (..., r)

    Choice: ε = 1e-8 and no scaling, as in the authors' code (a constant factor would cancel). In
    half precision, where ε would be 0, it computes in float32.

    Read with care: scores need not sum to 1 (for orthogonal components their *squares* do), and
    two components that cancel each other can both score above 1. A component that is alone in its
    layer scores 1 whatever its size.
    """
    lora_A, lora_B, lora_c = map(at_least_float32, (lora_A, lora_B, lora_c))
    norms = component_norms(lora_A, lora_B, lora_c)
    return norms / (update_norm(lora_A, lora_B, lora_c) + eps).unsqueeze(-1)


def abs_c(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor) -> Tensor:
    """|cᵢ| alone: what a criterion on singular values only, like AdaLoRA's, comes down to.

    AdaLoRA keeps its vectors near unit length by a regulariser; here nothing does, so |c| ignores
    how long aᵢ and bᵢ are. That is the paper's argument for Eq. 7. Shapes: as Eq. 7 -> (..., r)
    """
    return lora_c.abs()


def output_norms(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor, *, z_square: Tensor) -> Tensor:
    """Size of what each component adds to its layer's answers: damage in answers, not in weights.

        zᵢ = aᵢᵀx
        E‖cᵢ bᵢaᵢᵀx‖² = cᵢ² ‖bᵢ‖² E(zᵢ²)
        sᵢ = |cᵢ| ‖bᵢ‖₂ √E(zᵢ²)                      component_norms has ‖aᵢ‖₂ in the last place

    An identity again: the answer is the vector bᵢ times the number cᵢzᵢ. The forward pass has
    computed z, so no second pass is needed. Where E xxᵀ = I, E(zᵢ²) = ‖aᵢ‖², and the score is
    component_norms; where a layer's inputs are long, or lie along aᵢ, it counts more.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r), lora_c (..., r), z_square (..., r), the
    mean of zᵢ² over the rows of the last step (ZWatch keeps it) -> (..., r)

    Read with care: z is of the input after dropout, as the layer saw it. With dropout of p the
    mean square grows by p / (1-p) · Σₖ aᵢₖ² E(xₖ²). What becomes of an answer further up is not
    asked: a layer that nobody listens to scores as high as any other.
    """
    return lora_c.abs() * lora_B.norm(dim=-2) * z_square.sqrt()


def loss_sensitivity(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor, *, c_grad: Tensor) -> Tensor:
    """How much the loss would change without each component, to first order: damage in the loss.

        L(cᵢ = 0) - L ≈ -cᵢ ∂L/∂cᵢ
        sᵢ = |cᵢ ∂L/∂cᵢ|

    The backward pass has computed ∂L/∂c. The sign is dropped, so that a component counts if the
    loss depends on it either way.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r), lora_c (..., r), c_grad (..., r), the
    gradient of the last step's loss -> (..., r)

    Read with care: at a minimum the gradient is zero, however much would break. What is left there
    is the noise of the batch. The gradient is that of the loss before the optimizer's step, with
    Eq. 10 in it or not (DEM does not depend on c), and after clipping. Clipping scales all
    gradients of a step alike: it changes no order within a step, but a clipped step counts less
    in the average of Eq. 8 than its own gradient would.
    """
    return (lora_c * c_grad).abs()


def random_scores(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on [0, 1), the control that any criterion must beat. Shapes: as Eq. 7 -> (..., r)

    Drawn on the CPU, so that every device and every process draws the same.
    """
    return torch.rand(lora_c.shape, generator=generator, dtype=lora_c.dtype).to(lora_c.device)


# The paper's criterion and its rivals, by the names that `score=` takes. What a score needs beyond
# the components it asks for by name: z_square, c_grad. RankAllocator looks and brings it.
SCORES: dict[str, Callable[..., Tensor]] = {
    "frobenius_share": importance_scores,
    "frobenius_norm": component_norms,
    "abs_c": abs_c,
    "output_norm": output_norms,
    "loss_sensitivity": loss_sensitivity,
    "random": random_scores,
}


def ema_update(previous: Tensor, current: Tensor, beta: float = 0.9) -> Tensor:
    """Smoothed score: an exponential moving average (Eq. 8).

        s̃(t) = β s̃(t-1) + (1-β) s(t),   s̃(0) = 0

    One mini-batch is a noisy witness; β = 0.9 remembers about 1 / (1-β) = 10 steps.

    Shapes: any two that broadcast. Half precision becomes float32: in bfloat16 the average of ones
    at β = 0.999 would stick at 0.5. Raises ValueError unless 0 ≤ beta < 1.

    Choice: no correction of the start (Adam has one). After t steps of a constant score s the
    average is (1 - βᵗ) s: the same factor for all components, so their order is right from step 1.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta = {beta}: must be at least 0 and less than 1")
    return beta * at_least_float32(previous) + (1 - beta) * at_least_float32(current)


def check_scoring(score: str | Callable, beta: float) -> None:
    """Raise ValueError for a score that is no name and no function, or a beta outside [0, 1)."""
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score = {score!r}: must be one of {', '.join(SCORES)}")
    if not isinstance(score, str) and not callable(score):
        raise ValueError(f"score = {score!r}: must be a function or one of {', '.join(SCORES)}")
    if not isinstance(beta, Real) or not 0 <= beta < 1:
        raise ValueError(f"beta = {beta!r}: must be at least 0 and less than 1")
