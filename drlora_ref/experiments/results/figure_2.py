"""What Section 5.2 says about Figure 2, as claims that any set of rank maps can be held against.

A rank map is {module: surviving components}: a record's `rank_pattern`. The paper draws one map at
each of four budgets and reads tendencies off them, without a number. Here each tendency is one
number a map, and the verdict counts the maps that agree.

Choice: the paper's "intermediate", "initial" and "last few" layers are the middle, the first and
the last third of the layers, whatever the depth. A layer belongs to the third that its middle is
in. The paper gives no numbers.
Choice: "more" and "fewer" compare with the other matrices of the same layers. The paper does not
say with what. So a claim is about the matrix, not about the depth.
Choice: "very few" means fewer by more than half of the map's mean rank.
Choice: the "lower projection" of the feed-forward network is Wf2 of Eq. 4.

Read with care: the verdict takes maps for independent. Maps of one seed at several budgets are not
quite that, and maps of one task say nothing about another.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import NamedTuple

import pandas as pd
from scipy.stats import binom

from drlora_ref.inject import matrix_label
from drlora_ref.planted import rank_correlation

Map = dict[str, int]
THIRDS = ("early", "middle", "late")
TOO_FEW = "too few maps"


class Result(NamedTuple):
    """What some maps say about a claim. Only maps that have its matrices and layers count."""

    effect: float  # mean over maps, NaN without one; the unit is the claim's
    std: float  # of the effect over maps (n - 1), NaN with fewer than two
    maps: int
    agree: int  # maps in which the claim is true
    verdict: str  # "holds", "does not" or "too few maps"


class Claim(NamedTuple):
    """A tendency that the paper reads off Figure 2. `test` asks any set of maps for it."""

    name: str
    says: str  # the paper's sentence, in our words
    place: str
    effects: Callable[[Sequence[Map]], list[float]]  # one number a map; NaN: it cannot say
    is_true: Callable[[float], bool]  # of a map with this effect
    budgets: int = 1  # how many different budgets it speaks of

    def test(self, maps: Sequence[Map]) -> Result:
        """Whether the claim is true in more of the maps than coin tosses would be heads.

        Effects are in units of a map's mean rank, so that maps of several budgets can be averaged;
        of the claim that compares budgets it is a correlation. Raises ValueError for a map that
        lacks a matrix of some layer (one of rank 0 must be named too), or that has no component.
        """
        effects = [effect for effect in self.effects(maps) if not math.isnan(effect)]
        agree, n = sum(map(self.is_true, effects)), len(effects)
        enough = len({budget(ranks) for ranks in maps}) >= self.budgets
        return Result(
            effect=fmean(effects) if effects else math.nan,
            std=stdev(effects) if n > 1 else math.nan,
            maps=n,
            agree=agree,
            verdict=verdict(agree, n) if enough else TOO_FEW,
        )


def verdict(agree: int, maps: int) -> str:
    """A sign test: "holds" if so many agreeing maps would be heads of fair coins in 5 % or less.

    With fewer than five maps not even all of them would do. "does not" means that these maps do
    not show it; it is no proof of the opposite.

    >>> verdict(4, 4), verdict(5, 5), verdict(6, 8), verdict(7, 8)
    ('too few maps', 'holds', 'does not', 'holds')
    """
    if 0.5**maps > 0.05:
        return TOO_FEW
    return "holds" if binom.sf(agree - 1, maps, 0.5) <= 0.05 else "does not"


def third(layer: int, layers: int) -> str:
    """Whether layer 0 ... layers - 1 is early, middle or late.

    >>> [third(layer, 4) for layer in range(4)], third(3, 12), third(4, 12)
    (['early', 'middle', 'middle', 'late'], 'early', 'middle')
    """
    return THIRDS[3 * (2 * layer + 1) // (2 * layers)]


def budget(ranks: Map) -> float:
    """The mean rank of a map, which is b(T). Raises ValueError for a map without a component.

    >>> budget({"layer.0.query": 3, "layer.0.key": 0})
    1.5
    """
    if not any(ranks.values()):
        raise ValueError("a rank map without a component has no tendency")
    return fmean(ranks.values())


def difference(ranks: Map, labels: set[str], part: str) -> float:
    """Mean rank of these matrices less that of the others, in one third of the layers.

    Unit: the map's mean rank. `labels` are the paper's, as inject.matrix_label gives them. NaN if
    the map lacks one of them, has no others, or has no such layers (of two, neither is in the
    middle). Raises ValueError as `budget` and `encoder_ranks` do.

    >>> ranks = {f"layer.{i}.{name}": 2 for i in range(3) for name in ("query", "key", "value")}
    >>> difference(ranks | {"layer.1.query": 5}, {"Wq"}, "middle")  # 5 - 2, and the mean is 7/3
    1.2857142857142856
    """
    cells = encoder_ranks(ranks)
    layers = {layer for _, layer in cells}
    here = {cell: rank for cell, rank in cells.items() if third(cell[1], len(layers)) == part}
    these = [rank for (label, _), rank in here.items() if label in labels]
    those = [rank for (label, _), rank in here.items() if label not in labels]
    if not these or not those or not labels <= {label for label, _ in cells}:
        return math.nan
    return (fmean(these) - fmean(those)) / budget(ranks)


def encoder_ranks(ranks: Map) -> dict[tuple[str, int], int]:
    """{(label, layer): rank} of the matrices that Figure 2 shows; a decoder's are left out.

    Raises ValueError for a map that names a matrix in some layers only: if those of rank 0 are left
    out, a mean over the rest is too high.

    >>> encoder_ranks({"encoder.layer.0.attention.self.query": 3})
    {('Wq', 0): 3}
    """
    cells = {}
    for module, rank in ranks.items():
        label, index = matrix_label(module), re.search(r"\.(\d+)\.", module)
        if label and index and "decoder" not in module.split("."):
            cells[label, int(index[1])] = rank
    labels = {label for label, _ in cells}
    for layer in range(1 + max((layer for _, layer in cells), default=-1)):
        if missing := [label for label in sorted(labels) if (label, layer) not in cells]:
            raise ValueError(
                f"a rank map names every matrix, those of rank 0 too: this one lacks "
                f"{', '.join(missing)} of layer {layer}"
            )
    return cells


def likeness(maps: Sequence[Map]) -> list[float]:
    """Of each map, the mean of its Spearman correlations with the maps at other budgets.

    A map's budget is its mean rank. A correlation with a map that is the same everywhere counts as
    0; a map without another budget to compare with gets NaN. Raises ValueError for maps that name
    different matrices, and as `budget` does.

    >>> small, large = {"query": 1, "key": 2, "value": 3}, {"query": 2, "key": 6, "value": 10}
    >>> likeness([small, large])
    [1.0, 1.0]
    """
    for ranks in maps:
        if strange := set(ranks) ^ set(maps[0]):
            raise ValueError(f"maps of different models: only some name {min(strange)}")
    found = []
    for ranks in maps:
        others = [other for other in maps if budget(other) != budget(ranks)]
        alike = [
            rank_correlation(list(ranks.values()), [other[name] for name in ranks])
            for other in others
        ]
        ordered = [0.0 if math.isnan(one) else one for one in alike]
        found.append(fmean(ordered) if ordered else math.nan)
    return found


def _of_each(labels: set[str], part: str, maps: Sequence[Map]) -> list[float]:
    return [difference(ranks, labels, part) for ranks in maps]


CLAIMS = (
    Claim(
        "middle Wq, Wk: more",
        "in the intermediate layers, query and key matrices get more of the budget",
        "Section 5.2, paragraph 2, sentence 1",
        partial(_of_each, {"Wq", "Wk"}, "middle"),
        lambda effect: effect > 0,
    ),
    Claim(
        "middle Wv: fewer",
        "in the intermediate layers, value matrices get less",
        "Section 5.2, paragraph 2, sentence 1",
        partial(_of_each, {"Wv"}, "middle"),
        lambda effect: effect < 0,
    ),
    Claim(
        "early Wo: more",
        "the first output matrices of attention get more",
        "Section 5.2, paragraph 2, sentence 2",
        partial(_of_each, {"Wo"}, "early"),
        lambda effect: effect > 0,
    ),
    Claim(
        "late Wf2: very few",
        "the second feed-forward matrices get very little at the end, above all in the last layers",
        "Section 5.2, paragraph 2, sentence 3",
        partial(_of_each, {"Wf2"}, "late"),
        lambda effect: effect < -0.5,
    ),
    Claim(
        "four budgets: alike",
        "at all four budgets the ranks show the same tendencies",
        "Section 5.2, paragraph 3",
        likeness,
        lambda effect: effect > 0,
        budgets=4,
    ),
)


def try_claims(maps: Sequence[Map]) -> pd.DataFrame:
    """One row a claim: its name as `claim`, then the fields of its Result. Raises as its test does.

    The maps are of one model.
    """
    rows = [{"claim": claim.name, **claim.test(maps)._asdict()} for claim in CLAIMS]
    return pd.DataFrame(rows)


def show_claims(records: Iterable[dict]) -> str:
    """All claims on the maps of these records, as plain text. Every record counts, failed ones too.

    Take records of one model, of methods that choose ranks: LoRA's map is the same everywhere, and
    agrees with nothing. Raises ValueError as `try_claims` does.

    >>> ranks = {f"layer.{i}.{name}": 2 for i in range(3) for name in ("query", "key", "value")}
    >>> print(show_claims([{"rank_pattern": ranks | {"layer.1.value": 1}}]))
                  claim effect  agree      verdict
    middle Wq, Wk: more  +0.53 1 of 1 too few maps
       middle Wv: fewer  -0.53 1 of 1 too few maps
         early Wo: more     -- 0 of 0 too few maps
     late Wf2: very few     -- 0 of 0 too few maps
    four budgets: alike     -- 0 of 0 too few maps
    """
    found = try_claims([record["rank_pattern"] for record in records])
    effects = [_effect_text(*pair) for pair in zip(found.effect, found["std"], strict=True)]
    agree = [f"{true} of {n}" for true, n in zip(found.agree, found.maps, strict=True)]
    texts = found.assign(effect=effects, agree=agree)
    return texts[["claim", "effect", "agree", "verdict"]].to_string(index=False)


def _effect_text(mean: float, std: float) -> str:
    if math.isnan(mean):
        return "--"
    return f"{mean:+.2f}" if math.isnan(std) else f"{mean:+.2f} ± {std:.2f}"
