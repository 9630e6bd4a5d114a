"""The rows of several runs, padded once, so that a batch is an index into them."""

import itertools

import torch
from datasets import Dataset, concatenate_datasets

from drlora_ref.experiments.tasks.data import Batch, Collate


class PaddedRows:
    """The encoded rows of one or more runs, as columns of tensors that are as wide as the longest.

    `rows[[3, 1], [0]]` is what collate makes of rows 3 and 1 of the first run's set and row 0 of
    the second's: (3, width), cut to the longest of the three. Runs that read the same set share one
    copy, with ids in 32 bits. Raises ValueError for rows that are padded on the left.
    """

    def __init__(self, sets: list[Dataset], collate: Collate, at_a_time: int = 1000):
        distinct = {id(one): one for one in sets}
        ends = itertools.accumulate(map(len, distinct.values()), initial=0)
        starts = dict(zip(distinct, ends, strict=False))  # a set starts where the one before ends
        self.starts = [starts[id(one)] for one in sets]
        rows = concatenate_datasets(list(distinct.values()))
        self.tokens = [len(ids) for ids in rows["input_ids"][:]]
        self.lengths = torch.tensor(self.tokens)
        longest = rows[int(self.lengths.argmax())]
        parts = []
        for start in range(0, len(rows), at_a_time):
            some = rows.select(range(start, min(start + at_a_time, len(rows)))).to_list()
            # With the longest row beside them, all parts come out equally wide.
            parts.append({n: t[:-1] for n, t in collate([*some, longest]).items()})
        self.columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not self.columns["attention_mask"][:, 0].all():
            raise ValueError("these rows are padded on the left: only padding on the right is cut")
        for name, column in self.columns.items():
            if column.dim() == 2:
                self.columns[name] = column.int()

    def __getitem__(self, numbers: tuple[list[int], ...]) -> Batch:
        chosen = torch.tensor(self._places(numbers))
        width = int(self.lengths[chosen].max())
        return {
            name: column[chosen, :width].long() if column.dim() == 2 else column[chosen]
            for name, column in self.columns.items()
        }

    def count_tokens(self, numbers: tuple[list[int], ...]) -> int:
        """How many tokens these rows have, padding left out."""
        return sum(self.tokens[place] for place in self._places(numbers))

    def _places(self, numbers: tuple[list[int], ...]) -> list[int]:
        own = zip(self.starts, numbers, strict=True)
        return [start + number for start, some in own for number in some]
