"""From records to tables: every run counts, with its seed, its spread, and how it failed.

Frames hold fractions, as records do; report.show and plot_scores write percent.
One rule for what one run cannot tell: with n = 1 there is neither a std nor an interval (NaN).
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from drlora_ref.experiments.given import place, screen, shown
from drlora_ref.experiments.methods import METHODS
from drlora_ref.experiments.results.paper import budget_name, table
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.settings import NEWER, NOT_IN_KEY, Settings, steps_of
from drlora_ref.schedule import BudgetSchedule

NEEDED = ("task", "method", "status", "best", "evaluations", "steps", "total_steps")
STATISTICS = ("mean", "std", "n", "ci_low", "ci_high")
COSTS = ("surviving_components", "seconds", "peak_memory_mib")
SAME_INPUTS = ("data_fingerprint", "model_sha256", "model_files", "train_size")
SAME_YARDSTICK = ("metric_name", "scoring")
SCORES = ("score", "best", "best_ever", "last", "holdout_score")  # columns of the task's metric
LESS_IS_BETTER = ("final_loss", *COSTS)


def load(*folders: str | Path, each_at_its_best: bool = False) -> pd.DataFrame:
    """One row for every record.json in or below the folders, older ones with fewer fields included.

    Columns: the parameters of the run (`score`, the name of the importance score, is called
    importance_score); `budget` as the paper names it; then the outcome: status, score, best,
    best_ever, last, the further metrics of the evaluation that gave `best`, and what it took; `arm`
    as a trial names it, `holdout_score` on the rows held out, and `final_loss`, the mean training
    loss of the last fifth of all steps (more sensitive than a score, but of the rows trained on).
    Units: seconds, steps a second outside evaluation, MiB.

    Choice: `score` is best; a run that diverged before any evaluation that counts scores 0.0, and
    so do its further metrics. Left out, it would flatter its method; and 0.0 is what evaluation
    gives a model that answers NaN, which a diverged one does. Its `status` tells it from a bad run.
    Any run that diverged has a holdout_score of 0.0, where others have one.
    Choice: a run's further metrics are those of the evaluation that gave its best score. The
    authors' code takes the best of each metric, of different epochs; so does `each_at_its_best`.
    Raises FileNotFoundError (no record), ValueError naming a file that is cut short or no run.
    """
    paths = sorted({path.resolve(): path for path in _find(folders)}.values())
    frame = pd.DataFrame([_row_of(path, each_at_its_best) for path in paths])
    nothing = frame.best.isna() & (frame.status == "diverged")
    for name in _further_metrics(frame):
        of_the_task = frame.groupby("task")[name].transform("count") > 0
        frame[name] = frame[name].mask(nothing & of_the_task, 0.0)
    asked = frame.groupby("task").holdout_score.transform("count") > 0
    frame["holdout_score"] = frame.holdout_score.mask((frame.status == "diverged") & asked, 0.0)
    return frame


def _find(folders: Iterable[str | Path]) -> Iterable[Path]:
    for folder in folders:
        found = list(place(folder).rglob("record.json"))
        if not found:
            raise FileNotFoundError(f"no record.json in or below {folder}")
        yield from found


def _row_of(path: Path, each_at_its_best: bool) -> dict:
    try:
        return _row(path, each_at_its_best)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is not the record of a run: something in it is of another kind "
            f"({type(error).__name__}: {screen(error)})"
        ) from None


def _row(path: Path, each_at_its_best: bool) -> dict:
    record = read_record(path)
    if record.get("replicas", 1) > 1:  # then these are of all replicas together
        record |= dict.fromkeys(("seconds", "peak_memory_mib"))
    parameters = {"seed": record.get("seed"), **record.get("parameters", {})}
    # A run from before a parameter had a name ran at its default, as its key says too.
    parameters |= {name: getattr(Settings, name) for name in NEWER if name not in parameters}
    if missing := [name for name in NEEDED if name not in record | parameters]:
        raise ValueError(f"{path} is not the record of a run: it lacks {', '.join(missing)}")
    parameters["importance_score"] = parameters.pop("score", None)
    counts, environment = record.get("trainable_parameters", {}), record.get("environment", {})
    best, diverged = record["best"], record["status"] == "diverged"
    return {
        **parameters,
        "budget": budget_name(parameters),
        "status": record["status"],
        "arm": arm_name(parameters),
        "metric_name": record.get("metric_name", "metric"),
        "score": 0.0 if best is None and diverged else _number(best),
        **{name: _number(record.get(name)) for name in ("best", "best_ever", "last")},
        **_further(record, parameters, each_at_its_best),
        **{f"{part}_parameters": _number(counts.get(part)) for part in ("adapter", "head")},
        "total_steps": record["total_steps"],
        **_of_the_last_model(record),
        **{name: _number(record.get(name)) for name in COSTS},
        "steps_per_second": _steps_per_second(record),
        "device": environment.get("device", ""),
        "code": record.get("code", ""),
        "data_fingerprint": record.get("data", {}).get("fingerprint", ""),
        "model_source": record.get("model", {}).get("source", ""),
        "model_sha256": record.get("model", {}).get("sha256", ""),
        "model_files": _model_files(record.get("model", {})),
        "rank_map_file": _map_file(record.get("rank_map") or {}),
        "folder": str(path.parent),
    }


def _model_files(model: dict) -> str | None:
    names = "config_sha256", "tokenizer_sha256"
    return " ".join(model[name] for name in names) if set(names) <= set(model) else None


def _map_file(rank_map: dict) -> str | None:
    """The hash of a map that somebody wrote; a map of another run is each seed's own."""
    written = str(rank_map.get("source", "")).startswith("file ")
    return rank_map["sha256"] if written else None


def arm_name(parameters: dict) -> str:
    """What is compared in a trial: method, ranks, score, penalty, and where a rank map came from.

    And the score's memory, where it is not the usual one: with 0.999 it keeps what it has chosen;
    and whether the map is uniform, although the method prunes.

    >>> arm_name({"method": "lora", "target_r": 2, "rank_map": "runs/found", "permute_map": 3})
    'lora r=2 permuted map'
    >>> arm_name({"method": "drlora", "init_r": 6, "target_r": 2, "importance_score": "abs_c"})
    'drlora r=6→2 abs_c'
    >>> arm_name({"method": "drlora", "init_r": 6, "target_r": 2, "beta": 0.999})
    'drlora r=6→2 beta=0.999'
    >>> arm_name({"method": "drlora", "init_r": 3, "target_r": 2, "penalty": "l2"})
    'drlora r=3→2 l2'
    >>> arm_name({"method": "drlora", "init_r": 6, "target_r": 2, "uniform": True})
    'drlora r=6→2 uniform'
    """
    method = parameters["method"]
    words, known = [method], METHODS.get(method)
    if known and "target_r" in known.budget:
        began = f"{parameters.get('init_r')}→" if known.prunes else ""
        words.append(f"r={began}{parameters.get('target_r')}")
    if known and "score" in known.own and parameters.get("importance_score"):
        words.append(parameters["importance_score"])
    if known and "beta" in known.own and parameters.get("beta", Settings.beta) != Settings.beta:
        words.append(f"beta={parameters['beta']:g}")
    if known and "uniform" in known.own and parameters.get("uniform"):
        words.append("uniform")
    if known and "penalty" in known.own and parameters.get("penalty", "dem") != "dem":
        words.append(parameters["penalty"])
    if parameters.get("rank_map"):
        words.append("permuted map" if parameters.get("permute_map") else "given map")
    if known and known.prunes and parameters.get("tfinal") == 0:
        words.append("last act")
    return " ".join(words)


def _of_the_last_model(record: dict) -> dict[str, float]:
    """NaN for the loss of a run that did not come to its end."""
    last = record.get("loss_curve", [])[-max(record["total_steps"] // 5, 1) :]
    whole = record["steps"] == record["total_steps"] and last and None not in last
    return {
        "holdout_score": _number((record.get("holdout") or {}).get("metric")),
        "final_loss": sum(last) / len(last) if whole else math.nan,
    }


def _number(value: float | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"{shown(value)} is no number")
    return math.nan if value is None else value


def _further_metrics(frame: pd.DataFrame) -> list[str]:
    columns = list(frame)
    return columns[columns.index("last") + 1 : columns.index("adapter_parameters")]


def _further(record: dict, parameters: dict, each_at_its_best: bool) -> dict[str, float]:
    # Any r: the settled steps follow from T and tfinal, for methods that do not prune too.
    T = record["total_steps"]
    tfinal = steps_of(parameters.get("tfinal", Settings.tfinal), T)
    settled = BudgetSchedule(1, 1, T, tinit=0, tfinal=tfinal).settled
    known = ("step", "epoch", "metric", "collapsed")
    counts = [
        {name: value for name, value in evaluation.items() if name not in known}
        for evaluation in record["evaluations"]
        if settled(evaluation["step"])
        and (each_at_its_best or evaluation["metric"] == record["best"])
    ]
    if each_at_its_best and counts:
        return {name: max(one[name] for one in counts) for name in counts[0]}
    return counts[0] if counts else {}


def _steps_per_second(record: dict) -> float:
    training = (record.get("seconds") or 0) - record.get("evaluation_seconds", 0)
    return record["steps"] / training if training > 0 else math.nan


def summarise(
    frame: pd.DataFrame,
    by: str | Sequence[str] = ("task", "method", "budget"),
    value: str = "score",
) -> pd.DataFrame:
    """One row a cell: `by`, metric, mean, std (n - 1), n seeds, 95 % interval, failed runs.

    The interval is Student's t over seeds: of the mean over seeds, on this one set of examples.
    `collapsed` and `diverged` count runs of that status; they are in the mean.
    Raises ValueError for a column that is missing, a run without a value (nothing is dropped), two
    runs of one seed in one cell, and runs of one cell that differ in more than the seed. No
    runs make an empty table.
    """
    by = [by] if isinstance(by, str) else list(by)
    check_cells(frame, by, value)
    rows = []
    for key, cell in frame.groupby(by, dropna=False):
        metric = ", ".join(sorted(set(cell.metric_name))) if value == "score" else value
        names = {**dict(zip(by, key, strict=True)), "metric": metric}
        rows.append({**names, **_statistics(cell[value]), **_failed(cell)})
    columns = [*by, "metric", *STATISTICS, "collapsed", "diverged"]
    return _of_models(pd.DataFrame(rows, columns=columns), frame)


def _of_models(made: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The table that was made of these runs, with what they started from in `attrs`."""
    sources = runs.model_source if "model_source" in runs else []
    made.attrs["models"] = sorted(set(map(str, sources)))
    return made


def _failed(runs: pd.DataFrame) -> dict[str, int]:
    return {name: int((runs.status == name).sum()) for name in ("collapsed", "diverged")}


def _statistics(values: pd.Series) -> dict[str, float]:
    from scipy.stats import t as student  # a second, for which a grid need not wait

    n, mean, std = len(values), float(values.mean()), float(values.std(ddof=1))
    half = float(student.ppf(0.975, n - 1)) * std / math.sqrt(n) if n > 1 else math.nan
    return dict(zip(STATISTICS, (mean, std, n, mean - half, mean + half), strict=True))


def average(frame: pd.DataFrame, value: str = "score") -> pd.DataFrame:
    """Table 2's last column: the mean of GLUE's eight tasks, one row a method and budget.

    It is here to be held against the paper's, and to compare nothing else: it adds up accuracies
    and correlations, whose points are not of one size. Between methods take `mean_ranks`, or
    `mean_over_tasks` of differences.

    As in `summarise`, with task "avg": each seed's mean over the tasks, then mean and std over
    those n seeds that ran all eight. Raises ValueError as `summarise` does.
    """
    tasks, cell = list(table(7).task), ["method", "budget"]
    check_cells(frame, ["task", *cell], value)
    wide = frame.pivot(index=[*cell, "seed"], columns="task", values=value).reindex(columns=tasks)
    whole = wide.dropna()
    runs = frame[frame.task.isin(tasks)].set_index([*cell, "seed"]).loc[whole.index]
    rows = []
    for key, means in whole.mean(axis=1).groupby(cell):
        names = {"task": "avg", **dict(zip(cell, key, strict=True)), "metric": "average"}
        rows.append({**names, **_statistics(means), **_failed(runs.loc[key])})
    columns = ["task", *cell, "metric", *STATISTICS, "collapsed", "diverged"]
    return _of_models(pd.DataFrame(rows, columns=columns), frame)


def paired_difference(
    frame: pd.DataFrame,
    baseline: str = "lora",
    by: str | Sequence[str] = ("task", "budget"),
    value: str = "score",
    arm: str = "method",
) -> pd.DataFrame:
    """How much each arm is above `baseline`: one row a cell and arm, as in `summarise`.

    Paired by seed: two runs of one seed share the order of the data (and the rows, where train_size
    draws some), so what it does to both cancels. n counts pairs; `unpaired` the runs of either
    arm that have no partner: with n = 0 that is all of them, and there is no mean.
    Raises ValueError as `summarise` does, for a cell with more than one model, set of data, metric
    or way of scoring (of holdout_score: number of rows held out), and if there is no run of the
    baseline.
    """
    by = [by] if isinstance(by, str) else list(by)
    check_cells(frame, [*by, arm], value)
    check_baseline(baseline, frame[arm])
    rows = []
    for key, cell in frame.groupby(by, dropna=False):
        check_same(cell, ", ".join(map(str, key)), _alike(value))
        scores = {name: runs.set_index("seed")[value] for name, runs in cell.groupby(arm)}
        base = scores.pop(baseline, pd.Series(dtype=float))
        for name, theirs in scores.items():
            pairs = (theirs - base).dropna()
            unpaired = len(theirs) + len(base) - 2 * len(pairs)
            cell_keys = {**dict(zip(by, key, strict=True)), arm: name, "baseline": baseline}
            rows.append({**cell_keys, **_statistics(pairs), "unpaired": unpaired})
    columns = [*by, arm, "baseline", *STATISTICS, "unpaired"]
    return _of_models(pd.DataFrame(rows, columns=columns), frame)


def _alike(value: str) -> tuple[str, ...]:
    """The columns in which runs must agree before this value of theirs is compared."""
    held_out = ("holdout",) if value == "holdout_score" else ()
    return (*SAME_INPUTS, *(SAME_YARDSTICK if value in SCORES else ()), *held_out)


def choose(
    frame: pd.DataFrame,
    parameter: str | Sequence[str] = "learning_rate",
    by: str | Sequence[str] = ("task", "method"),
    value: str = "score",
) -> dict:
    """{cell: the value of `parameter` with the best mean over seeds}; of equals the first in order.

    The best is the highest; of final_loss and of costs (time, memory, components) the lowest.
    Of a list of parameters, which are then chosen together, it is a tuple of their values; and a
    cell is a tuple where `by` is a list.

    Read with care: the winner's score is flattered by having been picked. Report other seeds.
    Raises ValueError as `summarise` does, for values that were tried on other models, data or by
    another metric or on unequal sets of seeds (the best of more draws looks better), and where
    every run diverged: then none is best.
    """
    keys = [by] if isinstance(by, str) else list(by)
    names = [parameter] if isinstance(parameter, str) else list(parameter)
    check_cells(frame, [*keys, *names], value)
    chosen = {}
    for key, cell in frame.groupby(keys, dropna=False):
        key = key[0] if isinstance(by, str) else key
        check_same(cell, str(key), [name for name in _alike(value) if name not in names])
        if (cell.status == "diverged").all():
            raise ValueError(f"{key}: every run diverged: no {' with '.join(names)} is the best")
        candidates = cell.groupby(names if len(names) > 1 else names[0], dropna=False)
        seeds = candidates.seed.agg(lambda tried: tuple(sorted(tried)))
        if seeds.nunique() > 1:
            tried = ", ".join(f"{candidate}: {list(s)}" for candidate, s in seeds.items())
            named = " with ".join(names)
            raise ValueError(f"{key}: each {named} must be tried on the same seeds, not {tried}")
        means = candidates[value].mean()
        at = means.argmin() if value in LESS_IS_BETTER else means.argmax()
        best = means.index.tolist()[at]  # Python numbers, not NumPy's
        chosen[key] = best if isinstance(parameter, str) or len(names) > 1 else (best,)
    return chosen


def check_baseline(baseline: str, arms: pd.Series) -> None:
    """Raise ValueError, naming what there is, if no run is of the baseline."""
    if baseline not in set(arms):
        raise ValueError(f"no run of {baseline!r}: there are {', '.join(sorted(set(arms)))}")


def check_cells(frame: pd.DataFrame, keys: list[str], value: str) -> None:
    """Raise ValueError, as `summarise` does, unless each cell holds one run of each seed."""
    if missing := [name for name in (*keys, "seed", value) if name not in frame]:
        raise ValueError(f"no column {', '.join(missing)}: there are {', '.join(frame)}")
    if len(empty := frame[frame[value].isna()]):
        raise ValueError(f"no {value} in {', '.join(empty.folder)}: leave these out by name")
    parameters = list(frame.columns[: frame.columns.get_loc("status")])
    free = {*NOT_IN_KEY, "seed"} - {"rank_map"}  # runs with maps from two places are two cells
    if "permute_map" in frame and "permute_map" not in keys:  # which permutation is each run's own
        word = frame.permute_map.gt(0).map({True: "permuted", False: "as it is"})
        frame = frame.assign(permute_map=word.where(frame.permute_map.notna()))
    fixed = [n for n in (*parameters, *_alike(value), "rank_map_file") if n not in free]
    for key, cell in frame.groupby(keys, dropna=False):
        where = ", ".join(f"{name} = {word}" for name, word in zip(keys, key, strict=True))
        check_same(cell, where, fixed)
        twins = cell[cell.duplicated("seed", keep=False)].sort_values("seed", kind="stable")
        if len(twins):
            twins = twins[twins.seed == twins.seed.iloc[0]]
            raise ValueError(
                f"several runs of {where}, seed {twins.seed.iloc[0]}: {', '.join(twins.folder)}; "
                "leave all but one out"
            )


def check_same(cell: pd.DataFrame, where: str, columns: Sequence[str]) -> None:
    """Raise ValueError if the runs of a cell differ in one of these columns."""
    for name in columns:
        # An older record lacks newer parameters: NaN says nothing, and is no difference.
        if name in cell and cell[name].nunique() > 1:
            folders = ", ".join(cell.drop_duplicates(name).folder)
            words = " and ".join(map(str, cell[name].dropna().unique()))
            raise ValueError(
                f"the runs of {where} differ in {name}: {words} ({folders}); add it to `by`, or "
                "take them apart"
            )
