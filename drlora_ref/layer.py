"""Eq. 5-6: a linear layer whose update is a sum of rank-1 components that can be switched off."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RankOneComponents(nn.Module):
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

    Raises ValueError for r < 1 or a dropout outside [0, 1).

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
        if self.watch and self.training:
            self.watch(z)
        return F.linear(z * (self.scaling * self.lora_c), self.lora_B)  # (..., d_out)

    @property
    def rank(self) -> int:
        """How many components survive."""
        return int(self.component_mask.sum())

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
    RankOneComponents; W0 is in `base_layer`.

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


def dynamic_layers(
    model: nn.Module | dict[str, RankOneComponents],
) -> dict[str, RankOneComponents]:
    """The adapted layers by name, in the order of `model.named_modules()`.

    That order defines a component's position, which breaks ties; it is the same in every process.
    A dictionary of such layers is returned as it is: whoever needs a model's layers takes either.
    """
    if isinstance(model, dict):
        return model
    return {n: m for n, m in model.named_modules() if isinstance(m, RankOneComponents)}


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
        return torch.stack([getattr(layers[i], name) for i in members])

    names = ("lora_A", "lora_B", "lora_c")
    return [(members, tuple(stack(members, n) for n in names)) for members in groups.values()]


class ZWatch:
    """Mean square of z = aᵀx for every component, over the rows of one optimizer step.

        E(zᵢ²) ≈ Σ zᵢ² / rows

    The layers compute z in their forward pass and show it; `mean()` is asked once a step and starts
    anew. Sums and rows are added up, so micro-batches count by their rows, and a layer that
    gradient checkpointing runs twice has the same mean. Several processes have the same number:
    both sums are taken over all of them.

    Padding is no row. A layer does not know it, so the watch reads the 2-D `attention_mask` that
    the models it follows are called with, and leaves out the rows where it is 0. That holds for
    inputs of its shape, (batch, length, d_in). A layer with an input of any other shape counts all
    rows: a decoder's, or any layer if the mask is 4-D or there is none.

    Shapes: each layer's lora_c (..., r), where ... is nothing, or R for replicas, whose rows follow
    one another in the batch.

    Read with care: a layer has one watch, the one that was made last. Under torch.distributed all
    processes must ask for the mean together, and train one model.

    >>> layer = DynamicLoRALinear(nn.Linear(2, 2), r=2, lora_dropout=0.0)
    >>> layer.lora_A.data = torch.eye(2)
    >>> watch = ZWatch([layer])
    >>> for x in (torch.tensor([[6.0, 1.0]]), torch.tensor([[8.0, 1.0]])):
    ...     _ = layer(x)
    >>> watch.mean()
    (tensor([50.,  1.]),)
    """

    def __init__(self, layers: list[RankOneComponents]):
        self.layers = layers
        self.models: list[nn.Module] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.eyes = [functools.partial(self._see, i) for i in range(len(layers))]
        self.start()

    def start(self) -> None:
        """Watch from now on; what was seen before is forgotten."""
        self.stop()
        self.on = True
        for layer, eye in zip(self.layers, self.eyes, strict=True):
            layer.watch = eye
        for model in self.models:
            self._read_masks(model)

    def stop(self) -> None:
        """Leave layers and models as if they had never been watched."""
        self.on, self.mask = False, None
        self.seen: dict[int, Tensor] = {}  # by layer, its z of the pass that is under way
        self.sums: tuple[Tensor, Tensor] | None = None  # of z², and of rows
        for layer, eye in zip(self.layers, self.eyes, strict=True):
            if layer.watch is eye:  # not that of a later watch
                layer.watch = None
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def follow(self, model: nn.Module) -> None:
        """Leave out the padding of the batches that this model is called with."""
        self.models.append(model)
        self._read_masks(model)

    def _read_masks(self, model: nn.Module) -> None:
        self.handles.append(model.register_forward_pre_hook(self._new_batch, with_kwargs=True))

    def _new_batch(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._add_up()
        if args:
            names = inspect.signature(model.forward).parameters
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        self.mask = kwargs.get("attention_mask")

    def _see(self, i: int, z: Tensor) -> None:
        if i in self.seen:  # the next pass has begun
            self._add_up()
        self.seen[i] = z.detach()

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add what was seen to the sums: a few calls for all layers whose z have one shape."""
        if not self.seen:
            return
        if self.sums is None:
            c = torch.stack([layer.lora_c for layer in self.layers])  # (layers, ..., r)
            self.sums = torch.zeros_like(c), torch.zeros_like(c[..., 0])
        squares, rows = self.sums
        by_shape: dict[torch.Size, list[int]] = {}
        for i, z in self.seen.items():
            by_shape.setdefault(z.shape, []).append(i)
        for members in by_shape.values():
            z = torch.stack([self.seen[i] for i in members]).to(squares.dtype)
            counts = self._counts(z[0]).reshape(*rows.shape[1:], -1, 1)  # (..., rows, 1)
            z = z.reshape(len(z), *counts.shape[:-1], -1)  # (layers, ..., rows, r)
            more = list((z.square() * counts).sum(dim=-2))
            torch._foreach_add_([squares[i] for i in members], more)
            more = [counts.sum(dim=(-2, -1))] * len(members)
            torch._foreach_add_([rows[i] for i in members], more)
        self.seen = {}

    def _counts(self, z: Tensor) -> Tensor:
        """1 for each row of z (*places, r) that counts, 0 for padding: (*places)."""
        if self.mask is not None and self.mask.shape == z.shape[:-1]:
            return self.mask.to(z)
        return torch.ones_like(z[..., 0])

    @torch.no_grad()
    def mean(self) -> tuple[Tensor, ...]:
        """E(zᵢ²) of each layer, (..., r), since this was last asked for. A layer unseen has 0.

        Raises ValueError if no layer was seen at all.
        """
        self._add_up()
        if self.sums is None:
            raise ValueError(
                "no layer was seen: make the allocator before the forward pass, run that in "
                "training mode, and let no later allocator watch the same layers"
            )
        squares, rows = self.sums
        self.sums = None
        if dist.is_available() and dist.is_initialized():
            both = torch.cat([squares.flatten(), rows.flatten()])  # one call for all layers
            dist.all_reduce(both)
            squares = both[: squares.numel()].view_as(squares)
            rows = both[squares.numel() :].view_as(rows)
        return (squares / rows.clamp(min=1).unsqueeze(-1)).unbind()
