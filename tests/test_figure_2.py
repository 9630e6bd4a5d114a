"""The claims of Section 5.2 on made-up rank maps in which each is true, or false."""

import math

import pytest

from drlora_ref.experiments.results import figure_2
from drlora_ref.experiments.results.figure_2 import CLAIMS, TOO_FEW, show_claims, third, try_claims

ENDS = {
    "Wq": "attention.self.query",
    "Wk": "attention.self.key",
    "Wv": "attention.self.value",
    "Wo": "attention.output.dense",
    "Wf1": "intermediate.dense",
    "Wf2": "output.dense",
}
NAMES = [claim.name for claim in CLAIMS]
each_depth = pytest.mark.parametrize("layers", [3, 6, 12])


def module(label: str, layer: int) -> str:
    return f"roberta.encoder.layer.{layer}.{ENDS[label]}"


def uniform(layers: int = 12, rank: int = 4) -> dict[str, int]:
    return {module(label, layer): rank for layer in range(layers) for label in ENDS}


def as_the_paper_says(layers: int = 12, rank: int = 4) -> dict[str, int]:
    """A map in which the four claims about groups of matrices are true."""
    changed = [("Wq", "middle", 2), ("Wk", "middle", 2), ("Wv", "middle", -2), ("Wo", "early", 2),
               ("Wf2", "late", -4)]  # fmt: skip
    ranks = uniform(layers, rank)
    for label, part, change in changed:
        for layer in range(layers):
            if third(layer, layers) == part:
                ranks[module(label, layer)] += change * rank // 4
    return ranks


def mirrored(ranks: dict[str, int], rank: int = 4) -> dict[str, int]:
    """What has more now has less."""
    return {name: 2 * rank - r for name, r in ranks.items()}


def verdicts(maps: list[dict]) -> dict[str, str]:
    return try_claims(maps).set_index("claim").verdict.to_dict()


@each_depth
def test_each_claim_holds_where_it_was_put_in_and_fails_in_the_mirror(layers):
    true = as_the_paper_says(layers)
    for maps, wanted, agree in [([true] * 6, "holds", 6), ([mirrored(true)] * 6, "does not", 0)]:
        found = try_claims(maps).iloc[:4]
        assert found.verdict.tolist() == [wanted] * 4
        assert found.agree.tolist() == [agree] * 4 and found.maps.tolist() == [6] * 4


@each_depth
@pytest.mark.parametrize("label, part, name", [
    ("Wq", "middle", "middle Wq, Wk: more"), ("Wk", "middle", "middle Wq, Wk: more"),
    ("Wo", "early", "early Wo: more"),
])  # fmt: skip
def test_one_matrix_moves_its_own_claim_only(layers, label, part, name):
    ranks = uniform(layers)
    (here, *_) = [layer for layer in range(layers) if third(layer, layers) == part]
    ranks[module(label, here)] += 3
    effects = {claim.name: claim.effects([ranks])[0] for claim in CLAIMS[:4]}
    assert effects[name] > 0
    elsewhere = [effect for other, effect in effects.items() if other != name]
    assert [e for e in elsewhere if e > 0] == []


def test_the_effect_is_a_difference_of_means_in_units_of_the_mean_rank():
    ranks = uniform(3, rank=4) | {module("Wo", 0): 9}  # 18 matrices, 77 components
    (found,) = CLAIMS[NAMES.index("early Wo: more")].effects([ranks])
    assert found == pytest.approx((9 - 4) / (77 / 18))
    doubled = {name: 2 * rank for name, rank in ranks.items()}
    assert CLAIMS[2].effects([doubled]) == pytest.approx([found])


def test_the_spread_is_that_over_maps():
    maps = [uniform(3) | {module("Wo", 0): rank, module("Wo", 2): 8 - rank} for rank in (5, 6, 7)]
    found = CLAIMS[2].test(maps)
    assert found.effect == pytest.approx(0.5) and found.std == pytest.approx(0.25)
    assert CLAIMS[2].test(maps[:1]).effect == pytest.approx(0.25)
    assert math.isnan(CLAIMS[2].test(maps[:1]).std)


def test_a_little_less_is_not_very_few():
    late = [module("Wf2", layer) for layer in range(8, 12)]
    for rank, wanted in [(3, "does not"), (1, "holds")]:
        maps = [uniform() | dict.fromkeys(late, rank)] * 5
        assert verdicts(maps)["late Wf2: very few"] == wanted


def test_a_uniform_map_agrees_with_nothing():
    found = try_claims([uniform(rank=rank) for rank in (2, 4, 8, 16)] * 3)
    assert found.agree.tolist() == [0] * 5 and found.effect.tolist() == [0.0] * 5
    assert set(found.verdict) == {"does not"}


def test_fewer_than_five_maps_are_too_few_even_if_all_agree():
    for n in range(5):
        assert set(verdicts([as_the_paper_says()] * n).values()) == {TOO_FEW}
    assert verdicts([as_the_paper_says()] * 5)["early Wo: more"] == "holds"


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_verdict_is_a_sign_test(n):
    tails = [sum(math.comb(n, k) for k in range(agree, n + 1)) / 2**n for agree in range(n + 1)]
    for agree, chance in enumerate(tails):
        assert (figure_2.verdict(agree, n) == "holds") == (chance <= 0.05)


def test_four_budgets_are_alike_if_the_pattern_is_the_same_at_each():
    budgets = (4, 8, 16, 32)
    alike = [as_the_paper_says(rank=rank) for rank in budgets] * 2
    assert CLAIMS[4].test(alike).effect == pytest.approx(1)
    assert verdicts(alike)["four budgets: alike"] == "holds"
    unlike = [mirrored(m, rank) if rank in (8, 32) else m
              for rank, m in zip(budgets * 2, alike, strict=True)]  # fmt: skip
    assert verdicts(unlike)["four budgets: alike"] == "does not"


def test_fewer_than_four_budgets_say_nothing_about_four():
    three = [as_the_paper_says(rank=rank) for rank in (4, 8, 16)] * 3
    found = CLAIMS[4].test(three)
    assert found.effect == pytest.approx(1) and found.verdict == TOO_FEW
    assert math.isnan(CLAIMS[4].test([as_the_paper_says()] * 9).effect)


def test_maps_that_cannot_say_are_not_counted():
    no_feed_forward = {n: r for n, r in as_the_paper_says().items() if "attention" in n}
    found = try_claims([no_feed_forward] * 6).set_index("claim")
    assert found.maps.tolist() == [6, 6, 6, 0, 0]
    assert found.verdict["late Wf2: very few"] == TOO_FEW
    two_layers = try_claims([uniform(2)] * 6).set_index("claim")
    assert two_layers.maps.tolist() == [0, 0, 6, 6, 0]


def test_a_decoder_is_left_out():
    def bart(side: str, ranks: dict[str, int]) -> dict[str, int]:
        names = {"Wq": "self_attn.q_proj", "Wk": "self_attn.k_proj", "Wv": "self_attn.v_proj",
                 "Wo": "self_attn.out_proj", "Wf1": "fc1", "Wf2": "fc2"}  # fmt: skip
        return {f"model.{side}.layers.{layer}.{names[label]}": ranks[module(label, layer)]
                for layer in range(6) for label in ENDS}  # fmt: skip

    encoder = as_the_paper_says(6)
    whole = bart("encoder", encoder) | bart("decoder", mirrored(encoder))
    assert set(list(verdicts([whole] * 5).values())[:4]) == {"holds"}


@pytest.mark.parametrize(
    "maps, message",
    [
        ([uniform(rank=0)], "without a component"),
        ([{n: r for n, r in uniform().items() if n != module("Wf2", 5)}], "lacks Wf2 of layer 5"),
        ([uniform(6), uniform(12)], "different models: only some name roberta.*layer.10"),
    ],
)
def test_a_map_that_cannot_be_read_is_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        try_claims(maps)


def test_the_table_has_a_line_a_claim_with_effect_and_count():
    records = [{"rank_pattern": as_the_paper_says()}] * 5 + [{"rank_pattern": uniform()}]
    head, *lines = show_claims(records).splitlines()
    assert head.split() == ["claim", "effect", "agree", "verdict"]
    for name, line in zip(NAMES, lines, strict=True):
        assert line.strip().startswith(name)
    assert lines[0].split()[-7:] == ["±", "0.26", "5", "of", "6", "does", "not"]
    assert lines[4].endswith("-- 0 of 0 too few maps")  # one budget


def test_each_claim_says_where_the_paper_makes_it():
    assert len(set(NAMES)) == len(CLAIMS) == 5
    assert all(claim.says and claim.place.startswith("Section 5.2") for claim in CLAIMS)
