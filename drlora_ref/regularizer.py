"""Eq. 10: the Dimensional Equilibrium Modulator (DEM), which keeps a component's elements even."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from drlora_ref.layer import RankOneComponents, dynamic_layers, stack_by_shape


def dem_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean variance within the components of one layer (Eq. 10, one layer's part).

        R = (1/n) Σᵢ (Var(aᵢ) + Var(bᵢ))

    The paper's reason: a component that is near zero but for a few large elements has a small norm
    and is pruned early, and then those few dimensions change abruptly (notebook 07 examines it).

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r) -> (...)
    Raises ValueError if a vector has fewer than two elements: it has no variance.

    Choice: the unbiased variance, as in the authors' code; they take *half* of R. We do as printed.

    Read with care: the variance is taken *within* each vector, over its elements, never across
    components. It knows a vector's length and mean, nothing else: (d - 1) Var = ‖a‖² - d·mean². A
    constant vector of any length costs nothing; one of mean zero is shrunk as by weight decay.

    >>> import torch
    >>> spike, even = torch.tensor([[2.0, 0, 0, 0]]), torch.ones(1, 4)  # one norm, two shapes
    >>> dem_penalty(spike, even.T), dem_penalty(even, even.T)
    (tensor(1.), tensor(0.))
    """
    if lora_A.shape[-1] < 2 or lora_B.shape[-2] < 2:
        raise ValueError("a vector of fewer than two elements has no unbiased variance")
    return (lora_A.var(dim=-1) + lora_B.var(dim=-2)).mean(dim=-1)


def check_dem(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError naming a layer whose aᵢ or bᵢ is a single number: it has no variance.

    >>> check_dem({"query": RankOneComponents(4, 4, r=2)})
    """
    for name, layer in layers.items():
        d_in, d_out = layer.lora_A.shape[-1], layer.lora_B.shape[-2]
        if min(d_in, d_out) < 2:
            raise ValueError(
                f"{name} has {d_in} inputs and {d_out} outputs, and DEM (Eq. 10) is a variance "
                "over either: adapt it without DEM (dem_weight 0), or leave it out of the targets"
            )


def l1_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean size of an element of aᵢ plus that of bᵢ, over the components of one layer.

    A rival of DEM that the paper did not try. Shapes: as dem_penalty.

    >>> import torch
    >>> l1_penalty(torch.tensor([[2.0, 0, 0, 0]]), torch.ones(4, 1))  # 0.5 + 1
    tensor(1.5000)
    """
    return (lora_A.abs().mean(dim=-1) + lora_B.abs().mean(dim=-2)).mean(dim=-1)


def l2_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean square of an element of aᵢ plus that of bᵢ: DEM, had each vector a mean of zero.

    A rival of DEM that the paper did not try. Shapes: as dem_penalty.

    >>> import torch
    >>> l2_penalty(torch.tensor([[2.0, 0, 0, 0]]), torch.ones(4, 1))  # 4 / 4 + 1
    tensor(2.)
    """
    return (lora_A.square().mean(dim=-1) + lora_B.square().mean(dim=-2)).mean(dim=-1)


def spectral_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The part of l2_penalty that belongs to the strongest direction of each matrix.

        σ₁(lora_A)² / (r · d_in) + σ₁(lora_B)² / (r · d_out)

    L2 sums the squares of *all* singular values (‖A‖_F² = Σⱼ σⱼ²), this takes the largest alone
    (Yoshida and Miyato, 1705.10941). A rival of DEM that the paper did not try. The σ₁² is the
    largest eigenvalue of an r × r Gram matrix, several times faster than a decomposition of A.

    Shapes: as dem_penalty.

    >>> import torch
    >>> spectral_penalty(torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2))  # 4 / 4 + 1 / 4
    tensor(1.2500)
    """
    of_A, of_B = lora_A @ lora_A.mT, lora_B.mT @ lora_B  # (..., r, r)
    largest = torch.linalg.eigvalsh(torch.stack([of_A, of_B]))[..., -1]  # (2, ...)
    return (largest[0] / lora_A.shape[-1] + largest[1] / lora_B.shape[-2]) / lora_A.shape[-2]


# Eq. 10 and its rivals, by the names that `penalty` takes.
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dem": dem_penalty,
    "l1": l1_penalty,
    "l2": l2_penalty,
    "spectral": spectral_penalty,
}


def penalty_loss(
    model: nn.Module | dict[str, RankOneComponents], penalty: str | Callable = "dem"
) -> Tensor:
    """A penalty over all components of all layers, a scalar with gradient: add dem_weight times it.

    `model`, or its adapted layers by name; `penalty` a name in PENALTIES or a function like
    dem_penalty. Layers of one shape share one call. Raises ValueError if the model has no adapted
    layer, for an unknown name, and under DEM naming a layer with a single input or output.

    Choice: pruned components count too (the authors' code as well): they train on and may return.

    >>> from drlora_ref.layer import DynamicLoRALinear
    >>> layer = DynamicLoRALinear(nn.Linear(8, 8), r=2)
    >>> bool(penalty_loss(nn.Sequential(layer), "l2") == l2_penalty(layer.lora_A, layer.lora_B))
    True
    """
    of_layer = penalty_function(penalty)
    by_name = dynamic_layers(model)
    if not by_name:
        raise ValueError("the model has no DynamicLoRALinear: call inject_adapters first")
    if of_layer is dem_penalty:
        check_dem(by_name)
    layers = list(by_name.values())
    total: Tensor = sum(  # type: ignore[assignment]  # the int 0 only if there were no layer
        of_layer(A, B).sum() * A.shape[-2]  # the mean over a layer's r components, times r
        for _, (A, B, _) in stack_by_shape(layers)
    )
    return total / sum(layer.lora_c.numel() for layer in layers)


def penalty_function(penalty: str | Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """The penalty of this name; a function is itself. Raises ValueError for anything else.

    >>> penalty_function("dem") is dem_penalty
    True
    """
    if callable(penalty):
        return penalty
    if not isinstance(penalty, str) or penalty not in PENALTIES:
        raise ValueError(f"penalty = {penalty!r}: must be one of {', '.join(PENALTIES)}")
    return PENALTIES[penalty]


def dem_loss(model: nn.Module | dict[str, RankOneComponents]) -> Tensor:
    """R over all components of all layers (Eq. 10), a scalar with gradient: add dem_weight · R.

    As penalty_loss with "dem".

    >>> from drlora_ref.layer import DynamicLoRALinear
    >>> layer = DynamicLoRALinear(nn.Linear(8, 8), r=2)
    >>> bool(dem_loss(nn.Sequential(layer)) == dem_penalty(layer.lora_A, layer.lora_B))
    True
    """
    return penalty_loss(model, "dem")
