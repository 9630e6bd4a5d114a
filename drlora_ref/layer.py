"""Eq. 5-6: a linear layer whose update is a sum of rank-1 components that can be switched off."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drlora_ref.precision import StaysFloat32, at_least_float32


class RankOneComponents(StaysFloat32):
    """r rank-1 matrices that add up to the update of one weight (Eq. 6's sum).

        ΔW = scaling · Σᵢ cᵢ bᵢaᵢᵀ,   aᵢ = lora_A[i], bᵢ = lora_B[:, i], cᵢ = lora_c[i]
           = scaling · lora_B diag(lora_c) lora_A

    LoRA (Eq. 5) is the case c = 1. The scalar c is what makes a component a unit that can be
    pruned: cᵢ = 0 removes it, and leaves aᵢ and bᵢ where they are, so that it may come back.

    Shapes: x (..., d_in) -> x ΔWᵀ (..., d_out), without building ΔW; lora_A (r, d_in), lora_B
    (d_out, r), lora_c (r,), component_mask (r,) of bool: the components that survive, as the
    allocator decided. `dtype` and `device` are torch's.

    Choice: both matrices start Kaiming-uniform (a = 0) and c at zero, as in the authors' code;
    LoRA starts with lora_B = 0. So ΔW = 0, and at the first step only c receives a gradient.
    Choice: scaling = lora_alpha / r with the *initial* r, and stays so while r shrinks (authors').

    Read with care: the forward pass multiplies by c, not by the mask. Between two pruning events
    a component that was set to zero trains on, moves away from zero and counts in the output
    ("revival"); `rank` and `delta_weight` go by the mask. The two views agree right after an
    event, and always once pruning has ended.

    The components stay float32 when the model around them is cast to half precision.

    Raises ValueError for r < 1, lora_alpha ≤ 0 or a dropout outside [0, 1).

    >>> components = RankOneComponents(5, 3, r=2)
    >>> components(torch.ones(4, 5)).shape, components.rank
    (torch.Size([4, 3]), 2)
    """

    component_mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        lora_alpha: float = 8,
        lora_dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if r < 1:
            raise ValueError(f"r = {r}: a layer needs at least one component")
        if not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha = {lora_alpha}: must be above 0")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout = {lora_dropout}: must be at least 0 and less than 1")
        self.scaling = lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, d_in, **like))
        self.lora_B = nn.Parameter(torch.empty(d_out, r, **like))
        self.lora_c = nn.Parameter(torch.zeros(r, **like))
        self.register_buffer("component_mask", torch.ones(r, dtype=torch.bool, device=device))
        nn.init.kaiming_uniform_(self.lora_A)  # bound √(6 / d_in)
        nn.init.kaiming_uniform_(self.lora_B)  # bound √(6 / r): the fan-in of lora_B is r
        self.watch: Callable[[Tensor], None] | None = None  # is shown z while training: ZWatch

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        if self.watch and self.training and self.lora_c.requires_grad:
            self.watch(z)
        return F.linear(z * (self.scaling * self.lora_c), self.lora_B)  # (..., d_out)

    @property
    def rank(self) -> int:
        """How many components survive."""
        return int(self.component_mask.sum())

    def update(self) -> Tensor:
        """ΔW as the forward pass has it, materialised and with gradient: (d_out, d_in)."""
        return (self.lora_B * (self.scaling * self.lora_c)) @ self.lora_A

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW of the surviving components, materialised: (d_out, d_in)."""
        c = self.scaling * self.lora_c * self.component_mask
        return (self.lora_B * c) @ self.lora_A

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.lora_c.numel()}, scaling={self.scaling:.3g}"


class DynamicLoRALinear(RankOneComponents):
    """A frozen linear layer plus r rank-1 components: W = W0 + ΔW (Eq. 6).

    Shapes: x (..., d_in) -> (..., d_out). The parameters, the mask and `delta_weight` are those of
    RankOneComponents; W0 is in `base_layer`. To model code that reads `weight`, `bias`,
    `in_features` or `out_features` it is a linear layer.

    Read with care: code that computes with `weight` instead of calling the layer passes the
    components by. `weight` is W in evaluation, so that the answers are right (fused kernels, as in
    nn.TransformerEncoder). In training it is W0: dropout and scores need the call, and a layer that
    is never called gets no gradient, which RankAllocator refuses by name.

    Raises TypeError if base_layer is not an nn.Linear, ValueError as RankOneComponents.

    >>> layer = DynamicLoRALinear(nn.Linear(5, 3), r=2)
    >>> x = torch.ones(4, 5)
    >>> bool((layer(x) == layer.base_layer(x)).all()), layer.rank  # ΔW = 0 at the start
    (True, 2)
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float = 8, lora_dropout: float = 0.1
    ):
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"only nn.Linear can be adapted, not {type(base_layer).__name__}")
        d_out, d_in = base_layer.weight.shape
        like = like_base(base_layer.weight)
        super().__init__(d_in, d_out, r, lora_alpha, lora_dropout, **like)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = d_in, d_out

    @property
    def weight(self) -> Tensor:
        """W0 in training, W = W0 + ΔW in evaluation: (d_out, d_in)."""
        W0 = self.base_layer.weight
        return W0 if self.training else W0 + self.update().to(W0.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + super().forward(x).to(result.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """An ordinary nn.Linear with W0 + ΔW; this module stays as it is."""
        merged = copy.deepcopy(self.base_layer)
        merged.weight += self.delta_weight().to(merged.weight.dtype)
        return merged


def like_base(weight: Tensor) -> dict[str, Any]:
    """{"device": ..., "dtype": ...} of the components of a frozen weight.

    Half-precision base weights are frozen and may stay so; what is trained needs float32.

    >>> like_base(torch.ones(2, dtype=torch.bfloat16))["dtype"]
    torch.float32
    """
    return {
        "device": weight.device,
        "dtype": torch.promote_types(weight.dtype, torch.float32),
    }


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DDP and DataParallel."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    inside = model._modules.get("module" if isinstance(model, wrappers) else "_orig_mod")
    return model if inside is None else bare(inside)


def plain_name(name: str) -> str:
    """A module's name without what torch.compile puts into it.

    >>> plain_name("encoder._orig_mod.layer.0"), plain_name("_orig_mod")
    ('encoder.layer.0', '')
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def dynamic_layers(
    model: nn.Module | dict[str, RankOneComponents],
) -> dict[str, RankOneComponents]:
    """The adapted layers by name, in the order of `model.named_modules()`.

    That order defines a component's position, which breaks ties; it is the same in every process.
    The names are those of the plain model, whether or not torch.compile or DDP has wrapped it.
    A dictionary of such layers is returned as it is: whoever needs a model's layers takes either.
    """
    if isinstance(model, dict):
        return model
    layers = bare(model).named_modules()
    return {plain_name(n): m for n, m in layers if isinstance(m, RankOneComponents)}


def stack_by_shape(layers: list[RankOneComponents]) -> list[tuple[list[int], tuple[Tensor, ...]]]:
    """Group layers of one shape, so that one call serves all of them.

    A base-size encoder has 72 adapted matrices but only three shapes. Returns, for every shape,
    the indices into `layers` and (lora_A, lora_B, lora_c) with one more leading dimension:
    (layers, r, d_in), (layers, d_out, r), (layers, r). Gradients flow through the stack.

    >>> layers = [DynamicLoRALinear(nn.Linear(4, out), r=2) for out in (4, 8, 4)]
    >>> [(members, tuple(A.shape)) for members, (A, B, c) in stack_by_shape(layers)]
    [([0, 2], (2, 2, 4)), ([1], (1, 2, 4))]
    """
    groups: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault((layer.lora_A.shape, layer.lora_B.shape), []).append(i)

    def stack(members: list[int], name: str) -> Tensor:
        return at_least_float32(torch.stack([getattr(layers[i], name) for i in members]))

    names = ("lora_A", "lora_B", "lora_c")
    return [(members, tuple(stack(members, n) for n in names)) for members in groups.values()]
