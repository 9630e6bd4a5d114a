"""What a score may ask of the last step's forward pass: the size of each component's z = aᵀx."""

import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from drlora_ref.layer import RankOneComponents, bare


class Batch(NamedTuple):
    """What a followed model is called with: masks, and for a decoder the encoder's output."""

    attention_mask: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None


NO_BATCH = Batch()


class ZWatch:
    """Mean square of z = aᵀx for every component, over the rows of one optimizer step.

        E(zᵢ²) ≈ Σ zᵢ² / rows

    The layers compute z in their forward pass and show it; `mean()` is asked once a step and starts
    anew. Sums and rows are added up, so micro-batches count by their rows. What gradient
    checkpointing runs again in the backward pass does not count again. Several processes have the
    same number: both sums are taken over all of them.

    Padding is no row. A layer does not know it, so the watch reads the `attention_mask` that the
    models it follows are called with, and leaves out the rows where it is 0, whatever their z. The
    mask is (batch, length), or (batch, choices, length), which such models flatten; the inputs that
    it is read for are (batch · choices, length, d_in) or one row after the other. A layer with an
    input of any other shape counts all rows, and so does any layer if the mask is 4-D or there is
    none. A mask holds for what is run inside the call that brought it, and for nothing after it.

    In an encoder-decoder model that mask is the encoder's. It is read for what the encoder's layers
    see, and for what a decoder's layer sees of the encoder's output. The decoder's own rows have a
    mask of their own, `decoder_attention_mask`: without one, all of them count.

    Shapes: each layer's lora_c (..., r), where ... is nothing, or R for replicas, whose rows follow
    one another in the batch.

    Read with care: a layer has one watch, the one that was made last. Under torch.distributed all
    processes must ask for the mean together, and train one model. A decoder is found as the models
    of transformers name it; in any other model one mask holds for all inputs of its shape. What is
    run in training mode counts, with a gradient or without: evaluate in evaluation mode, or under
    torch.inference_mode. What torch.compile has compiled as a whole does not know either of the
    latter, nor gradient checkpointing around it: compile layers, or checkpoint inside it.

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
        self.counting = True
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
        self.on = False
        self.batch = NO_BATCH  # what the followed model now running was called with
        self.outer: list[Batch] = []  # the same of those that have called it
        self.reads_source = False  # whether the layer now running sees the encoder's output
        self.seen: dict[int, tuple[Tensor, Tensor | None]] = {}  # z and mask, by layer, this pass
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
        if self.on:
            self._read_masks(model)

    def _read_masks(self, model: nn.Module) -> None:
        decoder = decoder_of(model)
        for part in (model, decoder) if decoder else (model,):
            self.handles.append(part.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(part.register_forward_hook(self._end, always_call=True))
        for layer in self.layers if decoder else ():
            self.handles.append(layer.register_forward_pre_hook(self._new_input))

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            names = inspect.signature(bare(model).forward).parameters
            kwargs = dict(zip(names, args, strict=False)) | kwargs
        self._add_up()
        self.outer.append(self.batch)
        self.batch = Batch(*map(kwargs.get, Batch._fields))

    def _end(self, *_: Any) -> None:
        self.batch = self.outer.pop() if self.outer else NO_BATCH
        self.reads_source = False

    def _new_input(self, layer: nn.Module, args: tuple) -> None:
        self.reads_source = any(x is self.batch.encoder_hidden_states for x in args)

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """No row that is run within it counts: those with which a process fills up a batch."""
        self._add_up()
        self.counting = False
        try:
            yield
        finally:
            self._add_up()
            self.counting = True

    def _see(self, i: int, z: Tensor) -> None:
        if of_no_step():
            return
        if i in self.seen:  # the next pass has begun
            self._add_up()
        batch = self.batch
        mask = batch.encoder_attention_mask if self.reads_source else batch.attention_mask
        self.seen[i] = z.detach(), mask

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add what was seen to the sums: a few calls for all layers whose z have one shape."""
        if not self.seen:
            return
        if self.sums is None:
            c = torch.stack([layer.lora_c for layer in self.layers])  # (layers, ..., r)
            self.sums = torch.zeros_like(c), torch.zeros_like(c[..., 0])
        squares, rows = self.sums
        groups: dict[tuple[torch.Size, int], list[int]] = {}
        for i, (z, mask) in self.seen.items():
            groups.setdefault((z.shape, id(mask)), []).append(i)
        for members in groups.values():
            z = torch.stack([self.seen[i][0] for i in members]).to(squares.dtype)
            mask = self.seen[members[0]][1] if self.counting else None
            each = z[0].numel() // squares[0].numel()  # rows of one replica, or of the one model
            counts = self._counts(z[0], mask).reshape(*rows.shape[1:], each, 1)
            z = z.reshape(len(z), *rows.shape[1:], each, squares.shape[-1])
            # Not a product: 0 times an infinite z² would be NaN.
            more = list(torch.where(counts, z.square(), 0.0).sum(dim=-2))
            torch._foreach_add_([squares[i] for i in members], more)
            more = [counts.sum(dim=(-2, -1), dtype=rows.dtype)] * len(members)
            torch._foreach_add_([rows[i] for i in members], more)
        self.seen = {}

    def _counts(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """True for each row of z (*places, r) that counts, False for padding: (*places)."""
        places = z.shape[:-1]
        if mask is not None and places in _shapes_of(mask):
            return mask.reshape(places).to(z.device, torch.bool)
        return torch.full(places, self.counting, dtype=torch.bool, device=z.device)

    @torch.no_grad()
    def mean(self) -> tuple[Tensor, ...]:
        """E(zᵢ²) of each layer, (..., r), since this was last asked for. A layer unseen has 0.

        Raises ValueError if no layer was seen at all.
        """
        self._add_up()
        self.batch, self.outer = NO_BATCH, []  # of a pass that was interrupted
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


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of an encoder-decoder model of transformers; None for any other model.

    >>> decoder_of(nn.Linear(2, 2))
    """
    model = bare(model)
    has_one = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return cast(Any, model).get_decoder() if has_one and hasattr(model, "get_decoder") else None


def _shapes_of(mask: Tensor) -> list[tuple[int, ...]]:
    """What the rows of an input may be shaped like to be those that the mask speaks of.

    Not flattened is a mask of floats in three dimensions or more: such a one is added to scores of
    attention, and 0 means that a row counts.
    """
    *batches, length = mask.shape
    shapes = [tuple(mask.shape)]
    if mask.dim() < 3 or (mask.dim() == 3 and not mask.is_floating_point()):
        shapes += [(math.prod(batches), length), (mask.numel(),)]
    return shapes


def stop_watching(layers: Iterable[RankOneComponents]) -> None:
    """Stop the watches of these layers: nothing of them is left on layers or models."""
    for layer in layers:
        if isinstance(layer.watch, functools.partial):  # an eye: a method of its watch
            cast(Any, layer.watch.func).__self__.stop()


def of_no_step() -> bool:
    """Whether a forward pass is no part of a training step's first run through the model.

    That is so under torch.inference_mode, and where the backward pass runs a forward pass again, as
    gradient checkpointing does. What torch.compile has compiled cannot ask, and says no.

    >>> of_no_step()
    False
    """
    if torch.compiler.is_compiling():
        return False
    # torch has no public name for the second question.
    return torch.is_inference_mode_enabled() or torch._C._current_graph_task_id() != -1
