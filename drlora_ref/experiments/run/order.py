"""Which rows R runs read in which step: each in its own order, all of them step by step."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import Inputs
from drlora_ref.experiments.tasks.evaluation import row_lengths
from drlora_ref.train import count_steps

# The rows of one micro-batch: a list of row numbers for each run.
Numbers = tuple[list[int], ...]


class Order:
    """The row numbers of one optimizer step after another, from where the runs stand.

    `sizes` and `seeds`: training rows and seed of each run. A run shuffles as train.py does, so it
    reads the same rows whether it is alone or one of many. `lengths`: of each run, the tokens of
    its rows, where a batch is to hold rows of about one length; None: whatever the shuffle gives.
    `epoch` counts from 1, `step_in_epoch` is the number of optimizer steps begun in it.

    Raises ValueError as count_steps does.
    """

    def __init__(
        self,
        sizes: list[int],
        seeds: list[int],
        batch_size: int,
        grad_accumulation: int = 1,
        lengths: list[list[int]] | None = None,
    ):
        self.grad_accumulation = grad_accumulation
        self.steps_per_epoch = count_steps(sizes[0], batch_size, 1, grad_accumulation)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.loaders = [
            DataLoader(range(size), generator=own, collate_fn=list, **batches)
            for size, own, batches in zip(
                sizes, self.generators, self._batches(batch_size, lengths), strict=True
            )
        ]
        self.epoch, self.step_in_epoch = 1, 0
        self._remember()

    def _batches(self, batch_size: int, lengths: list[list[int]] | None) -> list[dict[str, Any]]:
        """What tells each run's DataLoader which rows make a batch."""
        if lengths is None:
            return [dict(batch_size=batch_size, shuffle=True)] * len(self.generators)
        alike = zip(lengths, self.generators, strict=True)
        return [dict(batch_sampler=AlikeInLength(own, batch_size, g)) for own, g in alike]

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


def make_order(inputs: list[Inputs], settings: list[Settings]) -> Order:
    """The order of runs that share all settings which concern it, but for their seeds."""
    rows, shared = [own.train for own in inputs], settings[0]
    return Order(
        [len(own) for own in rows],
        [one.seed for one in settings],
        shared.batch_size,
        shared.grad_accumulation,
        [row_lengths(own) for own in rows] if shared.group_by_length else None,
    )


class AlikeInLength(BatchSampler):
    """Batches of rows of about one length, in random order: each row once in an epoch.

    A batch is as wide as its longest row. Among 16 random phrases of SST-2 that is 35 tokens, where
    the mean row has 13: three fifths of the work is padding. transformers' sampler sorts each 50
    batches' worth of random rows by length. It leaves the batches sorted too, long ones first; here
    they are shuffled, so that what is learnt last is not always the shortest.
    """

    def __init__(self, lengths: list[int], batch_size: int, generator: Generator):
        rows = LengthGroupedSampler(batch_size, lengths=lengths, generator=generator)
        super().__init__(rows, batch_size, drop_last=False)
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        """The row numbers of one batch after another."""
        batches = list(super().__iter__())
        yield from (batches[i] for i in RandomSampler(batches, generator=self.generator))
