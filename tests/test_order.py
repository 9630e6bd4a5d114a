"""Which rows a run reads in which step."""

import itertools

import pytest

from drlora_ref.experiments.run.order import Order

N = 420  # rows of each run
LENGTHS = [[3 + (7 * i) % 41 for i in range(N)], [50 - i % 29 for i in range(N)]]


def an_order(lengths=LENGTHS, k=1) -> Order:
    return Order([N, N], seeds=[0, 1], batch_size=8, grad_accumulation=k, lengths=lengths)


def epoch(order: Order) -> list:
    return list(itertools.islice(order.groups(), order.steps_per_epoch))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["shuffled", "alike"])
def test_every_run_reads_each_row_once_in_an_epoch_and_otherwise_in_the_next(lengths):
    order = an_order(lengths)
    groups = order.groups()
    epochs = [list(itertools.islice(groups, an_order().steps_per_epoch)) for _ in range(2)]
    for steps in epochs:
        for run in (0, 1):
            assert sorted(row for (numbers,) in steps for row in numbers[run]) == list(range(N))
    assert epochs[0] != epochs[1]


def test_batches_of_rows_alike_in_length_are_a_fraction_as_wide_and_not_sorted():
    def width(order, run):
        return [max(LENGTHS[run][row] for row in numbers[run]) for (numbers,) in epoch(order)]

    for run in (0, 1):
        shuffled, alike = (width(an_order(lengths), run) for lengths in (None, LENGTHS))
        assert sum(alike) < 0.8 * sum(shuffled)
        assert alike != sorted(alike, reverse=True)


@pytest.mark.parametrize("k", [1, 2])
def test_an_order_goes_on_from_any_step_as_if_it_had_never_stopped(k):
    order = an_order(k=k)
    groups = order.groups()
    steps = [next(groups) for _ in range(80)]
    for stop in range(0, 80, 9):
        first, second = an_order(k=k), an_order(k=k)
        groups = first.groups()
        for _ in range(stop):
            next(groups)
        second.load_state(first.state())
        groups = second.groups()
        assert [next(groups) for _ in range(80 - stop)] == steps[stop:]
