"""What takes the optimizer steps of R runs in one pass over one frozen encoder, on one device.

Read model.py first, and run/engine.py for one run. Each replica has its own rows, learning rate,
budget, mask and gradient norm; none can see another.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from drlora_ref.experiments.replicas.model import Together, losses, replicated_layers
from drlora_ref.experiments.replicas.rows import PaddedRows
from drlora_ref.experiments.replicas.step import ReplicaAllocator
from drlora_ref.experiments.run.engine import warmed_up
from drlora_ref.experiments.run.order import Numbers
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import Final, Inputs
from drlora_ref.inject import in_head
from drlora_ref.schedule import BudgetSchedule


class Replicas:
    """R runs on one encoder.

    `model` is what model.replicate made. inputs, schedules and settings have an entry for each run;
    `prunes` is False for LoRA's. What all have in common is read from the first.

    Every trained tensor is stacked, (R, ...). The optimizer sees R groups of views into them, one
    tensor of each, with its own learning rate: so AdamW, clipping and the schedule are torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: list[Inputs],
        schedules: list[BudgetSchedule],
        settings: list[Settings],
        prunes: list[bool],
        accelerator: Accelerator,
    ):
        self.inputs, self.schedule, self.shared = inputs, schedules[0], settings[0]
        self.accelerator, self.device = accelerator, accelerator.device
        self.model = model.to(self.device).train()
        self.layers = replicated_layers(model)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.prunes = prunes
        self.views = [self._views(i) for i in range(len(settings))]
        groups = [
            {"params": own, "lr": one.learning_rate}
            for own, one in zip(self.views, settings, strict=True)
        ]
        # Fused: one call for all R times so many small tensors.
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=self.shared.weight_decay, fused=True
        )
        self.rates = warmed_up(self.optimizer, self.shared.warmup, self.schedule.total_steps)
        scores, seeds = [s.score for s in settings], [s.seed for s in settings]
        self.allocator = ReplicaAllocator(
            self.layers, schedules, prunes, scores, self.shared.beta, seeds
        )
        if self.allocator.watch:
            self.allocator.watch.follow(model)
        weights = [s.dem_weight * prune for s, prune in zip(settings, prunes, strict=True)]
        self.penalises, self.weights = any(weights), torch.tensor(weights, device=self.device)
        self.rows = PaddedRows([own.train for own in inputs], inputs[0].collate)

    def _views(self, i: int) -> list[nn.Parameter]:
        """Replica i of every trained tensor, and of its gradient: the same memory, not a copy."""
        views = []
        for name, stacked in self.trainable.items():
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
            if name.endswith("lora_c") and not self.prunes[i]:
                continue  # LoRA's c is 1 and is not trained
            view = nn.Parameter(stacked.detach()[i])
            view.grad = stacked.grad[i]
            views.append(view)
        return views

    def optimizer_step(self, step: int, group: list[Numbers]) -> Tensor:
        """Lines 3-6 of Algorithm 1; (R, 2)."""
        torch._foreach_zero_([stacked.grad for stacked in self.trainable.values()])
        batches = [self.rows[numbers] for numbers in group]
        rows = sum(len(batch["labels"]) for batch in batches)
        loss = torch.zeros(len(self.inputs), device=self.device)
        for batch in batches:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            part = losses(logits, labels, len(self.inputs)) * (len(labels) / rows)
            part.sum().backward()  # a sum of R losses, each of its own replica's parameters
            loss += part.detach()
        if self.penalises and not self.schedule.pruning_ended(step):
            (self.weights * self.allocator.penalty(self.shared.penalty)).sum().backward()
        limit = self.shared.max_grad_norm
        norms = [torch.nn.utils.clip_grad_norm_(own, limit) for own in self.views]
        self.optimizer.step()
        self.rates.step()
        return torch.stack([loss, torch.stack(norms)], dim=1)

    def allocate(self, step: int, live: list[bool]) -> list[bool]:
        """Lines 7-9 of Algorithm 1."""
        return self.allocator.step(step, live)

    def kept(self) -> list[int | None]:
        """As Engine's; LoRA's replicas never prune."""
        kept = self.allocator.ranks().sum(dim=0).tolist()
        return [n if prune else None for n, prune in zip(kept, self.prunes, strict=True)]

    def evaluate(self) -> list[dict]:
        """The task's own evaluation of each replica, computed in one pass for all."""
        together = Together(self.model, len(self.inputs))
        with self.accelerator.autocast():
            return [own.evaluate(together.of(i)) for i, own in enumerate(self.inputs)]

    def final(self) -> list[Final]:
        """As Engine's, in one pass too."""
        together = Together(self.model, len(self.inputs))
        with self.accelerator.autocast():
            return [own.final(together.of(i)) for i, own in enumerate(self.inputs)]

    def outcome(self, run: int) -> dict:
        """As Engine's, the same numbers as of the run alone: padding does not count."""
        ranks = dict(zip(self.layers, self.allocator.ranks()[:, run].tolist(), strict=True))
        sizes = {n: m.lora_A.shape[2] + m.lora_B.shape[1] for n, m in self.layers.items()}
        head = [p[run] for name, p in self.trainable.items() if in_head(name)]
        began_with = self.allocator.alive[:, run].sum(dim=1).tolist()  # components of each matrix
        c = int(self.prunes[run])
        numbers = sum(r * (size + c) for r, size in zip(began_with, sizes.values(), strict=True))
        size_of_head = sum(p.numel() for p in head)
        return {
            "rank_pattern": ranks,
            "trainable_parameters": {
                "adapter": sum(ranks[name] * sizes[name] for name in ranks),
                "head": size_of_head,
            },
            "trained_bytes": 4 * (numbers + size_of_head),  # all of them float32
        }

    def events(self, run: int) -> None:
        """None: runs that keep events cannot be replicas."""

    def state(self) -> dict[str, Any]:
        """As Engine's."""
        return {
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "allocator": self.allocator.state(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        for name, stacked in self.trainable.items():
            stacked.copy_(state["trainable"][name])  # in place: the views see it
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.allocator.load_state(state["allocator"])
