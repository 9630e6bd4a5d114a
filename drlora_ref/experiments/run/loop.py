"""The training loop of train.py with what long runs need: any method, many runs, resumption.

Read drlora_ref/train.py first: it is Algorithm 1 on one page, and a test holds this loop to it.
Here is the calendar: what is due after which step, for R ≥ 1 runs. The step itself is the engine's:
run/engine.py for one run, replicas/engine.py for many on one encoder.
"""

import time
from dataclasses import dataclass, field
from math import isfinite

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from drlora_ref.events import Events
from drlora_ref.experiments.run.checkpoints import Checkpoint, random_state, set_random_state
from drlora_ref.experiments.run.engine import Engine
from drlora_ref.experiments.run.order import Numbers, Order
from drlora_ref.experiments.run.records import environment, peak_memory_mib
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.run.termination import Hearing
from drlora_ref.experiments.tasks.data import Final
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import CHECK_EVERY


@dataclass
class History:
    """What one run has shown so far. It ends where the run is flagged.

    losses, norms: of each step, the loss and the length of the gradient before clipping.
    flagged_at: the first step in which one of them was NaN or infinite, or the pruning event at
    which a score was. before: the evaluation before training. kept: [step, surviving components]
    of each pruning event.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    flagged_at: int | None = None
    before: dict = field(default_factory=dict)
    evaluations: list[dict] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)

    def add(self, steps: list[list[float]]) -> None:
        """The (loss, norm) of the steps since the last look; notes the first bad one."""
        for number, numbers in enumerate(steps, len(self.losses) + 1):
            if self.flagged_at is None and not all(map(isfinite, numbers)):
                self.flagged_at = number
        losses, norms = zip(*steps, strict=True)
        self.losses += losses
        self.norms += norms


@dataclass(frozen=True)
class Trained:
    """What training made of one run: its history, what the engine counts, and what it took.

    final: what its last model was asked; None if the run diverged.
    seconds, evaluation_seconds and peak_memory_mib are of all `replicas` together.
    tokens: what all replicas together have read in training, padding left out.
    earlier_environments: what the run was trained in before it went on elsewhere, and until when.
    events: scores and masks at the pruning events that it keeps; None if it keeps none.
    """

    history: History
    outcome: dict
    final: Final | None
    replicas: int
    seconds: float
    evaluation_seconds: float
    peak_memory_mib: int
    tokens: int
    earlier_environments: list[dict] = field(default_factory=list)
    events: Events | None = None


class Loop:
    """R runs of one engine, from their first step or from their checkpoint to their last step.

    All runs take their steps together, so they have one calendar: `schedule` says when they prune
    (their budgets may differ), `settings.checkpoint_every` when they are saved (0: at the end of
    each epoch only). A run whose loss or gradient norm is not finite is flagged at the next look,
    at most 10 steps later, and never allocated, pruned or evaluated again; the others go on. So is
    one whose scores are not finite, at the pruning event that they are for.

    SIGTERM ends it after the step that is being taken, once that is saved.
    """

    def __init__(
        self,
        engine: Engine,
        order: Order,
        schedule: BudgetSchedule,
        settings: Settings,
        accelerator: Accelerator,
        checkpoint: Checkpoint,
    ):
        self.engine, self.order, self.schedule = engine, order, schedule
        self.settings, self.accelerator, self.checkpoint = settings, accelerator, checkpoint
        self.step = 0
        self.histories = [History() for _ in order.generators]
        self.unread: list[Tensor] = []  # (R, 2) of each step since the last look
        self.seconds = self.evaluation_seconds = 0.0
        self.environment = environment(accelerator.device.type)
        self.earlier_environments: list[dict] = []

    @property
    def live(self) -> list[bool]:
        """Which runs are not flagged."""
        return [history.flagged_at is None for history in self.histories]

    def run(self) -> list[Trained]:
        """Train to the end; returns what became of each run. Raises Terminated after SIGTERM."""
        with Hearing() as hearing:
            self._train(hearing)
        return [self._trained(i, final) for i, final in enumerate(self._final())]

    def _train(self, hearing: Hearing) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._resume()
        if not self.histories[0].before:
            for history, found in zip(self.histories, self.engine.evaluate(), strict=True):
                history.before = found
        self.began, T = time.perf_counter() - self.seconds, self.schedule.total_steps
        groups = self.order.groups()
        bar = tqdm(total=T, initial=self.step, disable=None, desc="steps")  # only on a terminal
        with bar:
            while self.step < T and any(self.live):
                if self._take_step(next(groups), hearing) and self.step < T and any(self.live):
                    hearing.answer(
                        f"SIGTERM: a checkpoint is saved after step {self.step} of {T}, and the "
                        "same command goes on from there"
                    )
                bar.update()

    def _take_step(self, group: list[Numbers], hearing: Hearing) -> bool:
        """A step and all that is due after it; returns whether the process was told to end."""
        self.step += 1
        self.unread.append(self.engine.optimizer_step(self.step, group))
        told, every = self._told(hearing), self.settings.checkpoint_every
        ends = self.step == self.schedule.total_steps
        evaluates = self.step % self.order.steps_per_epoch == 0 or ends
        saves = evaluates or told or bool(every and self.step % every == 0)
        if saves or self.step % CHECK_EVERY == 0 or self.schedule.prunes_at(self.step):
            self._look()
        if any(live := self.live):
            self._allocate(live)
        if any(self.live):
            self._after(evaluates, saves)
        return told

    def _told(self, hearing: Hearing) -> bool:
        """Whether to end after this step: all processes after the same one."""
        if self.accelerator.num_processes == 1:
            return bool(hearing.told)
        if self.step % CHECK_EVERY:
            return False
        told = torch.tensor(float(bool(hearing.told)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum"))

    def _look(self) -> None:
        """Fetch the numbers of the steps since the last look, and flag what is not finite."""
        steps = torch.stack(self.unread, dim=1).tolist()  # of each run: [[loss, norm], ...]
        self.unread = []
        for i, (history, own) in enumerate(zip(self.histories, steps, strict=True)):
            if history.flagged_at is None:
                history.add(own)
                if history.flagged_at:
                    self._say_diverged(i)

    def _allocate(self, live: list[bool]) -> None:
        sound = self.engine.allocate(self.step, live)
        if not self.schedule.prunes_at(self.step):
            return
        for i, (history, kept) in enumerate(zip(self.histories, self.engine.kept(), strict=True)):
            if live[i] and not sound[i]:
                history.flagged_at = self.step
                self._say_diverged(i)
            elif live[i] and kept is not None:
                history.kept.append([self.step, kept])

    def _say_diverged(self, i: int) -> None:
        if len(self.histories) > 1:
            print(f"replica {i} diverged at step {self.histories[i].flagged_at}; the others go on")

    def _after(self, evaluates: bool, saves: bool) -> None:
        if evaluates:
            self._evaluate()
        self.seconds = time.perf_counter() - self.began
        if saves:
            self._save()

    def _evaluate(self) -> None:
        before = time.perf_counter()
        at = {"step": self.step, "epoch": self.order.epoch}
        for history, found in zip(self.histories, self.engine.evaluate(), strict=True):
            if history.flagged_at is None:
                history.evaluations.append(at | found)
        now = time.perf_counter()
        self.evaluation_seconds += now - before
        spent, T = now - self.began, self.schedule.total_steps
        left = readable_time(spent / self.step * (T - self.step))
        self.accelerator.print(
            f"step {self.step} of {T}, epoch {self.order.epoch}: {self._metrics()}; "
            f"{readable_time(spent)}, about {left} left",
            flush=True,
        )

    def _final(self) -> list[Final | None]:
        """Asked again of a run that was killed after its last checkpoint, with the same answers."""
        if not any(self.live):
            return [None] * len(self.live)
        before = time.perf_counter()
        found = zip(self.engine.final(), self.live, strict=True)
        finals = [final if goes_on else None for final, goes_on in found]
        spent = time.perf_counter() - before
        self.seconds += spent
        self.evaluation_seconds += spent
        return finals

    def _metrics(self) -> str:
        latest = [history.evaluations[-1:] for history in self.histories]
        return ", ".join(f"{own[0]['metric']:.4f}" if own else "none" for own in latest)

    def _save(self) -> None:
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            self.checkpoint.save(
                {
                    "step": self.step,
                    "order": self.order.state(),
                    "engine": self.engine.state(),
                    "random": random_states,
                    "histories": [vars(history) for history in self.histories],
                    "seconds": (self.seconds, self.evaluation_seconds),
                    "environments": [*self.earlier_environments, self.environment],
                }
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = self.checkpoint.load()
        rank = self.accelerator.process_index
        if state is None:
            if rank:  # without a seed of its own each process would drop the same places
                set_seed(self.settings.seed + rank)
            return
        self.step = state["step"]
        self.order.load_state(state["order"])
        self.engine.load_state(state["engine"])
        self.histories = [History(**history) for history in state["histories"]]
        self.seconds, self.evaluation_seconds = state["seconds"]
        set_random_state(state["random"][rank])
        *self.earlier_environments, before = state["environments"]
        changed = {k: v for k, v in before.items() if v != self.environment.get(k)}
        if changed:
            self.earlier_environments.append({"until_step": self.step, **before})
        words = ", ".join(f"{k} {v}, now {self.environment.get(k)}" for k, v in changed.items())
        self.accelerator.print(f"goes on after step {self.step}{words and f', until then {words}'}")

    def _trained(self, i: int, final: Final | None) -> Trained:
        return Trained(
            self.histories[i],
            self.engine.outcome(i),
            final,
            len(self.histories),
            self.seconds,
            self.evaluation_seconds,
            peak_memory_mib(self.accelerator.device),
            self.engine.tokens,
            self.earlier_environments,
            self.engine.events(i),
        )


def readable_time(seconds: float) -> str:
    """A span of time as a person says it.

    >>> readable_time(42.3), readable_time(150), readable_time(9000)
    ('42 s', '2.5 min', '2.5 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
