"""What takes the optimizer steps of R runs in one pass over one frozen encoder, on one device.

Read model.py first, and run/engine.py for one run. Each replica has its own rows, learning rate,
budget, mask and gradient norm; none can see another.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from drlora_ref.experiments.replicas.model import LABELS, Together, losses, replicated_layers
from drlora_ref.experiments.replicas.rows import PaddedRows
from drlora_ref.experiments.replicas.step import ReplicaAllocator
from drlora_ref.experiments.run.engine import hasten, warmed_up
from drlora_ref.experiments.run.graphs import (
    CapturedStep,
    Recorder,
    find_recorder,
    load_static,
    make_static,
    optimizer_tensors,
    smooth_in_place,
)
from drlora_ref.experiments.run.no_waits import OwnSpans, plain, without_waits
from drlora_ref.experiments.run.order import Numbers
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import Batch, Final, Inputs
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
        self.captured: CapturedStep | None = None
        self.tokens = 0
        recorder = find_recorder(self.device, 1) if self.shared.capture else (None, "")
        self.model = model.to(self.device).train()
        self.layers = replicated_layers(model)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.prunes = prunes
        self.gradients: list[Tensor] = []  # of what is trained, stacked
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
        uniform = [s.uniform for s in settings]
        self.allocator = ReplicaAllocator(
            self.layers, schedules, prunes, scores, self.shared.beta, seeds, uniform
        )
        if self.allocator.watch:
            self.allocator.watch.follow(model)
        weights = [s.dem_weight * prune for s, prune in zip(settings, prunes, strict=True)]
        self.penalises, self.weights = any(weights), torch.tensor(weights, device=self.device)
        self.rows = PaddedRows([own.train for own in inputs], inputs[0].collate)
        if hasattr(model, "qa_outputs"):
            OwnSpans(model, len(settings))
        hasten(model, self.shared)
        if self.shared.capture:
            self._capture(*recorder)

    def _capture(self, recorder: Recorder | None, why_not: str) -> None:
        """Take the steps by graphs, where there is what records them."""
        without_waits(self.model)
        make_static(self.optimizer)
        self.allocator.smooths = False
        self.smooths = torch.ones((), dtype=torch.bool, device=self.device)
        self.captured = CapturedStep(
            self._take,
            self._changing,
            self.device,
            self.shared.grad_accumulation,
            self.shared.batch_size * len(self.inputs),
            plain(self.model).config.pad_token_id,
            recorder,
            why_not,
        )

    def _changing(self) -> list[Tensor]:
        """All tensors that a step changes."""
        trained = [p.detach() for p in self.trainable.values()]
        return [*trained, *optimizer_tensors(self.optimizer), self.allocator.ema]

    def _views(self, i: int) -> list[nn.Parameter]:
        """Replica i of every trained tensor, and of its gradient: the same memory, not a copy."""
        views = []
        for name, stacked in self.trainable.items():
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
                self.gradients.append(stacked.grad)
            if name.endswith("lora_c") and not self.prunes[i]:
                continue  # LoRA's c is 1 and is not trained
            view = nn.Parameter(stacked.detach()[i])
            view.grad = stacked.grad[i]
            views.append(view)
        return views

    def optimizer_step(self, step: int, group: list[Numbers]) -> Tensor:
        """Lines 3-6 of Algorithm 1; (R, 2). Captured, lines 7 and 8 as well."""
        batches = [self.rows[numbers] for numbers in group]
        self.tokens += sum(map(self.rows.count_tokens, group))
        ended = self.schedule.pruning_ended(step)
        if ended:
            self.weights.zero_()
        if self.captured:
            self.smooths.fill_(not ended)
            if not ended:
                self.allocator.draw()
            numbers = self.captured(batches)
        else:
            self.penalises = self.penalises and not ended
            numbers = self._take([self._moved(batch) for batch in batches])
        self.rates.step()
        return numbers

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _take(self, batches: list[Batch]) -> Tensor:
        """A step on these batches, but for the learning rates; it asks for no value."""
        torch._foreach_zero_(self.gradients)
        rows = sum(len(batch["input_ids"]) for batch in batches)
        loss = torch.zeros(len(self.inputs), device=self.device)
        for batch in batches:
            read = {name: t for name, t in batch.items() if name not in LABELS}
            with self.accelerator.autocast():
                output = self.model(**read)
            part = losses(output, batch, len(self.inputs)) * (len(batch["input_ids"]) / rows)
            part.sum().backward()  # a sum of R losses, each of its own replica's parameters
            loss += part.detach()
        if self.penalises:
            (self.weights * self.allocator.penalty(self.shared.penalty)).sum().backward()
        limit = self.shared.max_grad_norm
        norms = [torch.nn.utils.clip_grad_norm_(own, limit) for own in self.views]
        self.optimizer.step()
        if self.captured:
            smooth_in_place(self.allocator, self.smooths)
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
            **({"capture": self.captured.about()} if self.captured else {}),
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
            "tokens": self.tokens,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        for name, stacked in self.trainable.items():
            stacked.copy_(state["trainable"][name])  # in place: the views see it
        load = load_static if self.captured else torch.optim.AdamW.load_state_dict
        load(self.optimizer, state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        self.allocator.load_state(state["allocator"])
        self.tokens = state["tokens"]
