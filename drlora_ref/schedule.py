"""Eq. 9: how many components are left at each step."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# The share of the prunable budget that is gone after k of P pruning steps, times P³ (so: an int).
CURVES = {
    "paper": lambda k, P: k**3,  # slow first, fast last
    "adalora": lambda k, P: P**3 - (P - k) ** 3,  # fast first, slow last
}


@dataclass(frozen=True)
class BudgetSchedule:
    """The budget b(t): components per layer, on average over layers, after step t (Eq. 9).

        b(t) = b(0)                             for t ≤ tinit             warm-up: all train
             = b(0) - (b(0) - b(T)) p³          for tinit ≤ t ≤ T - tfinal
             = b(T)                             for t ≥ T - tfinal        the mask is fixed
        p    = (t - tinit) / (T - tinit - tfinal)

    with b(0) = init_r, b(T) = target_r, T = total_steps. A step is one *optimizer* step, counted
    from 1 to T; gradient accumulation counts once.

    Choice: the curve of the authors' code, which prunes the share ((b(0) - b(T)) / b(0)) p³ of all
    components: slow first, fast last. AdaLoRA's published curve is the opposite, fast first:
    b(T) + (b(0) - b(T)) (1-p)³; `curve="adalora"` gives that one.
    Choice: tinit = 15 % and tfinal = 50 % of T (the paper's Appendix E), rounded down. The authors'
    code truncates t - 0.15·T towards zero. Where 0.15·T is no whole number it prunes after step
    ⌊0.15·T⌋, as we do, and once more a step later; its further events come a step after ours.

    Read with care: `deltaT` is not part of the curve. The curve says how many may stay at step t;
    components are only taken away at every deltaT-th step, and at the last one.

    Raises ValueError for a value out of range or no whole number, naming what would be right.

    >>> schedule = BudgetSchedule(init_r=3, target_r=2, total_steps=100, deltaT=10)
    >>> schedule.tinit, schedule.tfinal, schedule.budget(15), schedule.budget(50)
    (15, 50, 3.0, 2.0)
    >>> [t for t in range(101) if schedule.prunes_at(t)]
    [15, 25, 35, 45, 50]
    """

    init_r: int
    target_r: int
    total_steps: int
    tinit: int | Any = None  # None may be given; __post_init__ puts an int in its place
    tfinal: int | Any = None
    deltaT: int = 10
    curve: str = "paper"

    def __post_init__(self) -> None:
        T = self._make_whole("total_steps")
        for name, default in (("tinit", 15 * T // 100), ("tfinal", T // 2)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the dataclass is frozen from here on
        for name in ("init_r", "target_r", "deltaT"):
            self._make_whole(name)
        for name in ("tinit", "tfinal"):
            self._make_whole(name, least=0)
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r = {self.target_r} is above init_r = {self.init_r}: components are only "
                f"taken away, so start with init_r ≥ {self.target_r} (the paper: 1.5 × target_r)"
            )
        if self.tinit + self.tfinal >= T:
            raise ValueError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal} leaves no step to prune in: "
                f"it must be less than total_steps = {T}"
            )
        if not isinstance(self.curve, str) or self.curve not in CURVES:
            raise ValueError(f"curve = {self.curve!r}: must be one of {', '.join(CURVES)}")

    def _make_whole(self, name: str, least: int = 1) -> int:
        """Replace a number such as 100.0 by its int; raises ValueError for any other value."""
        value = getattr(self, name)
        whole = isinstance(value, Integral) or (isinstance(value, Real) and value % 1 == 0)
        if not whole or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")
        object.__setattr__(self, name, int(value))
        return int(value)

    @property
    def t_end(self) -> int:
        """The last step at which components are taken away: T - tfinal."""
        return self.total_steps - self.tfinal

    def _progress(self, step: int) -> tuple[int, int]:
        """(k, P): pruning steps done and in all, so that p = k / P."""
        return min(max(step - self.tinit, 0), self.t_end - self.tinit), self.t_end - self.tinit

    def budget(self, step: int) -> float:
        """b(t) of Eq. 9, a real number: for plots and logs."""
        k, P = self._progress(step)
        return self.init_r - (self.init_r - self.target_r) * CURVES[self.curve](k, P) / P**3

    def keep_count(self, step: int, n_components: int) -> int:
        """How many of n_components may stay at this step, over all layers together.

        In whole numbers: floats miss the exact end by one every so often. At t_end exactly
        n · b(T) / b(0) stay; the number taken away is rounded down on the way there.

        >>> BudgetSchedule(3, 2, 100).keep_count(50, n_components=72 * 3) == 72 * 2
        True
        """
        k, P = self._progress(step)
        gone = n_components * (self.init_r - self.target_r) * CURVES[self.curve](k, P)
        return n_components - gone // (self.init_r * P**3)

    def prunes_at(self, step: int) -> bool:
        """True every deltaT steps from tinit to t_end, and always at t_end."""
        if not self.tinit <= step <= self.t_end:
            return False
        return (step - self.tinit) % self.deltaT == 0 or step == self.t_end

    def pruning_ended(self, step: int) -> bool:
        """True once the mask is fixed: after t_end, not yet at it."""
        return step > self.t_end

    def settled(self, step: int) -> bool:
        """Whether what is measured after this step counts: pruning has ended, or nothing follows.

        The two differ with tfinal = 0 alone: then the last step is t_end, and what is measured
        after it is measured after the last cut.

        >>> last_act = BudgetSchedule(3, 2, 100, tfinal=0)
        >>> last_act.settled(99), last_act.settled(100), last_act.pruning_ended(100)
        (False, True, False)
        """
        return self.pruning_ended(step) or step == self.total_steps
