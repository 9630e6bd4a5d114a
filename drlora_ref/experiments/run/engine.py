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
from drlora_ref.experiments.tasks.data import Batch, Final, Inputs, share
from drlora_ref.experiments.tasks.evaluation import count_tokens
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import linear_warmup_and_decay

FACTOR = "factor"  # among a batch's tensors: what its loss is multiplied by


class Engine(Protocol):
    """R ≥ 1 runs as the Loop sees them. The Loop says when something is due, the engine does it.

    Every list has an entry for each run, and so has the first dimension of a tensor.

    tokens: how many all runs together have read in training, padding left out.
    """

    tokens: int

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
        self.schedule, self.max_grad_norm = schedule, settings.max_grad_norm
        self.plain = prepared.model  # without the wrapper that several processes need
        self.captured: CapturedStep | None = None
        self.tokens = 0
        self.fills: list[bool] = []  # which micro-batches of this step only fill up: see share
        processes, recorder = accelerator.num_processes, None
        if settings.capture:
            recorder = find_recorder(accelerator.device, processes)
            if hasattr(plain(self.plain), "qa_outputs"):
                OwnSpans(self.plain)
            without_waits(self.plain)
        hasten(self.plain, settings)
        self.model = accelerator.prepare_model(prepared.model).train()
        self.trainable = {n: p for n, p in self.plain.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            # Only the fused one can be static on a CPU.
            fused=settings.fused_adamw or (settings.capture and accelerator.device.type == "cpu"),
        )
        self.rates = warmed_up(self.optimizer, settings.warmup, schedule.total_steps)
        self.kept_events, self.kept_at = Events(), evenly_spread(schedule, settings.film_events)
        if recorder:
            self._capture(*recorder, settings)

    def _capture(self, recorder: Recorder | None, why_not: str, settings: Settings) -> None:
        """Take the steps by graphs, where there is what records them."""
        make_static(self.optimizer)
        device, allocator = self.accelerator.device, self.prepared.allocator
        term = self.prepared.loss_term
        self.term_ends = term is not None and term(self.schedule.t_end + 1) is None
        self.adds_term = torch.ones((), device=device)
        self.smooths = torch.ones((), dtype=torch.bool, device=device)
        # Others, and random scores, which are drawn on the CPU, are allocated between two steps.
        if isinstance(allocator, RankAllocator) and allocator.score_name != "random":
            allocator.smooths = False
            allocator.ema = allocator.ema.to(device)
        self.captured = CapturedStep(
            self._take,
            self._changing,
            device,
            settings.grad_accumulation,
            settings.batch_size,
            plain(self.plain).config.pad_token_id,
            recorder,
            why_not,
        )

    def _changing(self) -> list[Tensor]:
        """All tensors that a step changes."""
        allocator = self.prepared.allocator
        ema = [allocator.ema] if isinstance(allocator, RankAllocator) else []
        trained = [p.detach() for p in self.trainable.values()]
        return [*trained, *optimizer_tensors(self.optimizer), *ema]

    def optimizer_step(self, step: int, group: list[Numbers]) -> Tensor:
        """Lines 3-6 of Algorithm 1 on all devices; (1, 2), the loss averaged over them."""
        rows = [self.inputs.train.__getitems__(numbers) for (numbers,) in group]
        batches = [self.inputs.collate(some) for some in rows]
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.tokens += sum(map(count_tokens, rows))
        whole = sum(share(batch, 0, 1)[1] for batch in batches)
        parts = [share(batch, rank, processes) for batch in batches]
        self.fills = [weight == 0 for _, weight in parts]
        # Gradients are averaged over the processes, hence the factor.
        group_of_mine = [
            {**mine, FACTOR: torch.tensor(weight * processes / whole)} for mine, weight in parts
        ]
        if self.captured:
            ended = self.schedule.pruning_ended(step)
            self.smooths.fill_(not ended)
            self.adds_term.fill_(0.0 if ended and self.term_ends else 1.0)
            numbers = self.captured(group_of_mine)
        else:
            self.optimizer.zero_grad()
            device, add = self.accelerator.device, self.prepared.loss_term
            moved = [{n: t.to(device) for n, t in batch.items()} for batch in group_of_mine]
            numbers = self._stepped(moved, add(step) if add else None)
        self.rates.step()
        return numbers

    def _take(self, batches: list[Batch]) -> Tensor:
        """A captured step, but for the learning rates; it asks for no value."""
        self.optimizer.zero_grad(set_to_none=False)
        add, allocator = self.prepared.loss_term, self.prepared.allocator
        term = add(1) if add else None  # any step to which a term belongs
        numbers = self._stepped(batches, None if term is None else self.adds_term * term)
        if isinstance(allocator, RankAllocator) and not allocator.smooths:
            smooth_in_place(allocator, self.smooths)
        return numbers

    def _stepped(self, batches: list[Batch], term: Tensor | None) -> Tensor:
        """Forward, backward, clipping and AdamW, on batches that are on the device.

        `term`: what belongs into the loss once. As it is of the weights alone, it would count once
        a micro-batch if it were added to each.
        """
        loss = torch.zeros((), device=self.accelerator.device)
        watch = getattr(self.prepared.allocator, "watch", None)
        for number, (batch, fills) in enumerate(zip(batches, self.fills, strict=True), 1):
            last, batch = number == len(batches), dict(batch)
            factor = batch.pop(FACTOR)
            unseen = watch.leave_out() if watch and fills else nullcontext()
            with unseen, nullcontext() if last else self.accelerator.no_sync(self.model):
                part_of_loss = self.model(**batch).loss * factor
                loss += part_of_loss.detach()
                add = last and term is not None
                self.accelerator.backward(part_of_loss + term if add else part_of_loss)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), self.max_grad_norm)
        self.optimizer.step()
        if self.accelerator.num_processes > 1:
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
            **({"capture": self.captured.about()} if self.captured else {}),
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
            "tokens": self.tokens,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state() was taken."""
        for name, parameter in self.trainable.items():
            parameter.copy_(state["trainable"][name])
        load = load_static if self.captured else torch.optim.AdamW.load_state_dict
        load(self.optimizer, state["optimizer"])
        self.rates.load_state_dict(state["rates"])
        if allocator := self.prepared.allocator:
            allocator.load_state_dict(state["allocator"])
            if isinstance(allocator, RankAllocator):
                allocator.ema = allocator.ema.to(self.accelerator.device)
        self.kept_events, self.tokens = Events(**state["events"]), state["tokens"]


def warmed_up(optimizer: torch.optim.Optimizer, warmup: float, total_steps: int) -> LambdaLR:
    """Learning rates that rise in the first `warmup` (a share of all steps), then fall to 0."""
    warmup_steps = int(warmup * total_steps)
    return LambdaLR(optimizer, lambda t: linear_warmup_and_decay(t, warmup_steps, total_steps))


def hasten(model: nn.Module, settings: Settings) -> None:
    """What may make a model's steps faster and changes no weight that is trained; in place.

    `frozen_bf16` spares autocast the casting of all frozen weights in every step, `compile_encoder`
    lets torch fuse what lies between the large products.
    """
    if settings.frozen_bf16:
        for module in model.modules():
            if isinstance(module, nn.Linear) and not any(
                p.requires_grad for p in module.parameters()
            ):
                module.to(torch.bfloat16)
    if settings.compile_encoder:
        torch._dynamo.config.recompile_limit = 64  # one for each length
        cast(nn.Module, plain(model).base_model).compile()
