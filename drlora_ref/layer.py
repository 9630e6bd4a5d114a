"""Eq. 5-6: a linear layer whose update is a sum of rank-1 components that can be switched off."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DynamicLoRALinear(nn.Module):
    """A frozen linear layer plus r rank-1 components (Eq. 6).

        W = W0 + scaling · Σᵢ cᵢ bᵢaᵢᵀ          aᵢ = lora_A[i], bᵢ = lora_B[:, i], cᵢ = lora_c[i]
          = W0 + scaling · lora_B diag(lora_c) lora_A

    LoRA (Eq. 5) is the case c = 1. The scalar c is what makes a component a unit that can be
    pruned: cᵢ = 0 removes it, and leaves aᵢ and bᵢ where they are, so that it may come back.

    Shapes: x (..., d_in) -> (..., d_out); lora_A (r, d_in), lora_B (d_out, r), lora_c (r,),
    component_mask (r,) of bool: the components that survive, as the allocator decided.

    Choice: both matrices start Kaiming-uniform (a = 0) and c at zero, as in the authors' code;
    LoRA starts with lora_B = 0. So ΔW = 0, and at the first step only c receives a gradient.
    Choice: scaling = lora_alpha / r with the *initial* r, and stays so while r shrinks (authors').

    Read with care: the forward pass multiplies by c, not by the mask. Between two pruning events
    a component that was set to zero trains on, moves away from zero and counts in the output
    ("revival"); `rank`, `delta_weight` and `merge` go by the mask. The two views agree right after
    an event, and always once pruning has ended.

    Raises TypeError if base_layer is not an nn.Linear, ValueError for r < 1 or a dropout outside
    [0, 1).

    >>> layer = DynamicLoRALinear(nn.Linear(5, 3), r=2)
    >>> x = torch.ones(4, 5)
    >>> bool((layer(x) == layer.base_layer(x)).all()), layer.rank  # ΔW = 0 at the start
    (True, 2)
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, lora_alpha: float = 8, lora_dropout: float = 0.1
    ):
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"only nn.Linear can be adapted, not {type(base_layer).__name__}")
        if r < 1:
            raise ValueError(f"r = {r}: a layer needs at least one component")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout = {lora_dropout}: must be at least 0 and less than 1")
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)

        weight = base_layer.weight
        # Half-precision base weights are frozen and may stay so; what is trained needs float32.
        like = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base_layer.out_features, r, **like))
        self.lora_c = nn.Parameter(torch.zeros(r, **like))
        alive = torch.ones(r, dtype=torch.bool, device=weight.device)
        self.register_buffer("component_mask", alive)
        nn.init.kaiming_uniform_(self.lora_A)  # bound √(6 / d_in)
        nn.init.kaiming_uniform_(self.lora_B)  # bound √(6 / r): the fan-in of lora_B is r

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        z = F.linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        update = F.linear(z * (self.scaling * self.lora_c), self.lora_B)  # (..., d_out)
        return result + update.to(result.dtype)

    @property
    def rank(self) -> int:
        """How many components survive."""
        return int(self.component_mask.sum())

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW of the surviving components, materialised: (d_out, d_in)."""
        c = self.scaling * self.lora_c * self.component_mask
        return (self.lora_B * c) @ self.lora_A

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """An ordinary nn.Linear with W0 + ΔW; this module stays as it is."""
        merged = copy.deepcopy(self.base_layer)
        merged.weight += self.delta_weight().to(merged.weight.dtype)
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.lora_c.numel()}, scaling={self.scaling:.3g}"


def dynamic_layers(model: nn.Module) -> dict[str, DynamicLoRALinear]:
    """The adapted layers by name, in the order of `model.named_modules()`.

    That order defines a component's position, which breaks ties; it is the same in every process.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, DynamicLoRALinear)}


def stack_by_shape(layers: list[DynamicLoRALinear]) -> list[tuple[list[int], tuple[Tensor, ...]]]:
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
        return torch.stack([getattr(layers[i], name) for i in members])

    names = ("lora_A", "lora_B", "lora_c")
    return [(members, tuple(stack(members, n) for n in names)) for members in groups.values()]
