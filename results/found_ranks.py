"""The ranks that each score finds, by how noisy the data are: what the book lets a reader move.

    python results/found_ranks.py

runs planted.recover on notebook 08's problem, for each score, noise and seed, and writes
found_ranks.json: the ranks found, map by map. Ten minutes on one core.
"""

import json
import platform
from pathlib import Path

import torch

import drlora_ref
from drlora_ref.planted import recover

HERE = Path(__file__).parent
PLANTED = [0, 0, 1, 2, 4, 6, 8, 11]
NOISES = [0.0, 1e-6, 0.1, 0.3, 0.5, 1.0]
SCORES = ["frobenius_share", "frobenius_norm", "output_norm", "loss_sensitivity", "abs_c", "random"]
SEEDS = [0, 1, 2]


def main() -> None:
    """Run all of them and write the record."""
    torch.set_num_threads(1)  # small matrices: more threads would only wait for each other
    runs = []
    for score in SCORES:
        for noise in NOISES:
            ranks = [recover(PLANTED, noise=noise, score=score, seed=seed).ranks for seed in SEEDS]
            runs.append({"score": score, "noise": noise, "ranks": ranks})
            print(score, noise, ranks, flush=True)
    record = {
        "device": f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "drlora_ref": drlora_ref.__version__},
        "planted_ranks": PLANTED,
        "seeds": SEEDS,
        "runs": runs,
    }
    (HERE / "found_ranks.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
