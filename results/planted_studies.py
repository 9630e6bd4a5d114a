"""What small problems answer of the paper's open checks: writes planted_studies.json.

python results/planted_studies.py [seeds]    ten minutes on 2 CPU cores, notebook 18 reads it

Every run is written when it is done, and the same command goes on from there. To start afresh (the
numbers of other versions stay as they are), remove the file.
"""

import functools
import json
import math
import multiprocessing
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import drlora_ref
from drlora_ref.importance import importance_scores, update_norm
from drlora_ref.planted import RecoveryResult, recover
from drlora_ref.schedule import BudgetSchedule

OUT = Path(__file__).with_suffix(".json")
SCORES = ["frobenius_share", "frobenius_norm", "output_norm", "random"]
WEIGHTS = {  # of each penalty, such that the best is not the first and not the last
    "dem": [0.1, 0.3, 1.0, 3.0, 10.0],
    "l1": [0.1, 0.3, 1.0, 3.0, 10.0],
    "l2": [1.0, 3.0, 10.0, 30.0, 100.0],
    "spectral": [3.0, 10.0, 30.0, 100.0, 300.0],
}
RATES = [0.1, 0.3, 1.0]  # ten times what recover() trains with, and more
# Eight maps with a budget of four components each on average; what recover() is given of them.
WORLDS: dict[str, dict] = {
    "equal": {"planted_ranks": [4] * 8},
    "gentle": {"planted_ranks": [2, 3, 3, 4, 4, 5, 5, 6]},
    "steep": {"planted_ranks": [0, 0, 1, 2, 4, 6, 8, 11]},
    # Every second map needs changes a quarter as strong, and the loss counts them as the others.
    "fine": {
        "planted_ranks": [4] * 8,
        "strengths": [1.0, 0.25] * 4,
        "loss_weights": [1.0, 16.0] * 4,
    },
}
# A run says only where it differs from these.
DEFAULTS = {
    "world": "steep",
    "score": "frobenius_share",
    "uniform": False,
    "init_r": 12,
    "target_r": 4,
    "total_steps": 1500,
    "penalty": "dem",
    "penalty_weight": 0.0,
    "learning_rate": 0.01,
}


def allocation() -> list[dict]:
    """Next check 1, and the signature of fine-grained tasks: the same budget, given out otherwise.

    Uniform: every map keeps its own best four, by the norm.
    """
    informed = [{"world": w, "score": s} for w in WORLDS for s in SCORES]
    uniform = [{"world": w, "score": "frobenius_norm", "uniform": True} for w in WORLDS]
    return [*informed, *uniform, {"world": "fine", "score": "loss_sensitivity"}]


def initial_budgets() -> list[dict]:
    """Next check 3: initial over final budget 1, 1.5, 2 and 3; and other lengths for the lowest."""
    lower = [{"world": w, "init_r": r} for w in ("equal", "gentle", "steep") for r in (4, 6, 8)]
    by_norm = [{"score": "frobenius_norm", "init_r": r} for r in (6, 8)]
    return lower + by_norm + [{"init_r": 4, "total_steps": steps} for steps in (750, 3000)]


def penalties() -> list[dict]:
    """Next check 2 and open question 3: each penalty at many weights, and where no map is idle."""
    given = [{"penalty": p, "penalty_weight": w} for p in WEIGHTS for w in WEIGHTS[p]]
    rivals = [{"penalty": p, "penalty_weight": w} for p in ("dem", "l2") for w in (1.0, 10.0)]
    return given + [one | {"world": "gentle"} for one in rivals]


def learning_rates() -> list[dict]:
    """The signature of exploding gradients: with and without pruning, and with a penalty."""
    arms: list[dict] = [{}, {"penalty_weight": 0.3}, {"penalty": "l2", "penalty_weight": 0.3}]
    arms += [{"target_r": 12}, {"target_r": 12, "penalty_weight": 0.3}]  # 12: nothing is pruned
    return [arm | {"learning_rate": rate, "total_steps": 750} for arm in arms for rate in RATES]


def one_run(given: dict) -> dict:
    """The settings of a run with its seed, and what came out. A run that diverged has no error."""
    torch.set_num_threads(1)
    settings, seen = DEFAULTS | given, {}
    arguments = WORLDS[settings.pop("world")] | settings

    @functools.wraps(importance_scores)
    def watched(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor) -> Tensor:
        seen.update(A=lora_A, B=lora_B, c=lora_c)  # the last ones are those of t_end
        return importance_scores(lora_A, lora_B, lora_c)

    if arguments["score"] == "frobenius_share":
        arguments["score"] = watched
    started = time.process_time()
    try:
        result = recover(**arguments)
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        return given | {"relative_error": None}
    error = result.relative_error if math.isfinite(result.relative_error) else None
    found = {"relative_error": digits(error), "ranks": result.ranks}
    if given.get("world", "steep") == "steep":  # the others are asked for their ranks alone
        found |= of_gradients(result, settings)
        found |= of_components(seen) if seen else {}
    return given | found | {"cpu_seconds": round(time.process_time() - started, 1)}


def of_gradients(result: RecoveryResult, settings: dict) -> dict:
    """Norms of the gradient: of `all`, and of what is `alive`, without the c of pruned components.

    before, after: the median of the 50 steps before the first event, and of all after the last one.
    peak: the largest after the first event, in units of `before`. jump: by which factor an event
    raises the norm from its own step to the next, geometric mean over all events.
    """
    schedule = BudgetSchedule(*(settings[k] for k in ("init_r", "target_r", "total_steps")))
    events = [t for t in range(1, schedule.t_end + 1) if schedule.prunes_at(t)]
    whole, pruned = torch.tensor([result.gradient_norms, result.pruned_norms], dtype=torch.float64)
    found = {}
    for name, norm in {"all": whole, "alive": (whole.square() - pruned.square()).sqrt()}.items():
        before = norm[schedule.tinit - 50 : schedule.tinit].median()
        jumps = norm[events] / norm[[t - 1 for t in events]]  # norm[t] is that of step t + 1
        found[name] = {
            "before": digits(before.item()),
            "after": digits(norm[schedule.t_end :].median().item()),
            "peak": digits((norm[schedule.tinit :].max() / before).item()),
            "jump": digits(jumps.log().mean().exp().item()),
        }
    return found


def of_components(seen: dict[str, Tensor]) -> dict:
    """At t_end: Eq. 10's variance of a component, the median; and the idle maps.

    idle_norm: ‖ΔW‖ of the larger one. idle_mean: which part of their ‖a‖² is that of the mean of a,
    which DEM leaves alone.
    """
    A, B, c = seen["A"], seen["B"], seen["c"]
    idle = torch.tensor(WORLDS["steep"]["planted_ranks"]) == 0
    of_mean = A[idle].mean(dim=-1).square() * A.shape[-1] / A[idle].square().sum(dim=-1)
    return {
        "variance": digits((A.var(dim=-1) + B.var(dim=-2)).median().item()),
        "idle_norm": digits(update_norm(A, B, c)[idle].max().item()),
        "idle_mean": digits(of_mean.mean().item()),
    }


def digits(number: float | None) -> float | None:
    """Four of them, which is more than the seeds agree on.

    >>> digits(0.123456), digits(None)
    (0.1235, None)
    """
    return None if number is None or not math.isfinite(number) else float(f"{number:.4g}")


def key(row: dict) -> str:
    """What makes a run that run."""
    return json.dumps([row.get(name, DEFAULTS[name]) for name in DEFAULTS] + [row["seed"]])


def jobs(seeds: range) -> dict[str, dict]:
    """All runs by their key; what two studies ask for is one run."""
    wanted = [*allocation(), *initial_budgets(), *penalties(), *learning_rates()]
    return {key(one | {"seed": s}): one | {"seed": s} for one in wanted for s in seeds}


def main(seeds: int = 5) -> None:
    asked = jobs(range(seeds))
    earlier = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
    done = {key(row): row for row in earlier}
    left = [given for k, given in asked.items() if k not in done]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, row in enumerate(pool.imap(one_run, left), 1):
            done[key(row)] = row
            write([done[k] for k in asked if k in done], seeds)
            print(f"{number} of {len(left)}", row, flush=True)


def write(rows: list[dict], seeds: int) -> None:
    """One line for each run; in place of the old file only when it is whole."""
    head = {
        "device": platform.machine() + " CPU",
        "threads": 1,
        "versions": {m.__name__: m.__version__ for m in (torch, drlora_ref)},
        "seeds": list(range(seeds)),
        "worlds": WORLDS,
        "defaults": DEFAULTS,
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n'
    OUT.with_suffix(".part").write_text(text)
    OUT.with_suffix(".part").replace(OUT)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
