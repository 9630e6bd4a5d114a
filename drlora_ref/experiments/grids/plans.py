"""The file of a grid, and the runs that it stands for, all checked before the first one starts.

    notebook: ../10_roberta_glue.ipynb        # from the file's own folder
    parameters: {model_name: roberta-base}    # of all runs
    cases: [{method: full}, {method: drlora, table_8: small}]    # sets that go together
    vary: {task: [cola, rte], seed: [0, 1]}   # every combination, with every case
    best_of: {folder: runs/rates, parameter: learning_rate}      # the best value in those runs

What is best is looked up for each task and method, or for what `by: [task, method, score]` names;
`parameter: [learning_rate, batch_size]` chooses both together.

Without a line `notebook`, each run is what `python -m drlora_ref.experiments run` does: it leaves
a record and no executed notebook, and any parameter of Settings may be set. With one, only those
that the notebook takes.

`table_8: small` (or large) stands for what paper.settings has for the task and method at that
budget; what is written beside it takes precedence. `follow: authors` stands for what their code
does otherwise than ours (paper.authors). `cost` says what to expect, `slurm` what to ask
of a cluster.
"""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypedDict

from torch import nn

from drlora_ref.experiments.given import check_known, check_name, place, read_yaml, shown
from drlora_ref.experiments.grids import Value, processes
from drlora_ref.experiments.methods.rank_maps import lora_ranks
from drlora_ref.experiments.replicas.many_runs import can_be_replica, shared_settings
from drlora_ref.experiments.results import paper, summaries
from drlora_ref.experiments.run.rank_maps import RankMap, find_rank_map, sha256_of, shared_donors
from drlora_ref.experiments.run.records import unfinished
from drlora_ref.experiments.run.settings import PLACES, Settings, run_key
from drlora_ref.experiments.sources.models import ModelSource, resolve_model
from drlora_ref.experiments.tasks.data import check_sizes
from drlora_ref.experiments.tasks.families import FAMILIES, Family

KINDS = {
    "notebook": str,
    "parameters": dict,
    "cases": list,
    "vary": dict,
    "best_of": dict,
    "cost": dict,
    "slurm": dict,
}
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "best_of": {"folder": (str,), "parameter": (list,), "by": (list,)},
    "cost": {"optimizer_steps": (int,), "gpu_hours": (int, float), "basis": (str,)},
}
MOST = 10_000  # runs of a grid; the paper's largest table has 672
Parameters = dict[str, Value]
Cell = tuple[Value, ...]  # what a run has of the parameters in best_of's `by`
CELL = ["task", "method"]
STANDS_FOR = ("table_8", "follow")  # words for several parameters at once


class BestOf(TypedDict):
    """Where to look for the best values, of which parameters, and apart for what."""

    folder: str
    parameter: list[str]
    by: list[str]


class Cost(TypedDict):
    """What all runs of a grid will take, and how that was estimated."""

    optimizer_steps: int
    gpu_hours: float
    basis: str


class Grid(TypedDict, total=False):
    """A grid's file, once read_grid has checked its form."""

    notebook: Path
    parameters: Parameters
    cases: list[Parameters]
    vary: dict[str, list[Value]]
    best_of: BestOf
    cost: Cost
    slurm: dict[str, str | int]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid: a short label of what varies, its run_key, T, and the work that it is.

    `encoder` is equal for runs that may be replicas of one pass, None where a run must be alone.
    `model` is what it starts from.
    """

    label: str
    key: str
    steps: int
    work: processes.WorkItem
    encoder: Hashable = None
    model: ModelSource | None = None

    @property
    def folder(self) -> Path:
        """Where its record is, or will be."""
        return self.work.folder


def read_grid(file: str | Path) -> Grid:
    """The grid in a file, its form checked; `notebook` becomes a path from the current folder.

    Raises FileNotFoundError, and ValueError naming what is wrong.
    """
    grid = read_yaml(file)
    if isinstance(best := grid.get("best_of"), dict):
        one = best.get("parameter")
        listed = {"parameter": [one]} if isinstance(one, str) else {}
        grid["best_of"] = {"by": CELL} | best | listed
    check_known(f"{file}: a grid has no", grid, KINDS)
    for name, value in grid.items():
        if not isinstance(value, KINDS[name]):
            raise ValueError(f"{file}: {name} = {shown(value)} must be a {KINDS[name].__name__}")
        for key, kinds in KEYS.get(name, {}).items():
            if not _fits(value.get(key), kinds) or len(value) != len(KEYS[name]):
                raise ValueError(
                    f"{file}: {name} needs {', '.join(KEYS[name])}, not {shown(value)}"
                )
    check_known(f"{file}: slurm has no", grid.get("slurm", {}), processes.SLURM)
    for name, value in grid.get("slurm", {}).items():
        if type(value) not in (str, int):
            raise ValueError(f"{file}: {name} = {shown(value)} must be a word or a whole number")
    if "best_of" in grid:
        _check_best_of(file, grid["best_of"])
    _check_sets(file, grid)
    if "notebook" in grid:
        grid["notebook"] = Path(os.path.relpath(place(file).parent / place(grid["notebook"])))
    return grid


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether it is of one of these kinds: a number 0 or more, a list of words and not empty."""
    if isinstance(value, list) and not (value and all(isinstance(one, str) for one in value)):
        return False
    number = isinstance(value, int | float)
    return type(value) in kinds and (not number or 0 <= value < math.inf)


def _check_best_of(file: str | Path, best: dict[str, list[str]]) -> None:
    if both := set(best["parameter"]) & {*best["by"], "seed"}:
        raise ValueError(
            f"{file}: best_of cannot choose {', '.join(sorted(both))}: a parameter is chosen for "
            "each of what `by` names, over seeds"
        )


def _check_sets(file: str | Path, grid: Grid) -> None:
    same, cases, vary = grid.get("parameters", {}), grid.get("cases", [{}]), grid.get("vary", {})
    for name, values in [("cases", cases), *vary.items()]:
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"{file}: {name} = {shown(values)} must be a list, and not an empty one"
            )
    if (runs := len(cases) * math.prod(map(len, vary.values()))) > MOST:
        raise ValueError(f"{file}: {runs:,} runs, a grid has {MOST:,} at most")
    for case in cases:
        if not isinstance(case, dict):
            raise ValueError(f"{file}: the case {shown(case)} must be names with values")
    in_cases = {name for case in cases for name in case}
    best = grid.get("best_of", {"parameter": [], "by": []})
    names = [*same, *in_cases, *vary, *best["parameter"]]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{file} sets {', '.join(twice)} in two places")
    # Where a run is kept is the grid's to say.
    known = [f.name for f in fields(Settings) if f.name not in PLACES]
    check_known(f"{file}: best_of: a record has no", [*best["parameter"], *best["by"]], known)
    check_known(f"{file}: a run has no", names, [*STANDS_FOR, *known])
    given = [value for one in (same, *cases) for value in one.values()]
    for value in itertools.chain(given, *vary.values()):
        if not isinstance(value, str | int | float):
            raise ValueError(f"{file}: {shown(value)} must be a word, a number, true or false")


def expand(grid: Grid) -> list[tuple[str, Parameters]]:
    """(label, parameters) of every run: each combination of what varies, with each case.

    >>> expand({"cases": [{"method": "lora"}], "vary": {"task": ["rte"], "seed": [0, 1]}})[1]
    ('lora-rte-seed1', {'method': 'lora', 'task': 'rte', 'seed': 1})
    """
    vary, sets = grid.get("vary", {}), []
    for values in itertools.product(*vary.values()):  # what is to be compared comes side by side
        for case in grid.get("cases", [{}]):
            chosen = case | dict(zip(vary, values, strict=True))
            words = [v if isinstance(v, str) else f"{name}{v}" for name, v in chosen.items()]
            label = re.sub(r"[^\w.+-]+", "_", "-".join(words))[:100] or "run"
            sets.append((label, grid.get("parameters", {}) | chosen))
    return sets


def plan(grid: Grid, out: Path) -> list[PlannedRun]:
    """Every run of a grid, checked; reads data and models, starts and writes nothing.

    Says where runs of several seeds would share one donor's rank map: they are not independent.

    Raises what the checks raise: of the notebook, Settings, data, models, rank maps and schedules;
    ValueError for two runs that are the same.
    """
    sets, notebook = expand(grid), grid.get("notebook")
    taken = _taken(notebook, [chosen for _, chosen in sets])
    own_seeds = {chosen.get("seed", Settings.seed) for _, chosen in sets}
    best = _Best(grid["best_of"], own_seeds) if "best_of" in grid else None
    settings = [_settings(label, chosen, best, taken) for label, chosen in sets]
    for maps in {one.rank_map for one in settings} - {""}:
        if out.resolve().is_relative_to(place(maps).resolve()):
            raise ValueError(
                f"rank_map = {shown(maps)}: {out} lies in it, so that runs of this grid would give "
                "maps too; write them to another folder"
            )
    places = sorted({(one.task, one.data_dir) for one in settings})
    data = {place: _look_at(*place) for place in places}
    names = sorted({one.model_name for one in settings})
    models = {name: resolve_model(name) for name in names}
    there = {path.name.rsplit("-", 1)[-1]: path for path in sorted(out.glob("*-*"))}
    loaded: dict[tuple[Family, str], nn.Module] = {}  # for rank maps alone
    runs: dict[str, PlannedRun] = {}
    for (label, _), one in zip(sets, settings, strict=True):
        fingerprint, rows = data[one.task, one.data_dir]
        model = models[one.model_name]
        rank_map = find_rank_map(one, model.sha256)
        key = run_key(one, fingerprint, model.sha256, sha256_of(rank_map))
        if key in runs:
            raise ValueError(f"{runs[key].label} and {label} are the same run")
        folder = there.get(key, out / f"{label}-{key}")  # labels may change
        if rank_map and not (folder / "record.json").exists():
            _check_map(label, one, model, rank_map, loaded)
        given = {k: v for k, v in asdict(one).items() if k in taken and k not in PLACES}
        work = processes.WorkItem(notebook, folder, given)
        steps = _steps(label, one, rows)
        shared = (steps, *shared_settings(one).items()) if can_be_replica(one) else None
        runs[key] = PlannedRun(label, key, steps, work, shared, model)
    for maps in sorted({one.rank_map for one in settings}):
        seeds = [one.seed for one in settings if one.rank_map == maps]
        for donor, theirs in shared_donors(maps, seeds).items():
            print(f"rank_map {maps}: the runs of seeds {theirs} share the map of seed {donor}")
    return list(runs.values())


def _check_map(
    label: str,
    settings: Settings,
    source: ModelSource,
    rank_map: RankMap,
    loaded: dict[tuple[Family, str], nn.Module],
) -> None:
    """Raise ValueError, naming the run, unless the map fits the model, as lora_ranks does.

    `loaded` keeps a model of each family and name: a family's tasks differ in the head alone.
    """
    family = FAMILIES[settings.task]
    at = family, settings.model_name
    if at not in loaded:
        loaded[at], _ = family.load_model(source, settings.task)
    given = settings.permute_map, settings.target_r, settings.lora_alpha
    try:
        lora_ranks(loaded[at], rank_map.ranks, *given)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def _taken(notebook: Path | None, sets: list[Parameters]) -> set[str]:
    """The names that a run may be given: the notebook's parameters, or all of Settings."""
    if notebook is None:
        return {field.name for field in fields(Settings)}
    from drlora_ref.experiments.grids.notebooks import check_parameters  # three seconds

    given = [{k: v for k, v in chosen.items() if k not in STANDS_FOR} for chosen in sets]
    return check_parameters(notebook, *given)


def pack(runs: list[PlannedRun], replicas: int) -> list[list[PlannedRun]]:
    """The runs in lists for one process each: at most `replicas` that may share an encoder."""
    packs: list[list[PlannedRun]] = []
    filling: dict[Hashable, list[PlannedRun]] = {}
    for run in runs:
        found = filling.get(run.encoder) if run.encoder else None
        if found is None or len(found) == replicas:
            found = []
            packs.append(found)
            if run.encoder:
                filling[run.encoder] = found
        found.append(run)
    return packs


def _settings(label: str, chosen: Parameters, best: "_Best | None", taken: set[str]) -> Settings:
    """The settings of one run: the paper's, then the best ones, then what the grid says."""
    chosen = {"task": Settings.task, "method": Settings.method} | chosen
    pair = chosen["task"], chosen["method"]
    try:
        base = paper.settings(*pair, chosen.pop("table_8")) if "table_8" in chosen else {}
        if "follow" in chosen:
            check_name("follow", chosen.pop("follow"), ["authors"])
            base |= paper.authors(str(chosen["task"]))
        given = base | chosen
        settings = Settings(**base | (best.of(given) if best else {}) | chosen)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    for name, value in asdict(settings).items():
        if name not in taken and value != getattr(Settings, name):
            raise ValueError(f"{label} needs {name} = {value!r}, which the notebook does not take")
    return settings


class _Best:
    """The values with the best mean score in `best_of`, chosen for what a run is.

    Raises FileNotFoundError without a record, ValueError for runs with the grid's own seeds and for
    parameters that no run says. Says how many runs have not ended: it chooses without them.
    """

    def __init__(self, best_of: BestOf, seeds: set[Value]):
        self.folder, self.names, self.by = best_of["folder"], best_of["parameter"], best_of["by"]
        self.chosen: dict[Cell, Parameters] = {}
        try:
            self.runs = summaries.load(self.folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"best_of: {error}: run the grid that fills it first") from None
        if begun := unfinished(self.folder):
            print(f"best_of: in {self.folder} {len(begun)} of the runs have not ended: the best "
                  "values are chosen without them", flush=True)  # fmt: skip
        if both := sorted(seeds & set(self.runs.seed)):
            raise ValueError(
                f"best_of: {self.folder} has runs with the seeds {both} too: what is chosen on a "
                "seed must not be reported on it"
            )
        columns = [_column(name) for name in (*self.by, *self.names)]
        if missing := [name for name in columns if name not in self.runs]:
            raise ValueError(f"best_of: no run in {self.folder} says its {', '.join(missing)}")

    def of(self, given: Parameters) -> Parameters:
        """{parameter: the best value} for a run with these parameters.

        Raises ValueError where the folder has no runs of that kind, or none to choose between.
        """
        cell = tuple(given.get(name, getattr(Settings, name)) for name in self.by)
        if cell not in self.chosen:
            self.chosen[cell] = self._choose(cell)
        return self.chosen[cell]

    def _choose(self, cell: Cell) -> Parameters:
        what = ", ".join(f"{n} = {word}" for n, word in zip(self.by, cell, strict=True))
        runs, columns = self.runs, [_column(name) for name in self.names]
        for name, word in zip(self.by, cell, strict=True):
            runs = runs[runs[_column(name)] == word]
        runs = runs.dropna(subset=columns)  # runs that do not say theirs
        if runs.empty:
            raise ValueError(f"best_of has no runs of {what}")
        if len(runs.drop_duplicates(columns)) == 1:
            raise ValueError(
                f"best_of: {self.folder} has one value of {', '.join(self.names)} for {what}: "
                "nothing to choose from. Finish the grid that fills it, or set the value"
            )
        try:
            (values,) = summaries.choose(runs, columns, [_column(n) for n in self.by]).values()
        except ValueError as error:
            raise ValueError(f"best_of: {self.folder}: {error}") from None
        return {name: _whole(name, v) for name, v in zip(self.names, values, strict=True)}


def _column(parameter: str) -> str:
    """What a parameter is called in a table of runs."""
    return "importance_score" if parameter == "score" else parameter


def _whole(name: str, value: Value) -> Value:
    """A parameter out of a table: beside runs that lack it, a whole number is a float there."""
    return int(value) if type(getattr(Settings, name)) is int else value


def _look_at(task: str, data_dir: str) -> tuple[str, int]:
    data = FAMILIES[task].load_task(task, data_dir)
    if data.warning():
        print(data.warning(), flush=True)
    return data.fingerprint, len(data.train)


def _steps(label: str, settings: Settings, rows: int) -> int:
    try:
        check_sizes(settings.task, rows, settings.train_size, settings.holdout)
        T = settings.total_steps(settings.train_size or rows - settings.holdout)
        return settings.schedule(T).total_steps
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
