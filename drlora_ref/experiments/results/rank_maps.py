"""Do runs that differ in their seed alone find the same rank map?"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from drlora_ref.experiments.given import shown
from drlora_ref.experiments.results.summaries import check_cells
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.tasks.evaluation import check_positive
from drlora_ref.inject import matrix_label


def map_agreement(
    frame: pd.DataFrame,
    by: str | Sequence[str] = ("task", "arm"),
    permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike the rank maps of a cell's runs are: one row a cell with at least two runs.

    `spearman`: the mean rank correlation over all pairs of runs. `permuted`, permuted_low and
    permuted_high: the mean, and the range of 95 %, of the same after every map's ranks were dealt
    anew among the matrices of one shape. Read with care: permuted maps agree too, wherever the
    shapes differ in how much they get; agreement on single matrices is what lies above that.
    NaN where a map has one rank everywhere: uniform LoRA's. `n` counts maps. A run that diverged
    has found none: it is left out, and counted in `diverged`.

    Raises ValueError as `summarise` does, for runs of a cell that have other matrices, and for less
    than one permutation.
    """
    by = [by] if isinstance(by, str) else list(by)
    check_positive(permutations=permutations)
    check_cells(frame, by, "score")
    rows = []
    for key, cell in frame.groupby(by, dropna=False):
        found = cell[cell.status != "diverged"].folder.tolist()
        if len(found) > 1:
            names = {**dict(zip(by, key, strict=True)), "diverged": len(cell) - len(found)}
            rows.append({**names, **_agreement(found, permutations, seed)})
    columns = [*by, "spearman", "n", "permuted", "permuted_low", "permuted_high", "diverged"]
    return pd.DataFrame(rows, columns=columns)


def _agreement(folders: list[str], permutations: int, seed: int) -> dict[str, float]:
    maps = [_map_of(folder) for folder in folders]
    names = sorted(maps[0])
    for folder, own in zip(folders, maps, strict=True):
        if sorted(own) != names:
            raise ValueError(f"{folder} and {folders[0]} have ranks of other matrices")
    ranks = np.array([[own[name] for name in names] for own in maps], dtype=float)
    found, rng = mean_spearman(ranks), np.random.default_rng(seed)
    groups, times = same_shape(names), permutations if math.isfinite(found) else 1
    dealt = [mean_spearman(_dealt(ranks, groups, rng)) for _ in range(times)]
    low, high = np.quantile(dealt, [0.025, 0.975])
    return {
        "spearman": found,
        "n": len(maps),
        "permuted": float(np.mean(dealt)),
        "permuted_low": float(low),
        "permuted_high": float(high),
    }


def _map_of(folder: str) -> dict[str, int]:
    found = read_record(folder).get("rank_pattern", {})
    if not isinstance(found, dict) or not all(type(rank) is int for rank in found.values()):
        raise ValueError(
            f"{folder}: rank_pattern = {shown(found)}: must be names with whole numbers"
        )
    return found


def mean_spearman(ranks: np.ndarray) -> float:
    """The mean of Spearman's correlation over all pairs of rows; NaN if a row is all equal.

    Shapes: (maps, matrices). With rows of length 1 around mean 0, the pairs sum to half of
    ‖Σ rows‖² less the number of rows.

    >>> mean_spearman(np.array([[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]])).__round__(4)
    -0.3333
    """
    if not ranks.shape[1]:
        return math.nan
    placed = rankdata(ranks, axis=1)
    centred = placed - placed.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    if not lengths.all():
        return math.nan
    n, total = len(ranks), (centred / lengths).sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def same_shape(names: list[str]) -> list[list[int]]:
    """Places of the matrices that have one shape: attention's, and the feed-forward ones in turn.

    By their names, since a record has no shapes. Where there is a gate (Wg, as in Llama) it goes
    with Wf1, and key and value are apart: query heads may share them. Raises ValueError for a name
    that is none of these matrices.

    >>> same_shape([f"layer.0.{name}" for name in ("query", "intermediate.dense", "key")])
    [[0, 2], [1]]
    """
    labels = [matrix_label(name) for name in names]
    kinds = {"Wf1": "Wf1", "Wf2": "Wf2"}
    if "Wg" in labels:
        kinds |= {"Wg": "Wf1", "Wk": "key and value", "Wv": "key and value"}
    groups: dict[str, list[int]] = {}
    for place, (name, label) in enumerate(zip(names, labels, strict=True)):
        if not label:
            raise ValueError(f"{name} is none of the paper's matrices: its shape is not known")
        groups.setdefault(kinds.get(label, "attention"), []).append(place)
    return list(groups.values())


def _dealt(ranks: np.ndarray, groups: list[list[int]], rng: np.random.Generator) -> np.ndarray:
    dealt = ranks.copy()
    for places in groups:
        dealt[:, places] = rng.permuted(ranks[:, places], axis=1)
    return dealt
