"""Where a run's rank map comes from: a record, a folder of records, or a file somebody wrote."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from drlora_ref.experiments.given import place, read_yaml, shown
from drlora_ref.experiments.run.records import read_record, unfinished
from drlora_ref.experiments.run.settings import Settings


class RankMap(NamedTuple):
    """{matrix: rank} as it was found, and where, in words without a path."""

    ranks: dict[str, int]
    source: str


def sha256_of(rank_map: RankMap | None) -> str:
    """A hash of the ranks, in 16 digits, wherever they are kept; "" for None.

    >>> here, there = RankMap({"b": 1, "a": 2}, "a file"), RankMap({"a": 2, "b": 1}, "a run")
    >>> sha256_of(here) == sha256_of(there)
    True
    """
    if rank_map is None:
        return ""
    text = json.dumps(rank_map.ranks, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_rank_map(settings: Settings, model_sha256: str) -> RankMap | None:
    """The map that `settings.rank_map` names, not yet permuted; None where it names none.

    - a record.json, or the folder of one run: the ranks that this run ended with
    - a folder of runs: those of the run with the next seed. Next to the highest comes the lowest,
      so that s runs with the seeds of s donors each get a map, each another one, and none its own
      (where it is otherwise, shared_donors says so)
    - any other file, YAML or JSON: its lines `matrix: rank`

    A run that diverged has found no map: in a folder it is passed over. One that collapsed has:
    which runs are good is not for the control to choose.

    Whether the map fits the model, methods.rank_maps says. Raises FileNotFoundError, and ValueError
    for a record that is cut short, of another model or of a run that diverged, for a folder with a
    record of another model or without ranks, whichever would be taken, with two runs of one seed, a
    seed that is no whole number, a run that has not ended, or no map of another seed, and for a
    file that holds anything else.
    """
    if not settings.rank_map:
        return None
    path = place(settings.rank_map)
    if _is_folder_of_runs(path):
        donors = _donors(path)
        for donor, record in donors.values():  # not only the one that is taken
            if not _diverged(record):
                _check_model(donor, record, model_sha256)
        return _of_record(*donors[_next(settings.seed, donors, path)], model_sha256)
    if path.is_dir():
        path = path / "record.json"
    if not path.exists():
        raise FileNotFoundError(f"rank_map: {path}: no such file or folder")
    found = read_record(path) if path.suffix == ".json" else read_yaml(path)
    if "rank_pattern" in found:
        return _of_record(path, found, model_sha256)
    return RankMap(found, f"file {path.name}")


def shared_donors(rank_map: str, seeds: Iterable[int]) -> dict[int, list[int]]:
    """{seed of a donor: the seeds of the runs that get its map}, where these are two or more.

    Runs that share a map say less than as many runs with a map each. {} where `rank_map` offers no
    choice: "", one record, one file, a folder of one run. Raises ValueError as find_rank_map does
    for the seeds of a folder.
    """
    path = place(rank_map)
    donors = _donors(path) if rank_map and _is_folder_of_runs(path) else {}
    runs: dict[int, list[int]] = {}
    for seed in sorted(set(seeds)) if len(donors) > 1 else ():
        runs.setdefault(_next(seed, donors, path), []).append(seed)
    return {donor: theirs for donor, theirs in runs.items() if len(theirs) > 1}


def _is_folder_of_runs(path: Path) -> bool:
    return path.is_dir() and not (path / "record.json").exists()


def _donors(folder: Path) -> dict[int, tuple[Path, dict]]:
    """{seed: (path, record)} of all runs in or below a folder."""
    donors: dict[int, tuple[Path, dict]] = {}
    for run in unfinished(folder):
        raise ValueError(
            f"rank_map: {run} has not ended: with its map, other runs would get other maps than "
            "without it. Finish it, or take it out of the folder"
        )
    for path in sorted(folder.rglob("record.json")):
        record = read_record(path)
        given = record.get("parameters")
        seed = record.get("seed", given.get("seed") if isinstance(given, dict) else None)
        if type(seed) is not int:
            raise ValueError(f"rank_map: {path}: seed = {shown(seed)} must be a whole number")
        if seed in donors:
            raise ValueError(
                f"rank_map: {donors[seed][0]} and {path} are both of seed {seed}: a folder of maps "
                "holds one run for each seed"
            )
        donors[seed] = path, record
    return donors


def _next(seed: int, donors: dict[int, tuple[Path, dict]], folder: Path) -> int:
    """The seed of the donor whose map the run of this seed gets."""
    others = sorted(set(donors) - {seed})
    sound = [other for other in others if not _diverged(donors[other][1])]
    if not sound:
        there = "no run of another seed" if donors else "no record.json"
        there = "of another seed only runs with the status 'diverged'" if others else there
        raise ValueError(f"rank_map: {there} in or below {folder}, for the run of seed {seed}")
    return next((other for other in sound if other > seed), sound[0])


def _diverged(record: dict) -> bool:
    return record.get("status") == "diverged"


def _check_model(path: Path, record: dict, model_sha256: str) -> dict[str, int]:
    """The ranks of a record; raises ValueError if it has none, or those of another model."""
    ranks, model = record.get("rank_pattern"), record.get("model", {})
    if not isinstance(ranks, dict) or not ranks or not isinstance(model, dict):
        raise ValueError(f"rank_map: {path} is of a method without ranks, or no record")
    theirs = str(model.get("sha256", ""))
    if theirs != model_sha256:
        raise ValueError(
            f"rank_map: {path} is of another model (sha256 {theirs[:12]}, here {model_sha256[:12]})"
        )
    return ranks


def _of_record(path: Path, record: dict, model_sha256: str) -> RankMap:
    ranks = _check_model(path, record, model_sha256)
    if _diverged(record):
        raise ValueError(f"rank_map: {path} has the status 'diverged': this run found no map")
    seed = record.get("seed", "unknown")
    return RankMap(ranks, f"run {path.resolve().parent.name}, seed {seed}")
