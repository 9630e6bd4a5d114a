"""Which score finds planted ranks, in six worlds and over seeds: writes planted_scores.json.

python results/planted_scores.py [seeds]      about ten minutes on 2 CPU cores, notebook 17 reads it
"""

import json
import multiprocessing
import platform
import sys
from pathlib import Path

import torch

import drlora_ref
from drlora_ref.planted import recover

PLANTED = [0, 0, 1, 2, 4, 6, 8, 11]  # the true rank of each map
SCORES = [
    "frobenius_share",
    "frobenius_norm",
    "abs_c",
    "output_norm",
    "loss_sensitivity",
    "random",
]
# What differs from eight equal maps; of whatever is not given, the defaults of recover().
WORLDS: dict[str, dict] = {
    "equal maps": {},
    "input scales": {"input_scales": [0.3, 3.0, 3.0, 0.3, 1.0, 0.3, 3.0, 1.0]},
    "loss weights": {"loss_weights": [0.1, 10.0, 10.0, 0.1, 1.0, 0.1, 10.0, 1.0]},
    "stretched inputs": {"stretch": 1.0},
    "no noise": {"noise": 0.0},
    # Half of the budget, and three of the larger maps whose answers hardly anybody reads.
    "unread answers": {
        "target_r": 2,
        "loss_weights": [1.0, 1.0, 1.0, 0.01, 1.0, 0.01, 1.0, 0.01],
    },
}


def one_run(job: tuple[str, str, int]) -> tuple[list[int], float]:
    """(ranks found, relative error) of a world, a score and a seed."""
    world, score, seed = job
    torch.set_num_threads(1)
    result = recover(PLANTED, score=score, seed=seed, **WORLDS[world])
    return result.ranks, round(result.relative_error, 4)


def main(seeds: int = 5) -> None:
    jobs = [(world, score, s) for world in WORLDS for score in SCORES for s in range(seeds)]
    runs: dict[str, dict] = {world: {score: [] for score in SCORES} for world in WORLDS}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for (world, score, _), (ranks, error) in zip(jobs, pool.imap(one_run, jobs), strict=True):
            runs[world][score].append({"ranks": ranks, "relative_error": error})
            print(world, score, ranks, error, flush=True)
    record = {
        "device": platform.machine() + " CPU",
        "threads": 1,
        "versions": {m.__name__: m.__version__ for m in (torch, drlora_ref)},
        "planted_ranks": PLANTED,
        "worlds": WORLDS,
        "seeds": list(range(seeds)),
        "runs": runs,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
