"""R runs in one pass: loop.py's run with a leading dimension, on one device.

Read drlora_ref/train.py, then model.py and step.py. Each replica has its own order of
the data, learning rate, budget, mask and verdict; one that is NaN or infinite ends, and the others
never know. Evaluation is the task's own function, over all of them in one pass.
"""

import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from drlora_ref.experiments.replicas import model as replicas
from drlora_ref.experiments.replicas.rows import PaddedRows
from drlora_ref.experiments.replicas.step import (
    ReplicaAdamW,
    ReplicaAllocator,
    clip_gradients,
    rate_factor,
)
from drlora_ref.experiments.run.checkpoints import Checkpoint, random_state, set_random_state
from drlora_ref.inject import in_head
from drlora_ref.train import CHECK_EVERY, count_steps, verdict


class ReplicaLoop:
    """All replicas from their first step, or their checkpoint, to the last.

    `model` is what replicas.replicate made; `jobs` are the runs as runs.set_up gives them; `prunes`
    is False for LoRA's. What all have in common is read from the first.
    """

    def __init__(self, model: nn.Module, jobs: list, prunes: list[bool], checkpoint: Checkpoint):
        self.inputs, self.schedules = [j.inputs for j in jobs], [j.schedule for j in jobs]
        settings, accelerator = [job.settings for job in jobs], jobs[0].accelerator
        self.accelerator, self.checkpoint = accelerator, checkpoint
        self.device = accelerator.device
        self.model = model.to(self.device)
        self.shared, self.schedule = settings[0], self.schedules[0]
        self.layers = replicas.replicated_layers(model)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rates = torch.tensor([s.learning_rate for s in settings], device=self.device)
        self.optimizer = ReplicaAdamW(
            list(self.trainable.values()), rates, self.shared.weight_decay
        )
        self.allocator = ReplicaAllocator(
            self.layers,
            self.schedules,
            prunes,
            [s.score for s in settings],
            self.shared.beta,
            [s.seed for s in settings],
        )
        self.prunes = prunes
        weights = [s.dem_weight * prune for s, prune in zip(settings, prunes, strict=True)]
        self.adds_dem = any(weights)
        self.dem_weights = torch.tensor(weights, device=self.device)
        self.orders = [torch.Generator().manual_seed(s.seed) for s in settings]
        self.loaders = [  # of row numbers; shuffled as the single run shuffles its rows
            DataLoader(
                range(len(own.train)),
                self.shared.batch_size,
                shuffle=True,
                generator=order,
                collate_fn=list,
            )
            for own, order in zip(self.inputs, self.orders, strict=True)
        ]
        self.rows = PaddedRows([own.train for own in self.inputs], self.inputs[0].collate)
        self.step, self.epoch, self.step_in_epoch = 0, 1, 0
        self.orders_at_epoch_start = [order.get_state() for order in self.orders]
        self.health: list[list] = []  # of each step: (R, 2), loss and gradient norm
        self.unread: list[Tensor] = []
        self.flagged: list[int | None] = [None] * len(jobs)  # the first step that was not finite
        self.evaluations: list[list[dict]] = [[] for _ in jobs]
        self.kept: list[list] = [[] for _ in jobs]
        self.before: list[dict] = []
        self.seconds = self.evaluation_seconds = 0.0

    def run(self) -> list[dict]:
        """Train to the end; returns what loop.Loop.run returns, for each replica."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._resume()
        if not self.before:
            self.before = self._evaluate()
        started, T = time.perf_counter() - self.seconds, self.schedule.total_steps
        steps_per_epoch = count_steps(
            len(self.inputs[0].train), self.shared.batch_size, 1, self.shared.grad_accumulation
        )
        self.model.train()
        bar = tqdm(total=T, initial=self.step, disable=None, desc=f"{len(self.inputs)} replicas")
        groups, every = self._groups(), self.shared.checkpoint_every
        while self.step < T and not all(self.flagged):
            self.step += 1
            self.unread.append(self._optimizer_step(next(groups)))
            evaluation_due = self.step % steps_per_epoch == 0 or self.step == T
            save_due = evaluation_due or (every and self.step % every == 0)
            if save_due or self.step % CHECK_EVERY == 0 or self.schedule.prunes_at(self.step):
                self._read_health()
            self._allocate()
            if evaluation_due:
                self._note_evaluations()
            self.seconds = time.perf_counter() - started
            if save_due:
                self._save()
            bar.update()
        bar.close()
        return [self._result(i) for i in range(len(self.inputs))]

    def _groups(self) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of one optimizer step after another, those of all replicas together."""
        k = self.shared.grad_accumulation
        while True:
            batches = zip(*self.loaders, strict=True)
            batches = itertools.islice(batches, self.step_in_epoch * k, None)
            while group := list(itertools.islice(batches, k)):
                self.step_in_epoch += 1
                yield [self.rows[numbers] for numbers in group]
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.orders_at_epoch_start = [order.get_state() for order in self.orders]

    def _optimizer_step(self, group: list[dict[str, Tensor]]) -> Tensor:
        """Lines 3-6 of Algorithm 1; (R, 2), losses and gradient norms, without waiting."""
        rows = sum(len(batch["labels"]) for batch in group)
        loss = torch.zeros(len(self.inputs), device=self.device)
        for batch in group:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            part = replicas.losses(logits, labels, len(self.inputs)) * (len(labels) / rows)
            part.sum().backward()  # a sum of R losses, each of its own replica's parameters
            loss += part.detach()
        if self.adds_dem and not self.schedule.pruning_ended(self.step):
            (self.dem_weights * self.allocator.dem()).sum().backward()
        if not all(self.prunes):
            self.allocator.hold_c_of_lora()
        norms = clip_gradients(self.optimizer.parameters, self.shared.max_grad_norm)
        T = self.schedule.total_steps
        self.optimizer.step(rate_factor(self.step, int(self.shared.warmup * T), T))
        self.model.zero_grad()
        return torch.stack([loss, norms], dim=1)

    def _read_health(self) -> None:
        """Fetch the numbers of the steps since the last look, and flag what is not finite."""
        for step, row in enumerate(torch.stack(self.unread).tolist(), len(self.health) + 1):
            for i, numbers in enumerate(row):
                if self.flagged[i] is None and not all(map(math.isfinite, numbers)):
                    self.flagged[i] = step
                    print(f"replica {i} diverged at step {step}; the others go on")
            self.health.append(row)
        self.unread = []

    def _allocate(self) -> None:
        self.allocator.step(self.step)
        if self.schedule.prunes_at(self.step):
            for i, kept in enumerate(self.allocator.ranks().sum(dim=0).tolist()):
                if self.prunes[i] and self.flagged[i] is None:
                    self.kept[i].append([self.step, kept])

    def _note_evaluations(self) -> None:
        before = time.perf_counter()
        for i, found in enumerate(self._evaluate()):
            if self.flagged[i] is None:
                at = {"step": self.step, "epoch": self.epoch}
                self.evaluations[i].append(at | found)
        self.evaluation_seconds += time.perf_counter() - before
        metrics = ", ".join(f"{e[-1]['metric']:.4f}" if e else "none" for e in self.evaluations)
        print(f"step {self.step} of {self.schedule.total_steps}, epoch {self.epoch}: {metrics}")

    def _evaluate(self) -> list[dict]:
        together = replicas.Together(self.model, len(self.inputs))
        with self.accelerator.autocast():
            return [own.evaluate(together.of(i)) for i, own in enumerate(self.inputs)]

    def _save(self) -> None:
        self.checkpoint.save(
            {
                "position": (self.step, self.epoch, self.step_in_epoch),
                "orders": self.orders_at_epoch_start,
                "random": random_state(),
                "trainable": {n: p.detach() for n, p in self.trainable.items()},
                "optimizer": (self.optimizer.t, self.optimizer.m, self.optimizer.v),
                "masks": [layer.component_mask for layer in self.layers.values()],
                "ema": self.allocator.ema,
                "generators": [g.get_state() for g in self.allocator.generators],
                "health": (self.health, self.flagged),
                "seen": (self.before, self.evaluations, self.kept),
                "seconds": (self.seconds, self.evaluation_seconds),
            }
        )

    @torch.no_grad()
    def _resume(self) -> None:
        state = self.checkpoint.load()
        if state is None:
            return
        self.step, self.epoch, self.step_in_epoch = state["position"]
        self.orders_at_epoch_start = state["orders"]
        generators = self.orders + self.allocator.generators
        for generator, saved in zip(generators, state["orders"] + state["generators"], strict=True):
            generator.set_state(saved)
        self.optimizer.t, m, v = state["optimizer"]
        masks = [layer.component_mask for layer in self.layers.values()]
        here = [*self.trainable.values(), *self.optimizer.m, *self.optimizer.v, *masks]
        there = [*state["trainable"].values(), *m, *v, *state["masks"]]
        for tensor, saved in zip([*here, self.allocator.ema], [*there, state["ema"]], strict=True):
            tensor.copy_(saved)
        self.health, self.flagged = state["health"]
        self.before, self.evaluations, self.kept = state["seen"]
        self.seconds, self.evaluation_seconds = state["seconds"]
        set_random_state(state["random"])
        print(f"goes on after step {self.step}")

    def _result(self, i: int) -> dict:
        ranks = dict(zip(self.layers, self.allocator.ranks()[:, i].tolist(), strict=True))
        sizes = {n: m.lora_A.shape[2] + m.lora_B.shape[1] for n, m in self.layers.items()}
        heads = [p[i].numel() for n, p in self.trainable.items() if in_head(n)]
        # A single run ends where it is flagged, at its next look at the numbers.
        steps = self.step if self.flagged[i] is None else self.flagged[i]
        curve = [row[i][0] for row in self.health[:steps]]
        on_gpu = self.device.type == "cuda"
        return {
            "replicas": len(self.inputs),
            "steps": steps,
            "seconds": round(self.seconds, 2),  # of all replicas together, as is the memory
            "evaluation_seconds": round(self.evaluation_seconds, 2),
            "peak_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if on_gpu else None,
            "loss_curve": [round(x, 5) if math.isfinite(x) else None for x in curve],
            "metric_before_training": self.before[i]["metric"],
            "budget_curve": self.kept[i],
            "trainable_parameters": {
                "adapter": sum(ranks[name] * sizes[name] for name in ranks),
                "head": sum(heads),
            },
            "rank_pattern": ranks,
            "surviving_components": sum(ranks.values()),
            **verdict(self.evaluations[i], self.schedules[i], self.flagged[i]),
        }
