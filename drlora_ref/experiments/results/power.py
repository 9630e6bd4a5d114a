"""What so few runs could have shown at all, and what may be averaged over tasks."""

import math

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student

from drlora_ref.experiments.results.summaries import LESS_IS_BETTER

LEVEL, POWER = 0.05, 0.8


def smallest_effect(error: float, freedom: float) -> float:
    """The true difference that a two-sided test at 5 % finds in 80 % of all trials such as this.

    error: the standard error of the mean difference, std / √n for n pairs; freedom: n - 1. A
    smaller difference may well be there and not be seen. By the noncentral t distribution; NaN
    where there is no error to go by, 0 where it is zero.

    >>> round(smallest_effect(1 / math.sqrt(10), 9), 3)  # ten pairs, in units of their std
    0.996
    """
    if not (math.isfinite(error) and freedom > 0):
        return math.nan
    freedom = min(freedom, 1e5)  # t is normal by then
    limit = student.ppf(1 - LEVEL / 2, freedom)

    def missing(shift: float) -> float:  # that it is found with the wrong sign is out of reach
        return float(nct.sf(limit, freedom, shift)) - POWER

    return error * float(brentq(missing, 0.0, 2 * limit + 2))


def add_smallest_effect(differences: pd.DataFrame) -> pd.DataFrame:
    """The rows of paired_difference, with `smallest`: what their n pairs could have shown.

    >>> one = pd.DataFrame([dict(baseline="lora", mean=0.1, std=1.0, n=10)])
    >>> add_smallest_effect(one).smallest.round(3).item()
    0.996
    """
    if "std" not in differences:
        raise ValueError("no column std: take paired_difference's rows")
    rows = zip(differences["std"], differences["n"], strict=True)
    found = [smallest_effect(std / math.sqrt(n) if n else math.nan, n - 1) for std, n in rows]
    return differences.assign(smallest=found)


def mean_over_tasks(differences: pd.DataFrame, arm: str = "method") -> pd.DataFrame:
    """The mean of an arm's differences over tasks, one row an arm: of these tasks, not of others.

    `differences` is paired_difference's, whose interval comes from the seeds, or that of
    paired_by_example, from seeds and examples. Each task weighs the same. `n` counts tasks.
    Raises ValueError for raw metrics: a Matthews correlation and an accuracy have no common unit,
    and a mean of them follows whichever varies most. Take differences, or mean_ranks. And for an
    arm that lacks a task which another has, or has no pair there.

    >>> mean_over_tasks(pd.DataFrame([dict(task="cola", method="lora", mean=0.5, std=0.1, n=3)]))
    Traceback (most recent call last):
    ValueError: no column baseline: these are raw metrics, not differences; take mean_ranks
    """
    if "baseline" not in differences:
        raise ValueError(
            "no column baseline: these are raw metrics, not differences; take mean_ranks"
        )
    _check_tasks(differences, arm)
    rows = []
    for (name, baseline), own in differences.groupby([arm, "baseline"]):
        k, mean = len(own), float(own["mean"].mean())
        errors, freedoms = _errors(own)  # NaN where a task has one pair: no interval then
        parts = errors**2
        whole, squares = parts.sum(), parts @ (parts / np.maximum(freedoms, 1))
        freedom = math.inf if whole == 0 else whole**2 / squares
        half = float(student.ppf(1 - LEVEL / 2, freedom)) * math.sqrt(whole) / k
        row = {"task": f"mean of {k} tasks", arm: name, "baseline": baseline, "mean": mean}
        rows.append(row | {"n": k, "ci_low": mean - half, "ci_high": mean + half})
    columns = ["task", arm, "baseline", "mean", "n", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns)


def _errors(differences: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of each row's mean."""
    if "error" in differences:
        return differences["error"].to_numpy(), differences["freedom"].to_numpy()
    n = differences["n"].to_numpy()
    return differences["std"].to_numpy() / np.sqrt(n), n - 1


def mean_ranks(summary: pd.DataFrame, arm: str = "method") -> pd.DataFrame:
    """The mean place of each arm over tasks, 1 the best, equal scores sharing theirs; `n` tasks.

    `summary` is summarise's, by task and `arm`. The best is the highest, of a training loss or a
    cost the lowest. Raises ValueError for an arm that lacks a task.

    >>> rows = [("cola", "a", 0.5), ("cola", "b", 0.4), ("sst2", "a", 0.9), ("sst2", "b", 0.9)]
    >>> mean_ranks(pd.DataFrame(rows, columns=["task", "method", "mean"])).mean_rank.tolist()
    [1.25, 1.75]
    """
    _check_tasks(summary, arm)
    less = summary.metric.isin(LESS_IS_BETTER) if "metric" in summary else pd.Series([False])
    if less.nunique() > 1:
        raise ValueError("some figures are best when high, others when low: rank them apart")
    places = summary.groupby("task")["mean"].rank(ascending=bool(less.all()))
    means = summary.assign(mean_rank=places).groupby(arm).mean_rank.agg(["mean", "size"])
    return means.rename(columns={"mean": "mean_rank", "size": "n"}).reset_index()


def _check_tasks(frame: pd.DataFrame, arm: str) -> None:
    tasks = set(frame.task)
    for name, own in frame.groupby(arm):
        if missing := sorted(tasks - set(own.task)):
            raise ValueError(f"{name} was not run on {', '.join(missing)}: no mean over tasks")
        if "budget" in own and own["budget"].nunique(dropna=False) > 1:
            raise ValueError(f"{name} has several budgets: take one at a time")
        if len(own) > len(tasks):
            raise ValueError(f"{name} has several rows of one task: take one of them")
        if own["mean"].isna().any():
            raise ValueError(f"{name} has no pair on {', '.join(own.task[own['mean'].isna()])}")
