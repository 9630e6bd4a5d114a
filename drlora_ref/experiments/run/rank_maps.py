"""Where a run's rank map comes from: a record, a folder of records, or a file somebody wrote."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from drlora_ref.experiments.given import place, read_yaml
from drlora_ref.experiments.run.records import read_record
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
    - any other file, YAML or JSON: its lines `matrix: rank`

    Whether the map fits the model, methods.rank_maps says. Raises FileNotFoundError, and ValueError
    for a record that is cut short or of another model, for a folder with two runs of one seed, or
    with none of another seed, and for a file that holds anything else.
    """
    if not settings.rank_map:
        return None
    path = place(settings.rank_map)
    if path.is_dir() and not (path / "record.json").exists():
        return _next_in(path, settings.seed, model_sha256)
    if path.is_dir():
        path = path / "record.json"
    if not path.exists():
        raise FileNotFoundError(f"rank_map: {path}: no such file or folder")
    found = read_record(path) if path.suffix == ".json" else read_yaml(path)
    if "rank_pattern" in found:
        return _of_record(path, found, model_sha256)
    return RankMap(found, f"file {path.name}")


def _next_in(folder: Path, seed: int, model_sha256: str) -> RankMap:
    donors: dict[int, tuple[Path, dict]] = {}
    for path in sorted(folder.rglob("record.json")):
        record = read_record(path)
        its_seed = record.get("seed", record.get("parameters", {}).get("seed", 0))
        if its_seed in donors:
            raise ValueError(
                f"rank_map: {donors[its_seed][0]} and {path} are both of seed {its_seed}: a folder "
                "of maps holds one run for each seed"
            )
        donors[its_seed] = path, record
    others = sorted(set(donors) - {seed})
    if not others:
        there = "no run of another seed" if donors else "no record.json"
        raise ValueError(f"rank_map: {there} in or below {folder}, for the run of seed {seed}")
    chosen = next((other for other in others if other > seed), others[0])
    return _of_record(*donors[chosen], model_sha256)


def _of_record(path: Path, record: dict, model_sha256: str) -> RankMap:
    ranks, model = record.get("rank_pattern"), record.get("model", {})
    if not isinstance(ranks, dict) or not ranks or not isinstance(model, dict):
        raise ValueError(f"rank_map: {path} is of a method without ranks, or no record")
    theirs = str(model.get("sha256", ""))
    if theirs != model_sha256:
        raise ValueError(
            f"rank_map: {path} is of another model (sha256 {theirs[:12]}, here {model_sha256[:12]})"
        )
    seed = record.get("seed", "unknown")
    return RankMap(ranks, f"run {path.resolve().parent.name}, seed {seed}")
