"""Two arms on the same examples and the same seeds: how far apart, and how sure that is.

A difference of two scores comes from some examples and some seeds. Over other examples it would be
another one, and over other seeds too. summaries.paired_difference knows the seeds alone; here the
predictions that runs leave beside their records tell how much the examples matter.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from drlora_ref.experiments.given import check_name
from drlora_ref.experiments.results.power import smallest_effect
from drlora_ref.experiments.results.summaries import (
    SAME_INPUTS,
    SAME_YARDSTICK,
    check_baseline,
    check_cells,
    check_same,
)
from drlora_ref.experiments.run.records import read_predictions
from drlora_ref.experiments.tasks.evaluation import SAME


class Spread(NamedTuple):
    """Standard error and degrees of freedom of a mean; NaN where there is too little to tell."""

    error: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Of the 95 % interval, by Student's t."""
        return float(student.ppf(0.975, self.freedom)) * self.error


class TwoWay(NamedTuple):
    """How sure a mean over seeds and examples is: over seeds, over examples, over both."""

    seeds: Spread
    examples: Spread
    both: Spread


def two_way(values: np.ndarray) -> TwoWay:
    """Standard errors of values.mean(), where rows are seeds and columns are examples.

        d_si = μ + u_s + v_i + e_si             a seed, an example, and the two together
        Var(mean) = σ_u²/S + σ_v²/N + σ_e²/(SN)

    The variance of the row means over S estimates the first and the third term, that of the column
    means over N the second and the third; so both, less the third once, are the whole. An estimate
    below one of its parts is set to the larger part. Degrees of freedom are Satterthwaite's.

    Shapes: (S, N) -> three Spreads. "seeds" is what other seeds would do on these examples,
    "examples" what other examples would do with these seeds.

    >>> d = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])  # the seeds agree
    >>> found = two_way(d)
    >>> found.seeds.error, round(found.examples.error, 4) == round(0.5774 / 2, 4)
    (0.0, True)
    """
    S, N = values.shape
    by_seed, by_example = values.mean(axis=1), values.mean(axis=0)
    of_seeds = by_seed.var(ddof=1) / S if S > 1 else math.nan
    of_examples = by_example.var(ddof=1) / N if N > 1 else math.nan
    seeds = Spread(math.sqrt(of_seeds), S - 1)
    examples = Spread(math.sqrt(of_examples), N - 1)
    if S < 2 or N < 2:
        return TwoWay(seeds, examples, Spread(math.nan, math.nan))
    rest = values - by_seed[:, None] - by_example + values.mean()
    of_rest = (rest**2).sum() / ((S - 1) * (N - 1)) / (S * N)
    whole = max(of_seeds + of_examples - of_rest, of_seeds, of_examples)
    parts = of_seeds**2 / (S - 1) + of_examples**2 / (N - 1)
    freedom = whole**2 / parts if parts else math.inf
    return TwoWay(seeds, examples, Spread(math.sqrt(whole), freedom))


def pseudo_values(metric: str, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What each example adds to a metric, by leaving it out (Quenouille's and Tukey's jackknife).

        pᵢ = N θ - (N - 1) θ₋ᵢ      θ the metric of all N examples, θ₋ᵢ of all but the i-th

    Their mean is the metric, up to a bias of the order 1/N, and their variance over N is that of
    the metric. So a metric that is no mean, as Matthews' correlation, can be treated as one. Of an
    accuracy, pᵢ is 1 for a right answer and 0 for a wrong one.

    Choice: all are 0 where the task's metric is 0 by choice: where a model answered NaN (class -1),
    and for scores that are all equal. Else a run would count as failed by seed, and not by example.

    Shapes: (N,), (N,) -> (N,). Raises ValueError for a metric without such values, and for N = 0.

    >>> pseudo_values("accuracy", np.array([0, 1, 1]), np.array([0, 1, 0])).tolist()
    [1.0, 1.0, 0.0]
    """
    check_name("metric of examples", metric, METRICS)
    if not len(labels):
        raise ValueError("no example: there is nothing to compare")
    classes = metric != "pearson"
    if not np.isfinite(predictions).all() or (classes and predictions.min() < 0):
        return np.zeros(len(labels))
    return METRICS[metric](predictions, labels)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return (predictions == labels).astype(float)


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    # Examples of one answer and one label are alike: a few tables say what all of them do.
    classes, codes = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    rows, columns = codes[: len(labels)], codes[len(labels) :]
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (rows, columns), 1)
    N, values, whole = len(labels), np.zeros_like(table), _matthews_of(table)
    for cell in np.argwhere(table):
        without = table.copy()
        without[tuple(cell)] -= 1
        values[tuple(cell)] = N * whole - (N - 1) * _matthews_of(without)
    return values[rows, columns]


def _matthews_of(table: np.ndarray) -> float:
    """Matthews' correlation of a table (answers, labels); 0 where one answer or label is alone."""
    answers, labels, N = table.sum(axis=1), table.sum(axis=0), table.sum()
    spread = (N**2 - (answers**2).sum()) * (N**2 - (labels**2).sum())
    return float((np.trace(table) * N - answers @ labels) / math.sqrt(spread)) if spread else 0.0


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x, y, N = predictions.astype(float), labels.astype(float), len(labels)
    if min(np.ptp(x), np.ptp(y)) < SAME:
        return np.zeros(N)
    defined = np.minimum(_range_without_each(x), _range_without_each(y)) >= SAME
    x, y = x - x.mean(), y - y.mean()
    part = N / (N - 1)  # sums of squares around the mean of all but one
    xx, yy, xy = (x @ x - part * x * x), (y @ y - part * y * y), (x @ y - part * x * y)
    spread = np.sqrt(np.maximum(xx * yy, 0.0))
    without = np.divide(xy, spread, out=np.zeros(N), where=defined & (spread > 0))
    return N * (x @ y) / math.sqrt((x @ x) * (y @ y)) - (N - 1) * without


def _range_without_each(x: np.ndarray) -> np.ndarray:
    """Of all but the i-th, the largest less the smallest. Shapes: (N,) -> (N,), N at least 2."""
    (low, next_low), (next_high, high) = np.sort(x)[:2], np.sort(x)[-2:]
    return np.where(x == high, next_high, high) - np.where(x == low, next_low, low)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "pearson": _pearson,
}


def paired_by_example(
    frame: pd.DataFrame,
    baseline: str,
    arm: str = "arm",
    by: str | Sequence[str] = "task",
    split: str = "holdout",
) -> pd.DataFrame:
    """How much each arm is above `baseline` on a split's examples: one row a cell and arm.

    Columns: mean, n (pairs of runs with one seed), examples, unpaired; the 95 % intervals
    seeds_low/high (other seeds, these examples), examples_low/high (other examples, these seeds)
    and ci_low/high (both others), with the standard error and the degrees of freedom of the last;
    `smallest`, the effect that this much data could have shown.
    The metric is the task's, of the last model of each run. A run that diverged has 0 everywhere.

    Raises ValueError as `summarise` does; for a metric without pseudo_values; where a run has no
    predictions on this split, or predictions on other examples than the rest; without a baseline.

    >>> paired_by_example(pd.DataFrame({"arm": ["lora"], "task": ["cola"]}), "drlora")
    Traceback (most recent call last):
    ValueError: no run of 'drlora': there are lora
    """
    by = [by] if isinstance(by, str) else list(by)
    if arm not in frame:
        raise ValueError(f"no column {arm}: there are {', '.join(frame)}")
    check_baseline(baseline, frame[arm])
    check_cells(frame, [*by, arm], "score")
    rows = []
    for key, cell in frame.groupby(by, dropna=False):
        check_same(cell, ", ".join(map(str, key)), (*SAME_INPUTS, *SAME_YARDSTICK, "holdout"))
        values = _values_of(cell, split)
        arms = {name: dict(zip(runs.seed, runs.folder, strict=True)) for name, runs in
                cell.groupby(arm)}  # fmt: skip
        base = arms.pop(baseline, {})
        for name, theirs in arms.items():
            seeds = sorted(set(theirs) & set(base))
            names = {**dict(zip(by, key, strict=True)), arm: name, "baseline": baseline}
            unpaired = len(theirs) + len(base) - 2 * len(seeds)
            pairs = [values[theirs[seed]] - values[base[seed]] for seed in seeds]
            rows.append({**names, **_intervals(pairs), "unpaired": unpaired})
    columns = [*by, arm, "baseline", *_intervals([]), "unpaired"]
    return pd.DataFrame(rows, columns=columns)


def _intervals(pairs: list[np.ndarray]) -> dict[str, float]:
    n, examples = len(pairs), len(pairs[0]) if pairs else 0
    mean = float(np.mean(pairs)) if pairs else math.nan
    nothing = TwoWay(*[Spread(math.nan, math.nan)] * 3)
    found = two_way(np.array(pairs)) if pairs else nothing
    row = {"mean": mean, "n": n, "examples": examples}
    for name, spread in zip(("seeds", "examples", "ci"), found, strict=True):
        row |= {f"{name}_low": mean - spread.half_width, f"{name}_high": mean + spread.half_width}
    row |= found.both._asdict()
    return row | {"smallest": smallest_effect(found.both.error, found.both.freedom)}


def _values_of(cell: pd.DataFrame, split: str) -> dict[str, np.ndarray]:
    """{folder: pseudo-values} of a cell's runs, all of them on the same examples."""
    metric, first = cell.metric_name.iloc[0], None
    found: dict[str, np.ndarray | None] = {}
    for run in cell.itertuples():
        kept = read_predictions(run.folder)
        if run.status == "diverged" and not kept:
            found[run.folder] = None
            continue
        if not {f"{split}_predictions", f"{split}_labels"} <= set(kept):
            there = sorted(n.removesuffix("_labels") for n in kept if n.endswith("_labels"))
            raise ValueError(f"{run.folder} has no predictions on {split!r}, only on {there}")
        predictions, labels = kept[f"{split}_predictions"], kept[f"{split}_labels"]
        first = (run.folder, labels) if first is None else first
        _check_examples(run.folder, predictions, labels, *first)
        found[run.folder] = pseudo_values(metric, predictions, labels)
    if first is None:
        raise ValueError(f"all of these runs diverged: none has predictions on {split!r}")
    return {f: np.zeros(len(first[1])) if v is None else v for f, v in found.items()}


def _check_examples(
    folder: str, predictions: np.ndarray, labels: np.ndarray, other: str, expected: np.ndarray
) -> None:
    if predictions.ndim != 1 or labels.ndim != 1:
        raise ValueError(f"{folder}: predictions and labels must each be one number an example")
    if len(predictions) != len(labels):
        raise ValueError(f"{folder}: {len(predictions)} predictions for {len(labels)} labels")
    if len(labels) != len(expected):
        raise ValueError(f"{folder} has {len(labels)} examples, {other} has {len(expected)}")
    if not np.array_equal(labels, expected):
        differ = int((labels != expected).sum())
        raise ValueError(f"{folder} and {other} differ in {differ} labels: other examples")
