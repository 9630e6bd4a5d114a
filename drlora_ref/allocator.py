"""Algorithm 1, lines 7-9: score, smooth, and keep the best components over all layers."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from drlora_ref.importance import SCORES, ema_update, random_scores
from drlora_ref.layer import RankOneComponents, dynamic_layers, stack_by_shape
from drlora_ref.precision import at_least_float32
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.watch import ZWatch


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

    >>> select_components(torch.tensor([0.2, 0.9, 0.2, 0.1]), keep=2)
    tensor([ True,  True, False, False])
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

    >>> even = spread_evenly(torch.tensor([[0.9, 0.8, 0.7], [0.3, 0.1, 0.2]]))
    >>> select_components(even, keep=3).view(2, 3).tolist()
    [[True, True, False], [True, False, False]]
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


def check_scoring(score: str | Callable, beta: float) -> None:
    """Raise ValueError for a score that is no name and no function, or a beta outside [0, 1).

    >>> check_scoring("frobenius_share", beta=0.9)
    """
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score = {score!r}: must be one of {', '.join(SCORES)}")
    if not isinstance(score, str) and not callable(score):
        raise ValueError(f"score = {score!r}: must be a function or one of {', '.join(SCORES)}")
    if not isinstance(beta, Real) or not 0 <= beta < 1:
        raise ValueError(f"beta = {beta!r}: must be at least 0 and less than 1")


def check_next_step(global_step: int, last_step: int) -> None:
    """Raise ValueError unless this step follows the last one: else an event would be missed.

    >>> check_next_step(1, last_step=0)
    """
    if global_step != last_step + 1:
        raise ValueError(
            f"step({global_step}) after step {last_step}: call it once after every optimizer step, "
            "and load_state_dict before going on from a checkpoint"
        )


def needs(score: Callable) -> set[str]:
    """What a score asks for by name beyond (lora_A, lora_B, lora_c): z_square, c_grad, or nothing.

    >>> [sorted(needs(SCORES[name])) for name in ("frobenius_share", "output_norm")]
    [[], ['z_square']]
    """
    return {"z_square", "c_grad"} & inspect.signature(score).parameters.keys()


def seen_by_the_step(
    layers: dict[str, Any], names: set[str], watch: ZWatch | None
) -> dict[str, Sequence[Tensor]]:
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

    >>> c_gradients({"query": RankOneComponents(2, 2, r=1)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: no layer's lora_c has a gradient: call the allocator after optimizer.step() and ...
    """
    cs = [layer.lora_c for layer in layers.values()]
    if all(c.grad is None for c in cs):
        raise ValueError(
            "no layer's lora_c has a gradient: call the allocator after optimizer.step() and "
            "before optimizer.zero_grad()"
        )
    return [torch.zeros_like(c) if c.grad is None else c.grad for c in cs]


def unreached(layers: dict[str, Any]) -> set[str]:
    """The layers whose c no gradient has reached; none if c has no gradient in any layer.

    >>> unreached({"query": RankOneComponents(2, 2, r=1)})
    set()
    """
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

    >>> from drlora_ref.layer import DynamicLoRALinear
    >>> model = nn.Sequential(*[DynamicLoRALinear(nn.Linear(4, 4), r=3) for _ in range(2)])
    >>> for layer, c in zip(model, ([9.0, 9.0, 0.1], [8.0, 0.2, 0.1])):
    ...     layer.lora_c.data = torch.tensor(c)
    >>> allocator = RankAllocator(model, BudgetSchedule(3, 1, 2, tinit=0), score="abs_c")
    >>> allocator.step(1)  # t_end: two of six components may stay
    >>> allocator.rank_pattern()
    {'0': 2, '1': 0}
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
            raise ValueError("the model has no DynamicLoRALinear: call inject_adapters first")
        check_scoring(score, beta)
        if not isinstance(uniform, bool):
            raise ValueError(f"uniform = {uniform!r}: must be True or False")
        self.sizes = [layer.lora_c.numel() for layer in self.layers.values()]
        for r in self.sizes:
            if r != schedule.init_r:
                raise ValueError(f"init_r = {schedule.init_r}, but the layers have r = {r}")

        self.score_name = (
            score if isinstance(score, str) else getattr(score, "__name__", repr(score))
        )
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
            own = {
                name: at_least_float32(torch.stack([each[i] for i in members]))
                for name, each in given.items()
            }
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
