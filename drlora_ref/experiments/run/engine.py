"""What takes a run's optimizer steps: any method, one model, on one device or on several."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from drlora_ref.allocator import Diverged, RankAllocator
from drlora_ref.events import Events, evenly_spread
from drlora_ref.experiments.methods import Prepared, count_trainable, rank_pattern
from drlora_ref.experiments.run.order import Numbers
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import Final, Inputs, share
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import linear_warmup_and_decay


class Engine(Protocol):
    """R ≥ 1 runs as the Loop sees them. The Loop says when something is due, the engine does it.

    Every list has an entry for each run, and so has the first dimension of a tensor.
    """

    def optimizer_step(self, step: int, group: list[Numbers]) -> Tensor:
        """Lines 3-6 of Algorithm 1 on these rows; (R, 2): loss and gradient norm.

        The numbers stay where they were computed: to fetch them makes a GPU wait. The gradients
        stay until the next step, since AdaLoRA's scores need them.
        """

    def allocate(self, step: int, live: list[bool]) -> list[bool]:
        """Lines 7-9, for the runs that are `live`: one that diverged keeps the mask it has.

        Returns whether each run's scores were finite; where one's were not, it keeps its mask too.
        """

    def kept(self) -> list[int | None]:
        """Surviving components of each run; None where the method never prunes."""

    def evaluate(self) -> list[dict]:
        """What the task's own evaluation says of each run."""

    def final(self) -> list[Final]:
        """What each run's last model says of the rows held out, and of every example."""

    def outcome(self, run: int) -> dict:
        """rank_pattern, trainable_parameters and trained_bytes of one run, for its record."""

    def events(self, run: int) -> Events | None:
        """Scores and masks at the pruning events that one run keeps; None if it keeps none."""

    def state(self) -> dict[str, Any]:
        """All that decides the next step and is not the Loop's, for a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""


class OneModel:
    """One run: R = 1.

    Several processes train as one: each takes its share of every batch, gradients are averaged by
    the number of examples, masks follow from scores that are the same everywhere. So batch_size
    is the whole batch, however many devices there are.
    """

    def __init__(
        self,
        prepared: Prepared,
        inputs: Inputs,
        schedule: BudgetSchedule,
        settings: Settings,
        accelerator: Accelerator,
    ):
        self.prepared, self.inputs, self.accelerator = prepared, inputs, accelerator
        self.max_grad_norm = settings.max_grad_norm
        self.plain = prepared.model  # without the wrapper that several processes need
        self.model = accelerator.prepare_model(prepared.model).train()
        self.trainable = {n: p for n, p in self.plain.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.rates = warmed_up(self.optimizer, settings.warmup, schedule.total_steps)
        self.kept_events, self.kept_at = Events(), evenly_spread(schedule, settings.film_events)

    def optimizer_step(self, step: int, group: list[Numbers]) -> Tensor:
        """Lines 3-6 of Algorithm 1 on all devices; (1, 2), the loss averaged over them."""
        self.optimizer.zero_grad()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = [self.inputs.train.__getitems__(numbers) for (numbers,) in group]
        batches = [self.inputs.collate(some) for some in rows]
        weights = [share(batch, 0, 1)[1] for batch in batches]
        loss = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            mine, part = share(batch, rank, processes)
            # Gradients are averaged over the processes, hence the factor.
            factor = part * processes / sum(weights)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                mine = {name: t.to(self.accelerator.device) for name, t in mine.items()}
                part_of_loss = self.model(**mine).loss * factor
                loss += part_of_loss.detach()
                # A term of the weights alone is added once, or it would count once a micro-batch.
                add = last and self.prepared.loss_term
                term = self.prepared.loss_term(step) if add else None
                self.accelerator.backward(part_of_loss if term is None else part_of_loss + term)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.max_grad_norm)
        self.optimizer.step()
        self.rates.step()
        if processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        return torch.stack([loss, norm]).unsqueeze(0)

    def allocate(self, step: int, live: list[bool]) -> list[bool]:
        """Lines 7-9 of Algorithm 1, where the method has an allocator."""
        try:
            if self.prepared.allocator:
                self.prepared.allocator.step(step)
            if step in self.kept_at:
                self.kept_events.add(step, cast(RankAllocator, self.prepared.allocator))
        except Diverged:
            return [False]
        return [True]

    def kept(self) -> list[int | None]:
        """Surviving components in all; None without an allocator."""
        return [sum(self._ranks().values()) if self.prepared.allocator else None]

    def _ranks(self) -> dict[str, int]:
        return rank_pattern(self.prepared)

    def evaluate(self) -> list[dict]:
        """As Engine's."""
        return self._asked(self.inputs.evaluate)

    def final(self) -> list[Final]:
        """As Engine's."""
        return self._asked(self.inputs.final)

    def _asked(self, question: Callable[[nn.Module], Any]) -> list:
        """The main process asks the model, the others wait for what it found."""
        found: list = [None]
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                found = [question(self.plain)]
        return broadcast_object_list(found)

    def outcome(self, run: int) -> dict:
        """As Engine's."""
        return {
            "rank_pattern": self._ranks(),
            "trainable_parameters": count_trainable(self.prepared),
            "trained_bytes": sum(p.numel() * p.element_size() for p in self.trainable.values()),
        }

    def events(self, run: int) -> Events | None:
        """As Engine's."""
        return self.kept_events if self.kept_at else None

    def state(self) -> dict[str, Any]:
        """Trained weights, optimizer, learning rate, allocator, events; not the frozen weights."""
        allocator = self.prepared.allocator
        return {
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "allocator": allocator.state_dict() if allocator else None,
            "events": vars(self.kept_events),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        for name, parameter in self.trainable.items():
            parameter.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if self.prepared.allocator:
            self.prepared.allocator.load_state_dict(state["allocator"])
        self.kept_events = Events(**state["events"])


def warmed_up(optimizer: torch.optim.Optimizer, warmup: float, total_steps: int) -> LambdaLR:
    """Learning rates that rise in the first `warmup` (a share of all steps), then fall to 0."""
    warmup_steps = int(warmup * total_steps)
    return LambdaLR(optimizer, lambda t: linear_warmup_and_decay(t, warmup_steps, total_steps))
