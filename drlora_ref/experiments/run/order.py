"""Which rows R runs read in which step: each in its own order, all of them step by step."""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from drlora_ref.train import count_steps

# The rows of one micro-batch: a list of row numbers for each run.
Numbers = tuple[list[int], ...]


class Order:
    """The row numbers of one optimizer step after another, from where the runs stand.

    `sizes` and `seeds`: training rows and seed of each run. A run shuffles as train.py does, so it
    reads the same rows whether it is alone or one of many. `epoch` counts from 1, `step_in_epoch`
    is the number of optimizer steps begun in it.

    Raises ValueError as count_steps does.
    """

    def __init__(
        self, sizes: list[int], seeds: list[int], batch_size: int, grad_accumulation: int = 1
    ):
        self.grad_accumulation = grad_accumulation
        self.steps_per_epoch = count_steps(sizes[0], batch_size, 1, grad_accumulation)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.loaders = [
            DataLoader(range(size), batch_size, shuffle=True, generator=own, collate_fn=list)
            for size, own in zip(sizes, self.generators, strict=True)
        ]
        self.epoch, self.step_in_epoch = 1, 0
        self._remember()

    def _remember(self) -> None:
        self.at_epoch_start = [own.get_state() for own in self.generators]

    def groups(self) -> Iterator[list[Numbers]]:
        """For ever: the micro-batches of one optimizer step. An epoch's last may be fewer.

        >>> order = Order([3, 3], seeds=[0, 1], batch_size=2)
        >>> [[tuple(map(len, numbers)) for numbers in next(order.groups())] for _ in range(2)]
        [[(2, 2)], [(1, 1)]]
        """
        k = self.grad_accumulation
        while True:
            batches = zip(*self.loaders, strict=True)
            batches = itertools.islice(batches, self.step_in_epoch * k, None)
            while group := list(itertools.islice(batches, k)):
                self.step_in_epoch += 1
                yield group
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self._remember()

    def state(self) -> dict:
        """Where the runs stand, for a checkpoint."""
        return {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "generators": self.at_epoch_start,
        }

    def load_state(self, state: dict) -> None:
        """Go on where state() was taken; before groups() is called."""
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        for own, saved in zip(self.generators, state["generators"], strict=True):
            own.set_state(saved)
        self._remember()
