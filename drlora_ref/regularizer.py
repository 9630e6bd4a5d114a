"""Eq. 10: the Dimensional Equilibrium Modulator (DEM), which keeps a component's elements even."""

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


def dem_loss(model: nn.Module | dict[str, RankOneComponents]) -> Tensor:
    """R over all components of all layers (Eq. 10), a scalar with gradient: add dem_weight · R.

    `model`, or its adapted layers by name. Layers of one shape share one call. Raises ValueError
    if the model has no adapted layer, or naming one with a single input or output.

    Choice: pruned components count too (the authors' code as well): they train on and may return.

    >>> from drlora_ref.layer import DynamicLoRALinear
    >>> layer = DynamicLoRALinear(nn.Linear(8, 8), r=2)
    >>> bool(dem_loss(nn.Sequential(layer)) == dem_penalty(layer.lora_A, layer.lora_B))
    True
    """
    by_name = dynamic_layers(model)
    if not by_name:
        raise ValueError("the model has no DynamicLoRALinear: call inject_adapters first")
    check_dem(by_name)
    layers = list(by_name.values())
    total: Tensor = sum(  # type: ignore[assignment]  # the int 0 only if there were no layer
        dem_penalty(A, B).sum() * A.shape[-2]  # the mean over a layer's r components, times r
        for _, (A, B, _) in stack_by_shape(layers)
    )
    return total / sum(layer.lora_c.numel() for layer in layers)
