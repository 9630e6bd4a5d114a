"""LoRA with a given rank in every matrix: the control that asks whether it matters where rank goes.

A map that one run found is given to another run (transplanted), as it is or permuted among the
matrices of one shape. If the permuted map serves as well, it is not the place that counts.
"""

import random
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from drlora_ref.experiments.given import nearest, shown
from drlora_ref.inject import default_target_modules, find_targets


def lora_ranks(
    model: nn.Module, ranks: Mapping[str, int], permute: int, target_r: int, lora_alpha: float
) -> dict[str, Any]:
    """What PEFT's LoraConfig takes for a map: r, lora_alpha, their patterns, target_modules.

    Choice: the scaling is lora_alpha / target_r in every matrix, as in uniform LoRA, by PEFT's
    alpha_pattern. Left alone, PEFT would divide by each matrix's own rank: then a map would also
    set how strongly each matrix is updated, and the comparison with uniform LoRA would be of both.
    Raises ValueError as check_rank_map and permuted do.
    """
    matrices = find_targets(model, default_target_modules(model))
    check_rank_map(ranks, matrices, target_r)
    if permute:
        ranks = permuted(ranks, matrices, permute)
    adapted = {name: ranks[name] for name in matrices if ranks[name]}
    # A key of a pattern is a regular expression, which without "^" may match the end of a name.
    pattern = {"^" + re.escape(name): rank for name, rank in adapted.items()}
    return {
        "r": target_r,
        "lora_alpha": lora_alpha,
        "rank_pattern": pattern,
        "alpha_pattern": {key: lora_alpha * rank / target_r for key, rank in pattern.items()},
        "target_modules": list(adapted),
    }


def check_rank_map(
    ranks: Mapping[str, int], matrices: Mapping[str, nn.Linear], target_r: int
) -> None:
    """Raise ValueError unless these are ranks of these matrices, target_r of them on average.

    Each is a whole number, from 0 to the smaller side of its matrix; every matrix has one.

    >>> check_rank_map({"query": 3, "key": 1}, {n: nn.Linear(4, 4) for n in ("query", "key")}, 2)
    >>> check_rank_map({"query": 3}, {"query": nn.Linear(4, 4)}, 2)
    Traceback (most recent call last):
    ValueError: rank_map: 3 components in all, but the budget is target_r = 2 times 1 matrices = 2
    """
    if unknown := sorted(set(ranks) - set(matrices), key=str):
        near = nearest(unknown[0], matrices) or "none"
        raise ValueError(f"rank_map: the model has no matrix {shown(unknown[0])} (nearest: {near})")
    if missing := [name for name in matrices if name not in ranks]:
        raise ValueError(f"rank_map: no rank for {', '.join(missing)}; 0 means no adapter")
    for name, rank in ranks.items():
        most = min(matrices[name].weight.shape)
        if type(rank) is not int or not 0 <= rank <= most:
            raise ValueError(
                f"rank_map: {name}: {shown(rank)} must be a whole number from 0 to {most}"
            )
    total, budget = sum(ranks.values()), target_r * len(matrices)
    if total != budget:
        raise ValueError(
            f"rank_map: {total} components in all, but the budget is target_r = {target_r} times "
            f"{len(matrices)} matrices = {budget}"
        )


def permuted(
    ranks: Mapping[str, int], matrices: Mapping[str, nn.Linear], seed: int
) -> dict[str, int]:
    """The same ranks, dealt anew among the matrices of one shape: parameters stay as many.

    Dealt until some matrix has another rank: else the control would be the map itself. Raises
    ValueError where no deal could do that, as of a map with one rank in every matrix.

    >>> matrices = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 8), "c": nn.Linear(4, 4)}
    >>> permuted({"a": 1, "b": 2, "c": 3}, matrices, seed=2)
    {'a': 3, 'b': 2, 'c': 1}
    """
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        by_shape.setdefault(tuple(matrix.weight.shape), []).append(name)
    if all(len({ranks[name] for name in names}) == 1 for names in by_shape.values()):
        raise ValueError(
            "permute_map: no two matrices of one shape have different ranks, so every permutation "
            "is the map itself"
        )
    dealt, rng = dict(ranks), random.Random(seed)
    while dealt == ranks:
        for names in by_shape.values():
            own = [ranks[name] for name in names]
            rng.shuffle(own)
            dealt.update(zip(names, own, strict=True))
    return dealt
