"""Notebook 07's experiment, "with and without DEM", again with ten other seeds.

    python results/dem_seeds.py

runs the cells of the notebook that are tagged `experiment` and writes dem_seeds.json: for each
setting and seed the mean difference of the cost of pruning to no regulariser, its standard error
over the pairs, and the mean cost without a regulariser. A minute on one core.
"""

import json
import platform
from pathlib import Path

import matplotlib
import nbformat
import torch

import drlora_ref

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent / "notebooks" / "07_dem_regulariser.ipynb"
SEEDS = range(1, 11)
WEIGHTS = (0.15, 0.3)


def experiment(seed: int) -> dict:
    """The names that the notebook's cells leave behind, with this seed."""
    names: dict = {}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if {"parameters", "experiment"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, names)
            names["seed"] = seed
    return names


def difference(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """[mean difference, its standard error, mean of the other]; shapes (runs,), (runs,)"""
    d = one - other
    numbers = d.mean(), d.std() / len(d) ** 0.5, other.mean()
    return [round(n.item(), 5) for n in numbers]


def main() -> None:
    """Run all seeds and write the record."""
    matplotlib.use("Agg")
    found: dict[str, list] = {f"{name} {w}": [] for w in WEIGHTS for name in ("DEM", "L2")}
    for seed in SEEDS:
        names = experiment(seed)
        none = names["train"](0)["cost"]
        for weight in WEIGHTS:
            for name, penalty in (("DEM", "dem_penalty"), ("L2", "l2_penalty")):
                cost = names["train"](weight, names[penalty])["cost"]
                found[f"{name} {weight}"].append(difference(cost, none))
        print(seed, {name: of_seeds[-1] for name, of_seeds in found.items()}, flush=True)
    record = {
        "device": f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "drlora_ref": drlora_ref.__version__},
        "seeds": list(SEEDS),
        "runs": len(none),
        "differences": found,
    }
    (HERE / "dem_seeds.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
