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

"""After each optimizer step: score, smooth, and keep the best components over all layers."""

import functools
import inspect
import itertools
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import BudgetSchedule, DrLoraConfig
from .layer import RankOneComponents, bare, dynamic_layers, stack_by_shape
from .precision import StaysFloat32, at_least_float32
from .scores import SCORES, check_scoring, ema_update, random_scores


def dem_penalty(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Mean variance within the components of one layer (Eq. 10, one layer's part).

        R = (1/n) Σᵢ (Var(aᵢ) + Var(bᵢ))

    The paper's reason: a component that is near zero but for a few large elements has a small norm
    and is pruned early, and then those few dimensions change abruptly.

    Shapes: lora_A (..., r, d_in), lora_B (..., d_out, r) -> (...)
    Raises ValueError if a vector has fewer than two elements: it has no variance.

    Choice: the unbiased variance, as in the authors' code; they take *half* of R. We do as printed.

    Read with care: the variance is taken *within* each vector, over its elements, never across
    components. It knows a vector's length and mean, nothing else: (d - 1) Var = ‖a‖² - d·mean². A
    constant vector of any length costs nothing; one of mean zero is shrunk as by weight decay.
    """
    if lora_A.shape[-1] < 2 or lora_B.shape[-2] < 2:
        raise ValueError("a vector of fewer than two elements has no unbiased variance")
    return (lora_A.var(dim=-1) + lora_B.var(dim=-2)).mean(dim=-1)


def check_dem(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError naming a layer whose aᵢ or bᵢ is a single number: it has no variance."""
    for name, layer in layers.items():
        d_in, d_out = layer.lora_A.shape[-1], layer.lora_B.shape[-2]
        if min(d_in, d_out) < 2:
            raise ValueError(
                f"{name} has {d_in} inputs and {d_out} outputs, and DEM (Eq. 10) is a variance "
                "over either: adapt it without DEM (dem_weight 0), or leave it out of the targets"
            )


def dem_loss(layers: dict[str, RankOneComponents]) -> Tensor:
    """R over all components of all layers (Eq. 10), a scalar with gradient: add dem_weight · R."""
    check_dem(layers)
    stacks = stack_by_shape(list(layers.values()))
    total = sum(dem_penalty(A, B).sum() * A.shape[-2] for _, (A, B, _) in stacks)
    return total / sum(layer.lora_c.numel() for layer in layers.values())


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
    """The decoder of an encoder-decoder model of transformers; None for any other model."""
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


def of_no_step() -> bool:
    """Whether a forward pass is no part of a training step's first run through the model.

    That is so under torch.inference_mode, and where the backward pass runs a forward pass again, as
    gradient checkpointing does. What torch.compile has compiled cannot ask, and says no.
    """
    if torch.compiler.is_compiling():
        return False
    # torch has no public name for the second question.
    return torch.is_inference_mode_enabled() or torch._C._current_graph_task_id() != -1


class Diverged(ValueError):
    """Scores that are NaN or infinite: of a run that diverged nothing is left to select."""


def select_components(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Mask of the `keep` highest scores; of equal scores the earlier position wins.

    Shapes: scores (..., N); keep an int, or whole numbers of shape (...) -> bool (..., N)
    Raises Diverged if a score is NaN or infinite, ValueError if keep is not between 0 and N.

    Choice: exactly `keep` survive. The authors' code drops every score up to the k-th smallest
    (`<= kthvalue`), so a tie there costs more components than the budget says.

    Read with care: the sort must be stable. An unstable one may order ties differently on another
    device or in another process, and then the replicas of one model no longer agree.
    """
    n = scores.shape[-1]
    keep = torch.as_tensor(keep, device=scores.device)
    _check_finite(scores)
    if (keep < 0).any() or (keep > n).any():
        raise ValueError(f"keep = {keep.tolist()}: must be between 0 and the {n} components")
    return _places(scores) < keep.unsqueeze(-1)


def spread_evenly(scores: Tensor) -> Tensor:
    """Scores for one queue that takes as many components from each layer: a control.

    Shapes: scores (..., layers, r) -> (..., layers · r), whole numbers, the highest the best
    Raises Diverged if a score is NaN or infinite.

    First comes the place that a component has within its layer, then its own score. So of any
    number that is kept the layers' shares differ by one at most, and each layer keeps its best.
    """
    _check_finite(scores)
    of_all = _places(scores.flatten(-2))
    return -(_places(scores).flatten(-2) * of_all.shape[-1] + of_all)


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        bad = scores.isfinite().logical_not().sum()
        raise Diverged(f"{bad} of {scores.numel()} scores are NaN or infinite: training diverged")


def _places(scores: Tensor) -> Tensor:
    """How many are ranked before each one, in the last dimension: whole numbers of that shape."""
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(best_first)
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    return place.scatter_(-1, best_first, numbers.expand_as(best_first))


def check_next_step(global_step: int, last_step: int) -> None:
    """Raise ValueError unless this step follows the last one: else an event would be missed."""
    if global_step != last_step + 1:
        raise ValueError(
            f"step({global_step}) after step {last_step}: call it once after every optimizer step, "
            "and load_state_dict before going on from a checkpoint"
        )


def needs(score: Callable) -> set[str]:
    """What a score asks for by name beyond (lora_A, lora_B, lora_c): z_square, c_grad, or nothing."""
    return {"z_square", "c_grad"} & inspect.signature(score).parameters.keys()


def seen_by_the_step(layers: dict[str, Any], names: set[str], watch: ZWatch | None) -> dict[str, Sequence[Tensor]]:
    """What scores need of the last step, by name: for each layer a tensor (..., r)."""
    given: dict[str, Sequence[Tensor]] = {}
    if "z_square" in names and watch:
        given["z_square"] = watch.mean()
    if "c_grad" in names:
        given["c_grad"] = c_gradients(layers)
    return given


def c_gradients(layers: dict[str, Any]) -> list[Tensor]:
    """The gradient of each layer's c: zeros for a layer that the step skipped (layerdrop, experts).

    Raises ValueError if no layer has one at this point.
    """
    cs = [layer.lora_c for layer in layers.values()]
    if all(c.grad is None for c in cs):
        raise ValueError(
            "no layer's lora_c has a gradient: call the allocator after optimizer.step() and "
            "before optimizer.zero_grad()"
        )
    return [torch.zeros_like(c) if c.grad is None else c.grad for c in cs]


def unreached(layers: dict[str, Any]) -> set[str]:
    """The layers whose c no gradient has reached; none if c has no gradient in any layer."""
    without = {name for name, layer in layers.items() if layer.lora_c.grad is None}
    return without if len(without) < len(layers) else set()


def _listed(names: Sequence[str]) -> str:
    """At most three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _kind(name: str) -> str:
    """The last word of a name: what the layer is, in whichever block. "h.0.q" -> "q"."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), "")


@torch.no_grad()
def zero_pruned(layers: dict[str, Any]) -> None:
    """Set the c of every component outside its layer's mask to zero, in place; NaN too."""
    # All layers in four calls: this runs after every step of the second half of training.
    cs = [m.lora_c for m in layers.values()]
    masks = torch.stack([m.component_mask for m in layers.values()])
    torch._foreach_copy_(cs, torch.where(masks, torch.stack(cs), 0.0).unbind())


class RankAllocator:
    """Distributes one budget of components over all layers while the model trains (Algorithm 1).

    Call `step(t)` after the t-th optimizer step, t = 1, 2, ..., T. It scores every component
    (Eq. 7 by default), smooths the scores (Eq. 8), and at the schedule's pruning steps keeps the
    best b(t) · layers of them (Eq. 9), over *all* layers at once; it sets the c of the others to
    zero. They train on and may come back at a later event. After the last event the mask is fixed.

    Choice: scores and their averages end with the last event, as in the authors' code. Nothing
    would read them.

    Layers of one shape are stacked, so that a base-size encoder's 72 matrices take three scoring
    calls, not 72. All scores lie in one vector, in `named_modules()` order and then by component.

    Arguments: `model`, or its adapted layers by name; `score` is a name in SCORES or a function
    like importance_scores; `seed` matters to "random" only, which draws from a generator of its
    own. A score with a keyword argument z_square or c_grad is given the mean square of each aᵢᵀx
    over the last step's rows, or the gradient of c; then step(t) belongs before zero_grad(). The
    layers are watched for z_square until pruning has ended, by `watch` if the caller has one;
    layers given by name have no model, so `allocator.watch.follow(model)` must say where padding
    is read. With `uniform` every layer keeps the same number of components, its own best: a control
    that prunes as much at every event and distributes nothing (see spread_evenly). Raises
    ValueError for a model without adapted layers or with another number of components than the
    schedule starts from, for an unknown score, for beta outside [0, 1), and for a `uniform` that is
    neither True nor False.

    Read with care: once pruning has ended, zeros must be written again after every optimizer step.
    The gradient of a c at zero is not zero, and AdamW also remembers past gradients: either moves
    it. And the budget counts for all layers together; under Eq. 7 too, a layer can lose everything.
    """

    def __init__(
        self,
        model: nn.Module | dict[str, RankOneComponents],
        schedule: BudgetSchedule,
        beta: float = 0.9,
        score: str | Callable = "frobenius_share",
        seed: int = 0,
        watch: ZWatch | None = None,
        uniform: bool = False,
    ):
        self.layers, self.schedule, self.beta = dynamic_layers(model), schedule, beta
        self.uniform = uniform
        if not self.layers:
            raise ValueError("the adapter has no layer")
        check_scoring(score, beta)
        if not isinstance(uniform, bool):
            raise ValueError(f"uniform = {uniform!r}: must be True or False")
        self.sizes = [layer.lora_c.numel() for layer in self.layers.values()]
        for r in self.sizes:
            if r != schedule.init_r:
                raise ValueError(f"init_r = {schedule.init_r}, but the layers have r = {r}")

        self.score_name = score if isinstance(score, str) else getattr(score, "__name__", repr(score))
        self.score: Callable[..., Tensor] = SCORES[score] if isinstance(score, str) else score
        self.generator = torch.Generator().manual_seed(seed)
        if score == "random":
            self.score = functools.partial(random_scores, generator=self.generator)
        self.needs = needs(self.score)
        self.watch = watch
        if "z_square" in self.needs and not watch:
            self.watch = ZWatch(list(self.layers.values()))
            if isinstance(model, nn.Module):
                self.watch.follow(model)
        self.last_step = 0
        self.smooths = True  # False: the training step does so itself, as a captured one
        self.ema = torch.zeros(sum(self.sizes))
        self.counted = torch.tensor(False)  # whether any step was smoothed, not skipped
        self.waiting = set(self.layers)  # for a first gradient
        self.first_event = next(t for t in itertools.count(1) if schedule.prunes_at(t))

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The unsmoothed score of every component: (N,), by position.

        Read with care: a score of z_square takes up what was seen; it can be asked once a step.
        """
        given = seen_by_the_step(self.layers, self.needs, self.watch)
        by_layer: dict[int, Tensor] = {}
        for members, (A, B, c) in stack_by_shape(list(self.layers.values())):
            own = {name: at_least_float32(torch.stack([each[i] for i in members])) for name, each in given.items()}
            by_layer.update(zip(members, self.score(A, B, c, **own), strict=True))  # a row a layer
        return torch.cat([by_layer[i] for i in range(len(by_layer))])

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """Lines 7-9 of Algorithm 1, after optimizer step number global_step.

        Raises ValueError if steps are left out or repeated, since the last event would be missed;
        and naming the layers that are frozen or that no gradient reaches: they would take a share
        of the budget.
        Raises Diverged, before any mask has changed, if a score is NaN or infinite at a pruning
        step.
        """
        check_next_step(global_step, self.last_step)
        self._check_reached(global_step)
        self.last_step = global_step
        if self.schedule.pruning_ended(global_step):
            return zero_pruned(self.layers)
        if self.smooths:
            self._smooth()
        if self.schedule.prunes_at(global_step):
            scores = self.ema
            if self.needs and self.smooths:
                scores = scores.where(self.counted, math.nan)
            if self.uniform:
                scores = spread_evenly(scores.view(len(self.layers), -1))
            keep = self.schedule.keep_count(global_step, len(scores))
            self._set_mask(select_components(scores, keep))
            zero_pruned(self.layers)
        if self.watch and self.smooths and global_step == self.schedule.t_end:
            self.watch.stop()

    def _smooth(self) -> None:
        """Eq. 8. A step whose gradients overflowed, which a GradScaler skips, counts for nothing.

        That concerns scores of what the step has seen, z_square and c_grad. Where c itself is not
        finite, or no step has ever counted, the run has diverged, and the next event says so.
        """
        scores = self.scores()
        smoothed = ema_update(self.ema.to(scores), scores, self.beta)
        if self.needs:
            skipped = self._skipped().to(scores.device)
            smoothed = torch.where(skipped, self.ema.to(scores), smoothed)
            self.counted = self.counted.to(scores.device) | ~skipped
        self.ema = smoothed

    def _skipped(self) -> Tensor:
        """Whether a gradient of some c is not finite, and every c is: a bool without a wait."""
        cs: list[Tensor] = [layer.lora_c for layer in self.layers.values()]
        gradients = [c.grad for c in cs if c.grad is not None]
        if not gradients:
            return torch.tensor(False)
        return torch.stack(cs).isfinite().all() & ~torch.stack(gradients).isfinite().all()

    def _check_reached(self, step: int) -> None:
        """Refuse layers that no gradient reaches, before any component is taken away.

        At the first step, where that is so for all layers of one name. A layer may also be skipped
        at random (layerdrop, experts): it has time until the first pruning event.
        """
        if step > self.first_event and not self.schedule.prunes_at(step):
            return
        if frozen := [n for n, layer in self.layers.items() if not layer.lora_c.requires_grad]:
            raise ValueError(
                f"lora_c of {_listed(frozen)} is frozen (requires_grad is False): such components "
                "keep their place in the budget for nothing. Train them, or leave the layers out"
            )
        if step > self.first_event:
            return
        without = unreached(self.layers)
        self.waiting &= without
        reached = {_kind(name) for name in self.layers.keys() - without}
        passed_by = [n for n in self.layers if n in self.waiting]
        if step < self.first_event:
            passed_by = [n for n in passed_by if step == 1 and _kind(n) not in reached]
        if passed_by:
            raise ValueError(
                f"no gradient reaches {_listed(passed_by)}: the model does not call "
                "such a layer (a fused kernel may read its weight), and its components would take "
                "a share of the budget for nothing. Leave it out of target_modules"
            )

    def _set_mask(self, mask: Tensor) -> None:
        for layer, part in zip(self.layers.values(), mask.split(self.sizes), strict=True):
            layer.component_mask.copy_(part)

    @property
    def mask(self) -> Tensor:
        """Which components survive: bool (N,), by position."""
        return torch.cat([layer.component_mask for layer in self.layers.values()])

    def rank_pattern(self) -> dict[str, int]:
        """Surviving components of each layer by name (PEFT's word for such a table)."""
        ranks = [int(part.sum()) for part in self.mask.cpu().split(self.sizes)]
        return dict(zip(self.layers, ranks, strict=True))

    def _configuration(self) -> dict:
        return {
            "layers": dict(zip(self.layers, self.sizes, strict=True)),
            "schedule": asdict(self.schedule),
            "beta": self.beta,
            "score": self.score_name,
            "uniform": self.uniform,
        }

    def state_dict(self) -> dict:
        """All that decides the next step: EMA, mask, step, generator; and what it belongs to."""
        return {
            "ema": self.ema.clone(),
            "mask": self.mask,
            "last_step": self.last_step,
            "generator": self.generator.get_state(),
            "configuration": self._configuration(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where state_dict() was taken; also restores the layers' masks.

        Raises ValueError if the state belongs to other layers, or another schedule, beta, score or
        `uniform`.
        """
        for name, here in self._configuration().items():
            there = state["configuration"].get(name, False)  # before it had a name: not uniform
            if there != here:
                raise ValueError(f"the saved state is of another {name}: {there}, here {here}")
        self.ema = state["ema"].clone()
        self.last_step = state["last_step"]
        self.generator.set_state(state["generator"].cpu())
        self._set_mask(state["mask"])
        self.counted.fill_(self.last_step > 0)
        if self.watch:
            (self.watch.start if self.last_step < self.schedule.t_end else self.watch.stop)()


SHARDED = (
    "FSDP and DeepSpeed shard the components, DDP does not: a score takes the norms of whole "
    "vectors (Eq. 7), one selection goes over those of all layers, and a shard holds a part of "
    "each: use DDP"
)


def check_whole(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError if FSDP2 or ZeRO-3 has cut the components into shards, as a loop may do."""
    for name, layer in layers.items():
        # What a DTensor has, and what DeepSpeed gives a parameter that it has cut.
        if hasattr(layer.lora_A, "device_mesh") or hasattr(layer.lora_A, "ds_id"):
            raise ValueError(f"{name} is sharded: {SHARDED}")


def check_settled(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError if a pruned component is not zero: it counts in the output, not in the rank."""
    for name, layer in layers.items():
        if layer.lora_c[~layer.component_mask].any():
            raise ValueError(
                f"{name}: a component that was pruned is not zero. Either pruning has not ended, "
                "or the allocator was not called after an optimizer step since: call it after "
                "every step, to the last"
            )


def warn_unfinished(config: DrLoraConfig, steps: int) -> None:
    """Warn where an adapter of so many steps has not been pruned to its end."""
    if config.total_step and config.init_r > config.target_r and steps < config.schedule().t_end:
        warnings.warn(
            f"this adapter is unfinished: pruning was to end at step {config.schedule().t_end}, "
            f"and it has {steps}. It has more components than target_r says",
            stacklevel=2,
        )


class AllocatorState(StaysFloat32):
    """The memory of one adapter's RankAllocator, as buffers: saved and loaded with the adapter.

    Buffers: ema (N,), the smoothed score of every component by position; last_step and settings,
    whole numbers; and the generator of the score "random". The masks are in the components.

    The watch of a score that needs one is here from the start, since the first forward pass may
    come before the allocator is made. Nothing of it is saved: each step starts it anew.
    """

    ema: Tensor
    last_step: Tensor
    settings: Tensor
    generator: Tensor

    def __init__(self, layers: dict[str, RankOneComponents], config: DrLoraConfig, device):
        super().__init__()
        n = sum(layer.component_mask.numel() for layer in layers.values())
        self.register_buffer("ema", torch.zeros(n, device=device))
        for name in ("last_step", "settings"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        if config.score == "random":
            start = torch.Generator().manual_seed(config.seed).get_state()
            self.register_buffer("generator", start.to(device))
        self.allocator: RankAllocator | None = None
        self.watch: ZWatch | None = None
        if "z_square" in needs(SCORES[config.score]):
            self.watch = ZWatch(list(layers.values()))
        self.found_total_step = False  # whether a trainer has filled it in
        self.dem_counted: set[str] = set()  # who added Eq. 10 to the gradients of this step
        self.register_load_state_dict_post_hook(_forget)

    def forget(self) -> None:
        """Make the allocator anew, from the buffers, when it is next asked for."""
        self.allocator = None
        if self.watch:
            self.watch.start()

    def resume(self, layers: dict[str, RankOneComponents], config: DrLoraConfig) -> RankAllocator:
        """An allocator that goes on where the buffers say; it is kept until forget().

        Raises ValueError without total_step, if the steps so far were under other settings, and as
        check_whole.
        """
        check_whole(layers)
        allocator = RankAllocator(layers, config.schedule(), config.beta, config.score, config.seed, self.watch)
        allocator.last_step = int(self.last_step)
        if allocator.last_step:
            settings = _checksum(allocator)
            if settings != int(self.settings):
                raise ValueError(
                    f"the adapter's {allocator.last_step} steps so far were taken with another "
                    f"schedule, beta or score than {allocator.schedule}, beta = {allocator.beta}, "
                    f"score = {allocator.score_name!r}: go on with those in its adapter_config.json"
                )
            allocator.ema = self.ema.clone()
            if hasattr(self, "generator"):
                allocator.generator.set_state(self.generator.cpu())
            allocator.counted.fill_(True)
        if self.watch and allocator.last_step >= allocator.schedule.t_end:
            self.watch.stop()
        self.allocator = allocator
        return allocator

    def count_dem(self, penalty: Tensor, by: str) -> Tensor:
        """The penalty (Eq. 10), which will be known to have counted once a gradient passes it."""

        def note(gradient: Tensor) -> None:
            self.dem_counted.add(by)

        if penalty.requires_grad:
            penalty.register_hook(note)
        return penalty

    def check_dem(self, allocator: RankAllocator, step: int) -> None:
        """Raise ValueError for a step on gradients without those of DEM, or with two adding it."""
        counted, self.dem_counted = self.dem_counted, set()
        if len(counted) > 1:
            raise ValueError(
                f"DEM is twice in the loss of step {step}: {' and '.join(sorted(counted))} add it: "
                "leave one of them out"
            )
        taken = any(layer.lora_c.grad is not None for layer in allocator.layers.values())
        if taken and not counted and not allocator.schedule.pruning_ended(step):
            raise ValueError(
                f"dem_weight is set, but step {step} was taken without DEM: add dem_weight * model.dem_loss()"
            )

    @torch.no_grad()
    def step(self, allocator: RankAllocator, global_step: int) -> None:
        """RankAllocator.step, remembered. Raises ValueError after the last step, too."""
        if global_step > allocator.schedule.total_steps:
            raise ValueError(
                f"step {global_step} of total_step = {allocator.schedule.total_steps}: the "
                "budget was spread over fewer steps than there are; give the true number"
            )
        allocator.step(global_step)
        self.last_step.fill_(global_step)
        if global_step == 1:
            self.settings.fill_(_checksum(allocator))
        self.ema.copy_(allocator.ema)
        if hasattr(self, "generator"):
            self.generator.copy_(allocator.generator.get_state())


def _forget(state: AllocatorState, _) -> None:
    # What was loaded counts from now on, so the next step makes a new allocator from it.
    state.forget()


def _checksum(allocator: RankAllocator) -> int:
    settings = asdict(allocator.schedule), allocator.beta, allocator.score_name
    return zlib.crc32(json.dumps(settings).encode())
