"""Eq. 9: endpoints, monotonicity and counts, at every step of many schedules."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drlora_ref import BudgetSchedule


@st.composite
def schedules(draw):
    target_r = draw(st.integers(1, 16))
    total = draw(st.integers(1, 300))
    tinit = draw(st.integers(0, total - 1))
    return BudgetSchedule(
        init_r=draw(st.integers(target_r, 24)),
        target_r=target_r,
        total_steps=total,
        tinit=tinit,
        tfinal=draw(st.integers(0, total - tinit - 1)),
        deltaT=draw(st.integers(1, 60)),
        curve=draw(st.sampled_from(["paper", "adalora"])),
    )


@given(schedules())
def test_budget_starts_at_init_r_ends_at_target_r_and_never_grows(schedule):
    budgets = [schedule.budget(t) for t in range(schedule.total_steps + 1)]
    assert budgets[: schedule.tinit + 1] == [schedule.init_r] * (schedule.tinit + 1)
    assert budgets[schedule.t_end :] == [schedule.target_r] * (schedule.tfinal + 1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))


@given(schedules(), st.integers(1, 80))
def test_kept_components_follow_eq_9_exactly_at_every_step(schedule, layers):
    n = layers * schedule.init_r
    for t in range(schedule.total_steps + 1):
        p = Fraction(t - schedule.tinit, schedule.t_end - schedule.tinit)
        p = min(max(p, Fraction(0)), Fraction(1))
        share = p**3 if schedule.curve == "paper" else 1 - (1 - p) ** 3
        gone = layers * (schedule.init_r - schedule.target_r) * share
        assert schedule.keep_count(t, n) == n - int(gone)  # int() rounds down


@given(schedules(), st.integers(1, 80))
def test_the_final_count_is_exactly_layers_times_target_r(schedule, layers):
    n = layers * schedule.init_r
    assert schedule.prunes_at(schedule.t_end)
    assert schedule.keep_count(schedule.t_end, n) == layers * schedule.target_r
    assert schedule.keep_count(schedule.tinit, n) == n


@given(schedules())
def test_events_come_every_deltaT_steps_and_always_at_the_end(schedule):
    events = [t for t in range(schedule.total_steps + 1) if schedule.prunes_at(t)]
    grid = range(schedule.tinit, schedule.t_end + 1, schedule.deltaT)
    assert events == sorted({*grid, schedule.t_end})
    assert not schedule.pruning_ended(schedule.t_end)
    assert schedule.pruning_ended(schedule.t_end + 1)


def test_the_papers_curve_is_slow_first_and_adaloras_fast_first():
    paper, adalora = (BudgetSchedule(12, 4, 1000, curve=curve) for curve in ("paper", "adalora"))
    middle = (paper.tinit + paper.t_end) // 2
    assert paper.budget(middle) == pytest.approx(12 - 8 / 8)
    assert adalora.budget(middle) == pytest.approx(12 - 8 * 7 / 8)
    assert all(paper.budget(t) >= adalora.budget(t) for t in range(1001))


def test_defaults_are_15_and_50_percent_of_all_steps():
    schedule = BudgetSchedule(3, 2, 1234)
    assert (schedule.tinit, schedule.tfinal, schedule.t_end) == (185, 617, 617)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(init_r=1), "target_r = 2 is above init_r = 1"),
        (dict(target_r=0), "target_r = 0: must be a whole number, at least 1"),
        (dict(init_r=2.5), "init_r = 2.5: must be a whole number"),
        (dict(init_r=float("nan")), "init_r = nan: must be a whole number"),
        (dict(init_r=True), "init_r = True: must be a whole number"),
        (dict(total_steps=float("inf")), "total_steps = inf: must be a whole number"),
        (dict(total_steps="100"), "total_steps = '100': must be a whole number"),
        (dict(total_steps=None), "total_steps = None: must be a whole number"),
        (dict(deltaT=None), "deltaT = None: must be a whole number"),
        (dict(tinit="2"), "tinit = '2': must be a whole number, at least 0"),
        (dict(deltaT=0), "deltaT = 0: must be a whole number, at least 1"),
        (dict(tinit=-1), "tinit = -1"),
        (dict(total_steps=0), "total_steps = 0"),
        (dict(tinit=60, tfinal=40), "tinit [+] tfinal = 60 [+] 40 .* less than total_steps = 100"),
        (dict(init_r=10**400, target_r=10**401), "is above init_r"),
        (dict(curve=[]), r"curve = \[\]: must be one of paper, adalora"),
        (dict(curve="linear"), "curve = 'linear': must be one of paper, adalora"),
    ],
)
def test_impossible_schedules_are_refused_with_the_value_and_the_remedy(changed, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(**{**dict(init_r=3, target_r=2, total_steps=100), **changed})


def test_a_whole_number_written_as_a_float_is_that_number():
    schedule = BudgetSchedule(3.0, 2, 100.0, tinit=10.0)
    assert schedule == BudgetSchedule(3, 2, 100, tinit=10)
    assert {type(v) for v in (schedule.init_r, schedule.total_steps, schedule.tinit)} == {int}


@pytest.mark.parametrize("T", [110, 105, 330, 1070, 1605, 999])
def test_the_authors_events_come_once_more_and_a_step_later_where_tinit_is_no_whole_number(T):
    """Their arithmetic, retold: int(t - 0.15 T) counts, and int() truncates towards zero."""
    ours = [t for t in range(T + 1) if BudgetSchedule(3, 2, T).prunes_at(t)]
    last = int(T * (1 - 0.15 - 0.5))
    theirs = [t for t in range(1, T + 1) if int(t - 0.15 * T) in range(0, last + 1, 10)]
    assert 0.15 * T != int(0.15 * T)
    assert theirs[:2] == [ours[0], ours[0] + 1]
    between = [t for t in theirs[2:] if t < ours[-1] - 10]
    assert between == [t + 1 for t in ours[1:]][: len(between)] and between
