"""Algorithm 1 for R replicas: one score vector, budget and mask for each of them.

Scores, smoothing, selection and penalties are the package's own functions, which broadcast over a
leading dimension; new is that budget and criterion differ from replica to replica.
"""

from typing import Any, cast

import torch
from torch import Tensor

from drlora_ref.allocator import (
    needs,
    seen_by_the_step,
    select_components,
    spread_evenly,
    zero_pruned,
)
from drlora_ref.experiments.replicas.model import ReplicatedLoRALinear
from drlora_ref.importance import SCORES, ema_update
from drlora_ref.layer import stack_by_shape
from drlora_ref.regularizer import PENALTIES
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.watch import ZWatch

BELOW_EVERY_SCORE = -1.0  # scores are norms or shares of norms: 0 is the least


class ReplicaAllocator:
    """RankAllocator for R replicas; shapes (R, N), with N = layers · r, r the largest init_r.

    All prune at the same steps, with the schedules' own counts. LoRA's replicas keep all that they
    have.

    Padding: a replica with a smaller init_r than r has rows of zeros behind its components, so that
    all fit into one tensor; with a rank map, more of them in one matrix than in another. They are
    no components: `alive` (layers, R, r) is False for them, they are ranked below every score, and
    no budget counts them.
    """

    def __init__(
        self,
        layers: dict[str, ReplicatedLoRALinear],
        schedules: list[BudgetSchedule],
        prunes: list[bool],
        scores: list[str],
        beta: float,
        seeds: list[int],
        uniform: list[bool],
    ):
        self.layers, self.schedules, self.beta = layers, schedules, beta
        self.score_names = scores
        self.alive = torch.stack([layer.component_mask for layer in layers.values()])
        self.criteria = {  # each once: whose it is, (R, 1)
            name: torch.tensor([[score == name] for score in scores], device=self.alive.device)
            for name in scores
        }
        self.prunes = torch.tensor(prunes, device=self.alive.device)
        self.uniform = torch.tensor(uniform, device=self.alive.device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.needs = set().union(*(needs(SCORES[name]) for name in scores))
        self.watch = ZWatch(list(layers.values())) if "z_square" in self.needs else None
        self.smooths = True  # False: the training step does it itself, as a captured one
        n = self.alive.shape[2] * len(layers)
        self.ema = torch.zeros(len(prunes), n, device=self.alive.device)
        stacks = self._stacks()
        self.drawn = [torch.zeros_like(c) for _, (_, _, c) in stacks]  # of the score "random"
        self.alive_in = [self.alive[members] for members, _ in stacks]

    def _stacks(self) -> list[tuple[list[int], tuple[Tensor, ...]]]:
        """Layers of one shape, stacked: (layers, R, r, d_in), (layers, R, d_out, r), ..."""
        return stack_by_shape(cast(list, list(self.layers.values())))

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the step's random scores; a single run draws so for its own components.

        On the CPU, each replica from its own generator: so it is done before a captured step.
        """
        if "random" not in self.score_names:
            return
        for values in self.drawn:
            drawn = torch.zeros_like(values, device="cpu")
            for i, name in enumerate(self.score_names):
                if name == "random":
                    own = drawn[:, i, : self.schedules[i].init_r]
                    own.copy_(SCORES["random"](None, None, own, self.generators[i]))
            values.copy_(drawn)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Each replica's components by its own criterion: (R, N), by position; padding scores 0.

        Random scores are those that were drawn last.
        """
        given = seen_by_the_step(self.layers, self.needs, self.watch)
        by_layer: dict[int, Tensor] = {}
        stacks = self._stacks()
        for (members, (A, B, c)), drawn, alive in zip(
            stacks, self.drawn, self.alive_in, strict=True
        ):  # (layers, R, r, d)
            chosen = torch.zeros_like(c)
            seen = {name: torch.stack([each[i] for i in members]) for name, each in given.items()}
            for name, mine in self.criteria.items():
                own = {need: seen[need] for need in needs(SCORES[name])}
                values = drawn if name == "random" else SCORES[name](A, B, c, **own)
                chosen = torch.where(mine, values, chosen)
            by_layer.update(zip(members, chosen * alive, strict=True))
        return torch.cat([by_layer[i] for i in range(len(by_layer))], dim=1)

    @torch.no_grad()
    def step(self, global_step: int, live: list[bool]) -> list[bool]:
        """Lines 7-9 of Algorithm 1, after optimizer step number global_step.

        A replica that is not `live` has diverged: it keeps the mask that it has. So does one whose
        scores are not finite at a pruning event. Returns whether each one's were.
        """
        schedule = self.schedules[0]  # the steps are those of all
        if schedule.pruning_ended(global_step):
            if self.watch and self.watch.on and self.smooths:
                self.watch.stop()
            zero_pruned(self.layers)
        else:
            if self.smooths:
                self.draw()
                self.ema = ema_update(self.ema, self.scores(), self.beta)
            if schedule.prunes_at(global_step):
                return self._prune(global_step, torch.tensor(live, device=self.ema.device))
        return [True] * len(live)

    def _prune(self, global_step: int, live: Tensor) -> list[bool]:
        layers = len(self.layers)
        keep = [s.keep_count(global_step, layers * s.init_r) for s in self.schedules]
        sound = self.ema.isfinite().all(dim=1)
        padding = ~self.alive.transpose(0, 1).flatten(1)  # (R, N)
        ranked = self.ema.where(sound.unsqueeze(1), 0.0)  # the others' order does not matter
        ranked = ranked.masked_fill(padding, BELOW_EVERY_SCORE)
        best = select_components(ranked, torch.tensor(keep))
        if self.uniform.any():
            even = spread_evenly(ranked.unflatten(1, (layers, -1)))
            own = select_components(even, torch.tensor(keep))
            best = torch.where(self.uniform.unsqueeze(1), own, best)
        # LoRA's replicas and diverged ones: nothing changes, so their old mask is the new one.
        changes = (self.prunes & live & sound).unsqueeze(1)
        for layer, part in zip(self.layers.values(), best.chunk(layers, dim=1), strict=True):
            layer.component_mask.copy_(torch.where(changes, part, layer.component_mask))
        zero_pruned(self.layers)
        return (sound | ~self.prunes).tolist()  # LoRA has no scores

    def ranks(self) -> Tensor:
        """Surviving components of every layer: (layers, R)."""
        return torch.stack([m.component_mask.sum(dim=1) for m in self.layers.values()])

    def penalty(self, name: str) -> Tensor:
        """R of Eq. 10, or the rival of this name, one for each replica, with gradient: (R,)."""
        total = sum(
            PENALTIES[name](A, B).sum(dim=0) * A.shape[-2]  # means over r, padding included
            for _, (A, B, _) in self._stacks()
        )
        return total / self.alive.sum(dim=(0, 2))

    def state(self) -> dict[str, Any]:
        """All that decides the next step, for a checkpoint."""
        return {
            "masks": [layer.component_mask for layer in self.layers.values()],
            "ema": self.ema,
            "generators": [own.get_state() for own in self.generators],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        for layer, saved in zip(self.layers.values(), state["masks"], strict=True):
            layer.component_mask.copy_(saved)
        self.ema.copy_(state["ema"])
        for own, saved in zip(self.generators, state["generators"], strict=True):
            own.set_state(saved)
