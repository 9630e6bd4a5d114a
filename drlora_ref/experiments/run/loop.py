"""The training loop of train.py with what long runs need: any method, several devices, resumption.

Read drlora_ref/train.py first: it is Algorithm 1 on one page, and a test holds this loop to it. New
here are accelerate (device, mixed precision, several processes), checkpoints, and the methods that
the paper compares with.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from drlora_ref.experiments.methods import Prepared, count_trainable, rank_pattern
from drlora_ref.experiments.run.checkpoints import Checkpoint, random_state, set_random_state
from drlora_ref.experiments.tasks.data import Inputs, loss_weight, share
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import CHECK_EVERY, count_steps, first_non_finite, verdict


class Loop:
    """One run, from its first step or from its checkpoint to its last step.

    `settings` has the attributes learning_rate, batch_size, grad_accumulation, weight_decay,
    warmup, max_grad_norm, seed and checkpoint_every (0: at the end of each epoch only).

    Several processes train as one: each takes its share of every batch, gradients are averaged by
    the number of examples, masks follow from scores that are the same everywhere. So batch_size
    is the whole batch, however many devices there are.
    """

    def __init__(
        self,
        prepared: Prepared,
        inputs: Inputs,
        schedule: BudgetSchedule,
        settings,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
    ):
        self.inputs, self.schedule, self.settings = inputs, schedule, settings
        self.accelerator, self.checkpoint = accelerator, checkpoint
        self.prepared = prepared
        self.plain = prepared.model  # without the wrapper that several processes need
        self.model = accelerator.prepare_model(prepared.model)
        self.trainable = {n: p for n, p in self.plain.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        T = schedule.total_steps
        self.lr_schedule = get_linear_schedule_with_warmup(
            self.optimizer, int(settings.warmup * T), T
        )
        self.order = torch.Generator().manual_seed(settings.seed)
        self.loader = DataLoader(
            inputs.train,
            settings.batch_size,
            shuffle=True,
            generator=self.order,
            collate_fn=inputs.collate,
        )
        # Where the run stands: steps done, the epoch, and how many of its steps are done.
        self.step, self.epoch, self.step_in_epoch = 0, 1, 0
        self.order_at_epoch_start = self.order.get_state()
        # Loss and gradient norm of each step; the latest ones still where they were computed.
        self.health: list[list[float]] = []
        self.unread: list[Tensor] = []
        self.evaluations: list[dict] = []
        self.kept: list[list[int]] = []
        self.before: dict = {}
        self.seconds = self.evaluation_seconds = 0.0

    def run(self) -> dict:
        """Train to the end; returns what train.train returns, and the evaluation before it."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._resume()
        if not self.before:
            self.before = self._evaluate()
        started, T = time.perf_counter() - self.seconds, self.schedule.total_steps
        steps_per_epoch = count_steps(
            len(self.inputs.train), self.settings.batch_size, 1, self.settings.grad_accumulation
        )
        self.model.train()
        bar = tqdm(total=T, initial=self.step, disable=None, desc="steps")
        flagged_at, groups, every = None, self._groups(), self.settings.checkpoint_every
        while self.step < T and flagged_at is None:
            self.step += 1
            self.unread.append(self._optimizer_step(next(groups)))
            evaluation_due = self.step % steps_per_epoch == 0 or self.step == T
            save_due = evaluation_due or (every and self.step % every == 0)
            if save_due or self.step % CHECK_EVERY == 0 or self.schedule.prunes_at(self.step):
                flagged_at = self._read_health()
            if flagged_at is None:
                self._after()
                if evaluation_due:
                    self._note_evaluation()
                self.seconds = time.perf_counter() - started
                if save_due:
                    self._save()
            self.optimizer.zero_grad()
            bar.update()
        bar.close()
        return self._result(flagged_at)

    def _groups(self) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of one optimizer step after another, from where the run stands."""
        k = self.settings.grad_accumulation
        while True:
            done = self.step_in_epoch * k
            batches = iter(skip_first_batches(self.loader, done) if done else self.loader)
            while group := list(itertools.islice(batches, k)):
                self.step_in_epoch += 1
                yield group
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.order_at_epoch_start = self.order.get_state()

    def _optimizer_step(self, group: list[dict[str, Tensor]]) -> Tensor:
        """Lines 3-6 of Algorithm 1; returns (loss, gradient norm) without waiting for the GPU."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        weights = [loss_weight(batch) for batch in group]
        loss = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            mine, part = share(batch, rank, processes)
            # Gradients are averaged over the processes, hence the factor.
            factor = part * processes / sum(weights)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                mine = {name: t.to(self.accelerator.device) for name, t in mine.items()}
                part_of_loss = self.model(**mine).loss * factor
                loss += part_of_loss.detach()
                # A term of the weights alone is added once, or it would count once a micro-batch.
                add = last and self.prepared.loss_term
                term = self.prepared.loss_term(self.step) if add else None
                self.accelerator.backward(part_of_loss if term is None else part_of_loss + term)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.trainable.values()), self.settings.max_grad_norm
        )
        self.optimizer.step()
        self.lr_schedule.step()
        if processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        return torch.stack([loss, norm])

    def _read_health(self) -> int | None:
        """Fetch the numbers of the steps since the last look; the first bad step, if there is."""
        checked = len(self.health)
        bad = first_non_finite(self.unread)
        self.health += torch.stack(self.unread).tolist()
        self.unread = []
        return bad and checked + bad

    def _after(self) -> None:
        """Lines 7-9 of Algorithm 1; before zero_grad, since AdaLoRA's scores use the gradients."""
        if self.prepared.allocator:
            self.prepared.allocator.step(self.step)
            if self.schedule.prunes_at(self.step):
                kept = sum(self.prepared.allocator.rank_pattern().values())
                self.kept.append([self.step, kept])

    def _note_evaluation(self) -> None:
        before = time.perf_counter()
        self.evaluations.append({"step": self.step, "epoch": self.epoch, **self._evaluate()})
        self.evaluation_seconds += time.perf_counter() - before
        T = self.schedule.total_steps
        self.accelerator.print(
            "step {step} of {T}, epoch {epoch}: {metric:.4f}".format(T=T, **self.evaluations[-1])
        )

    def _evaluate(self) -> dict:
        """The main process evaluates, the others wait for what it found."""
        found = [None]
        if self.accelerator.is_main_process:
            with self.accelerator.autocast():
                found = [self.inputs.evaluate(self.plain)]
        return broadcast_object_list(found)[0]

    def _save(self) -> None:
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            allocator = self.prepared.allocator
            self.checkpoint.save(
                {
                    "position": (self.step, self.epoch, self.step_in_epoch),
                    "order": self.order_at_epoch_start,
                    "random": random_states,
                    "trainable": {n: p.detach() for n, p in self.trainable.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "lr_schedule": self.lr_schedule.state_dict(),
                    "allocator": allocator.state_dict() if allocator else None,
                    "health": self.health,
                    "seen": (self.before, self.evaluations, self.kept),
                    "seconds": (self.seconds, self.evaluation_seconds),
                }
            )
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _resume(self) -> None:
        state = self.checkpoint.load()
        if state is None:
            if rank := self.accelerator.process_index:  # else all would drop the same places
                set_seed(self.settings.seed + rank)
            return
        self.step, self.epoch, self.step_in_epoch = state["position"]
        self.order_at_epoch_start = state["order"]
        self.order.set_state(state["order"])
        for name, parameter in self.trainable.items():
            parameter.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.prepared.allocator:
            self.prepared.allocator.load_state_dict(state["allocator"])
        self.health = state["health"]
        self.before, self.evaluations, self.kept = state["seen"]
        self.seconds, self.evaluation_seconds = state["seconds"]
        set_random_state(state["random"][self.accelerator.process_index])
        self.accelerator.print(f"goes on after step {self.step}")

    def _result(self, flagged_at: int | None) -> dict:
        ranks = rank_pattern(self.prepared)
        on_gpu = self.accelerator.device.type == "cuda"
        losses = [loss for loss, _ in self.health]
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 2),
            "evaluation_seconds": round(self.evaluation_seconds, 2),
            "peak_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if on_gpu else None,
            # None for NaN and infinity, which JSON does not have
            "loss_curve": [round(x, 5) if math.isfinite(x) else None for x in losses],
            "metric_before_training": self.before["metric"],
            "budget_curve": self.kept,
            "trainable_parameters": count_trainable(self.prepared),
            "rank_pattern": ranks,
            "surviving_components": sum(ranks.values()),
            **verdict(self.evaluations, self.schedule, flagged_at),
        }
