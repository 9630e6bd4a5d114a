"""What a score may ask of the last step's forward pass: the size of each component's z = aᵀx."""

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drlora_ref.layer import RankOneComponents


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

    >>> from drlora_ref.layer import DynamicLoRALinear
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
