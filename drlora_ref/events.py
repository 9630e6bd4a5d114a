"""What every component scored at pruning events, and which survived: what a film is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from drlora_ref.allocator import RankAllocator
from drlora_ref.schedule import BudgetSchedule


@dataclass
class Events:
    """Scores and masks at pruning events, in the order in which they happened.

    names: the matrices, in the allocator's order; each has as many components as the others.
    steps: the optimizer step of each event. scores: the smoothed scores that it selected by, each
    (N,) by position. masks: what was left after it, each bool (N,). All on the CPU.

    >>> from drlora_ref.planted import recover
    >>> events = Events()
    >>> _ = recover([0, 2], 8, init_r=4, target_r=1, total_steps=400, noise=0.0, events=events)
    >>> events.steps[0], events.steps[-1], events.masks[-1].view(2, 4).sum(dim=1).tolist()
    (60, 200, [0, 2])
    """

    names: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def add(self, step: int, allocator: RankAllocator) -> None:
        """Take what the allocator has just done; call it after the allocator's own step(step)."""
        self.names = list(allocator.layers)
        self.steps.append(step)
        self.scores.append(allocator.ema.cpu().clone())
        self.masks.append(allocator.mask.cpu())


def evenly_spread(schedule: BudgetSchedule, most: int) -> list[int]:
    """At most so many of a schedule's pruning events, the last one and, from two on, the first.

    >>> evenly_spread(BudgetSchedule(3, 2, 100), 3)  # of 15, 25, 35, 45, 50
    [15, 35, 50]
    >>> evenly_spread(BudgetSchedule(3, 2, 100), 1), evenly_spread(BudgetSchedule(3, 2, 100), 0)
    ([50], [])
    """
    events = [t for t in range(1, schedule.total_steps + 1) if schedule.prunes_at(t)]
    return events if most >= len(events) else spread(events, most)


def spread(items: Sequence[int], most: int) -> list[int]:
    """So many of more items, evenly: the last one and, from two on, the first.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    last, gaps = len(items) - 1, max(most - 1, 1)
    return [items[last - (most - 1 - i) * last // gaps] for i in range(most)]
