"""The parts of a step that have a number for each replica: clipping, AdamW, Algorithm 1.

Scores, smoothing, selection and DEM are the package's own functions, which broadcast over a leading
dimension; new is that learning rate, budget and criterion differ from replica to replica.
"""

import math

import torch
from torch import Tensor, nn

from drlora_ref.allocator import select_components, zero_pruned
from drlora_ref.experiments.replicas.model import ReplicatedLoRALinear
from drlora_ref.importance import SCORES, ema_update
from drlora_ref.layer import stack_by_shape
from drlora_ref.regularizer import dem_penalty
from drlora_ref.schedule import BudgetSchedule


class ReplicaAdamW:
    """AdamW with a learning rate for each replica: every parameter is (R, ...).

    torch's own has one learning rate for a whole tensor. Same arithmetic otherwise: betas 0.9 and
    0.999, eps 1e-8, decay apart from the gradient.
    """

    def __init__(self, parameters: list[nn.Parameter], rates: Tensor, weight_decay: float):
        self.parameters, self.rates, self.weight_decay = parameters, rates, weight_decay
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]
        self.t = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times each replica's learning rate."""
        self.t += 1
        gradients = [p.grad for p in self.parameters]
        torch._foreach_lerp_(self.m, gradients, 1 - 0.9)
        torch._foreach_mul_(self.v, 0.999)
        torch._foreach_addcmul_(self.v, gradients, gradients, 1 - 0.999)
        root = torch._foreach_sqrt(self.v)
        torch._foreach_div_(root, math.sqrt(1 - 0.999**self.t))
        torch._foreach_add_(root, 1e-8)
        moves = torch._foreach_div(self.m, root)
        for p, move in zip(self.parameters, moves, strict=True):
            rate = (factor * self.rates).reshape(-1, *[1] * (p.dim() - 1))
            p.mul_(1 - rate * self.weight_decay).sub_(move * (rate / (1 - 0.9**self.t)))


class ReplicaAllocator:
    """RankAllocator for R replicas: one score vector, budget and mask each, shapes (R, N).

    All prune at the same steps, with the schedules' own counts. LoRA's replicas keep what they
    have. A replica whose scores are not finite keeps an arbitrary mask; the others never see it.
    """

    def __init__(
        self,
        layers: dict[str, ReplicatedLoRALinear],
        schedules: list[BudgetSchedule],
        prunes: list[bool],
        scores: list[str],
        beta: float,
        seeds: list[int],
    ):
        self.layers, self.schedules, self.scores, self.beta = layers, schedules, scores, beta
        first = next(iter(layers.values()))
        self.alive = first.component_mask.clone()  # (R, r): what is no padding, in every layer
        self.prunes = torch.tensor(prunes, device=self.alive.device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        n = self.alive.shape[1] * len(layers)
        self.ema = torch.zeros(len(prunes), n, device=self.alive.device)

    @torch.no_grad()
    def hold_c_of_lora(self) -> None:
        """LoRA's c is 1 and has no gradient; before clipping, whose length it must not be in."""
        gradients = [m.lora_c.grad for m in self.layers.values()]
        torch._foreach_mul_(gradients, [self.prunes[:, None]] * len(gradients))

    @torch.no_grad()
    def score(self) -> Tensor:
        """Each replica's components by its own criterion: (R, N), by position; padding scores 0."""
        by_layer = {}
        for members, (A, B, c) in stack_by_shape(list(self.layers.values())):  # (layers, R, r, d)
            chosen = torch.zeros_like(c)
            for name in {*self.scores}:
                mine = torch.tensor([score == name for score in self.scores], device=c.device)
                values = self._random(c) if name == "random" else SCORES[name](A, B, c)
                chosen = torch.where(mine[:, None], values, chosen)
            by_layer.update(zip(members, chosen * self.alive, strict=True))
        return torch.cat([by_layer[i] for i in range(len(by_layer))], dim=1)

    def _random(self, c: Tensor) -> Tensor:
        # A single run draws for its own number of components, each from its own generator.
        drawn = torch.zeros_like(c, device="cpu")
        for i, name in enumerate(self.scores):
            if name == "random":
                own = drawn[:, i, : self.schedules[i].init_r]
                own.copy_(SCORES["random"](None, None, own, self.generators[i]))
        return drawn.to(c.device)

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """Lines 7-9 of Algorithm 1, after optimizer step number global_step, for every replica."""
        schedule = self.schedules[0]  # the steps are those of all
        if schedule.pruning_ended(global_step):
            return zero_pruned(self.layers)
        scores = self.score()
        self.ema = ema_update(self.ema, scores.where(scores.isfinite(), 0.0), self.beta)
        if schedule.prunes_at(global_step):
            layers = len(self.layers)
            keep = [s.keep_count(global_step, layers * s.init_r) for s in self.schedules]
            padding = self.alive.repeat(1, layers).logical_not()
            ranked = self.ema.masked_fill(padding, -1.0)  # below every score there is
            mask = select_components(ranked, torch.tensor(keep)) | ~self.prunes[:, None]
            for layer, part in zip(self.layers.values(), mask.chunk(layers, 1), strict=True):
                layer.component_mask.copy_(part & self.alive)
            zero_pruned(self.layers)

    def ranks(self) -> Tensor:
        """Surviving components of every layer: (layers, R)."""
        return torch.stack([m.component_mask.sum(dim=1) for m in self.layers.values()])

    def dem(self) -> Tensor:
        """R of Eq. 10, one for each replica, with gradient: (R,)."""
        total = sum(
            dem_penalty(A, B).sum(dim=0) * A.shape[-2]  # means over r, padding included
            for _, (A, B, _) in stack_by_shape(list(self.layers.values()))
        )
        return total / (len(self.layers) * self.alive.sum(dim=1))


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Cut each replica's gradient, over all its parameters, to max_norm; its length before: (R,).

    torch.nn.utils.clip_grad_norm_ with one norm for each replica.
    """
    parts = [torch.linalg.vector_norm(p.grad.flatten(1), dim=1) for p in parameters]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for p in parameters:
        p.grad.mul_(factors.reshape(-1, *[1] * (p.dim() - 1)))
    return norms


def rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the highest learning rate in step 1, 2, ..., T: linear rise, linear fall.

    As transformers' get_linear_schedule_with_warmup, which counts from 0.

    >>> [round(rate_factor(t, 2, 6), 2) for t in range(1, 7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    done = step - 1
    if done < warmup_steps:
        return done / max(1, warmup_steps)
    return (total_steps - done) / max(1, total_steps - warmup_steps)
