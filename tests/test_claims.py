"""The claim ledger against the records, notebooks and tests that it names."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import nbformat
import pandas as pd
import pytest

from drlora_ref.experiments.results import examples, figure_2, rank_maps, summaries
from drlora_ref.experiments.results.claims import STATUSES, WHOSE, as_markdown, claims, ledger
from drlora_ref.experiments.run import records

ROOT = Path(__file__).parents[1]
each_claim = pytest.mark.parametrize("claim", claims(), ids=lambda claim: claim.id)


@cache
def errors_by_score() -> dict[tuple[str, str], list[float]]:
    """{(world, score): relative errors, one a seed} of notebook 17's runs."""
    runs = json.loads((ROOT / "results" / "planted_scores.json").read_text())["runs"]
    return {
        (world, score): [run["relative_error"] for run in found]
        for world, scores in runs.items()
        for score, found in scores.items()
    }


@cache
def studies() -> tuple[list[dict], dict, set]:
    """Notebook 21's runs with all their settings, the settings' defaults, and the seeds."""
    record = json.loads((ROOT / "results" / "planted_studies.json").read_text())
    runs = [record["defaults"] | run for run in record["runs"]]
    return runs, record["defaults"], set(record["seeds"])


def errors_of_study(**asked) -> list[float]:
    """Relative errors of notebook 21's runs with these settings, one a seed."""
    runs, defaults, seeds = studies()
    wanted = defaults | asked
    found = [r for r in runs if all(r[name] == value for name, value in wanted.items())]
    assert {run["seed"] for run in found} == seeds
    return [run["relative_error"] for run in found]


UNIFORM = {"score": "frobenius_norm", "uniform": True}


def unequal_needs() -> bool:
    wins = [
        max(errors_of_study(world=world)) < min(errors_of_study(world=world, **UNIFORM))
        for world in ("gentle", "steep")
    ]
    on_equal = mean(errors_of_study(world="equal")), mean(errors_of_study(world="equal", **UNIFORM))
    return all(wins) and on_equal[0] > on_equal[1]


def share() -> bool:
    found = errors_by_score()
    return min(found["equal maps", "frobenius_share"]) > max(found["equal maps", "frobenius_norm"])


def calmer_pruning() -> bool:
    record = json.loads((ROOT / "results" / "dem_seeds.json").read_text())["differences"]
    clear = {name: sum(-c > 2 * e for c, e, _ in found) for name, found in record.items()}
    return clear["DEM 0.3"] == clear["L2 0.3"] == 10 and 3 <= clear["DEM 0.15"] <= 7


def initial_budget() -> bool:
    of = {
        r: mean(errors_of_study(world="steep", score="frobenius_norm", init_r=r)) for r in (6, 12)
    }
    eq7 = {r: mean(errors_of_study(world="equal", init_r=r)) for r in (6, 12)}
    return of[12] < of[6] and eq7[12] > eq7[6]


def cheap() -> bool:
    ratio = json.loads((ROOT / "results" / "speed.json").read_text())["ratio_to_training_step"]
    return max(value for name, value in ratio.items() if name != "training step") < 0.01


def answers() -> bool:
    found = errors_by_score()
    scaled = found["input scales", "output_norm"]
    others = found["input scales", "frobenius_share"] + found["input scales", "frobenius_norm"]
    return max(scaled) < min(others)


def unread_answers() -> bool:
    found = errors_by_score()
    return max(found["unread answers", "loss_sensitivity"]) < 0.4 * min(
        found["unread answers", "output_norm"]
    )


def chance() -> bool:
    return all(
        mean(errors_of_study(world=world, score="random"))
        > mean(errors_of_study(world=world, **UNIFORM))
        for world in ("equal", "gentle", "steep")
    )


def other_penalties() -> bool:
    """Each at the best of the weights that notebook 21 tries."""
    runs, *_ = studies()
    best = {}
    for penalty in ("dem", "l2", "spectral"):
        mine = [r for r in runs if r["penalty"] == penalty and r["learning_rate"] == 0.01]
        weights = {r["penalty_weight"] for r in mine if r["penalty_weight"] > 0}
        tried = [errors_of_study(penalty=penalty, penalty_weight=weight) for weight in weights]
        best[penalty] = min(tried, key=mean)
    return max(best["l2"] + best["spectral"]) < min(best["dem"]) / 2


PAPER, ANSWERS = "drlora r=6→2 frobenius_share", "drlora r=6→2 output_norm"
NORM, LAYER = "drlora r=6→2 frobenius_norm", "drlora r=6→6 frobenius_share"
STEADY = "drlora r=6→2 random beta=0.999"
GIVEN, PERMUTED = "lora r=2 given map", "lora r=2 permuted map"


@cache
def trial() -> pd.DataFrame:
    """The runs of the trial on SST-2."""
    parts = [ROOT / f"results/trial_sst2{part}" for part in ("", "_answers", "_maps")]
    return summaries.load(*parts)


def runs_of(*arms: str) -> pd.DataFrame:
    """The trial's runs of these arms."""
    return trial()[trial().arm.isin(arms)]


def trial_difference(arm: str, against: str) -> Any:
    """How far an arm of the trial is above another: eight seeds, 5,000 held-out rows."""
    (found,) = examples.paired_by_example(runs_of(arm, against), against).itertuples()
    assert (found.n, found.examples) == (8, 5000)
    return found


def trial_interval(arm: str, against: str) -> tuple[float, float]:
    """The 95 % interval of this difference, in points."""
    found = trial_difference(arm, against)
    return round(100 * found.ci_low, 1), round(100 * found.ci_high, 1)


@cache
def tuning() -> pd.DataFrame:
    """The tuning runs on SST-2."""
    return summaries.load(ROOT / "results/trial_sst2_rates")


def at_one_cell(arm: str, against: str, rate: float, batch: int) -> list[float]:
    """How far a tuning run of an arm is above one of another, in points, at a cell, by seed."""
    here = tuning()[(tuning().learning_rate == rate) & (tuning().batch_size == batch)]
    one, other = (here[here.arm == a].set_index("seed").holdout_score for a in (arm, against))
    return [round(100 * d, 2) for d in one.sub(other).sort_index()]


def in_words(found: Any, scale: float, digits: int) -> list[str]:
    """How the texts quote a difference: its size and interval."""
    low, high = scale * found.ci_low, scale * found.ci_high
    ends = sorted((abs(low), abs(high))) if low > 0 or high < 0 else (low, high)
    return [
        f"{abs(scale * found.mean):.{digits}f}",
        f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}",
    ]


def loss_difference(arm: str, against: str) -> Any:
    """How far an arm's training loss is above another's: eight seeds."""
    both = runs_of(arm, against)
    (found,) = summaries.paired_difference(
        both, against, "task", "final_loss", arm="arm"
    ).itertuples()
    assert found.n == 8
    return found


def tuned_lora() -> bool:
    return trial_interval(PAPER, "lora r=2") == (-1.3, -0.6)


def more_than_chance() -> bool:
    steady = trial_difference(PAPER, STEADY)
    by_chance, loss = trial_interval(PAPER, CHANCE), loss_difference(PAPER, STEADY)
    in_loss = loss.ci_high < 0 and round(loss.mean, 2) == -0.02
    return by_chance == (0.4, 1.1) and steady.ci_low < 0 < steady.ci_high and in_loss


def better_score() -> bool:
    intervals = [trial_interval(arm, PAPER) for arm in (NORM, ANSWERS)]
    return intervals == [(-0.3, 0.2), (-0.6, 0.1)]


def the_layer() -> bool:
    both = runs_of(LAYER, "lora r=6")
    names = ("batch_size", "total_steps", "adapter_parameters")
    same = all(both[name].nunique() == 1 for name in names)
    intervals = trial_interval(LAYER, "lora r=6"), trial_interval(PAPER, LAYER)
    return same and intervals == ((-1.4, -0.8), (-0.9, -0.4))


def one_cut() -> bool:
    both = runs_of(PAPER, CUT)
    same = both.batch_size.nunique() == both.total_steps.nunique() == 1
    larger = runs_of(CUT).adapter_parameters.mean() / runs_of(PAPER).adapter_parameters.mean()
    same = same and round(larger, 2) == 1.16
    return same and trial_interval(PAPER, CUT) == (-1.9, -1.2)


def the_amount() -> bool:
    arms = "lora r=6", "lora r=2"
    (dev,) = examples.paired_by_example(runs_of(*arms), arms[1], split="validation").itertuples()
    steps = [set(runs_of(arm).total_steps) for arm in arms]
    return (
        trial_interval(*arms) == (0.5, 1.1)
        and dev.ci_low < 0 < dev.ci_high
        and steps == [{2000}, {1000}]
    )


def the_place() -> bool:
    of_more_rank = at_one_cell("lora r=6", "lora r=2", 5e-4, 16)
    rounded = [round(points, 1) for points in of_more_rank]
    return trial_interval(GIVEN, PERMUTED) == (-0.3, 0.2) and rounded == [0.4, 0.2]


def the_path() -> bool:
    return trial_interval(ANSWERS, GIVEN) == (-1.3, -0.6)


def shares_of_rank(arm: str) -> dict[str, float]:
    """How much of all rank these kinds of matrices have, over the maps of an arm."""
    found = {"Wq, Wk, Wf1": 0.0, "Wo, Wf2": 0.0}
    folders = runs_of(arm).folder
    for folder in folders:
        ranks = figure_2.encoder_ranks(records.read_record(folder)["rank_pattern"])
        for kinds in found:
            mine = sum(rank for (kind, _), rank in ranks.items() if kind in kinds.split(", "))
            found[kinds] += mine / sum(ranks.values()) / len(folders)
    return {kinds: round(share, 2) for kinds, share in found.items()}


def one_map() -> bool:
    found = rank_maps.map_agreement(runs_of(PAPER, ANSWERS, NORM), "arm", 200)
    agree = found.set_index("arm")[["n", "spearman", "permuted"]].round(2)
    assert (agree.n == 8).all()
    assert (agree.spearman[NORM], agree.permuted[NORM]) == (0.61, 0.06)
    assert shares_of_rank(ANSWERS) == {"Wq, Wk, Wf1": 0.82, "Wo, Wf2": 0.05}
    return (agree.spearman[ANSWERS], agree.spearman[PAPER]) == (0.72, 0.14) and (
        agree.permuted[ANSWERS], abs(agree.permuted[PAPER])) == (0.20, 0.0)  # fmt: skip


CUT = "prune-once r=6→2"
CHANCE = "drlora r=6→2 random"
TUNER = "contrib/peft/README.md"
BOTH = ("README.md", "notebooks/18_where_should_the_rank_go.ipynb")
# The differences that these texts quote in words: in points, and in training loss.
IN_POINTS = {
    (PAPER, "lora r=2"): (*BOTH, TUNER),
    (PAPER, CHANCE): BOTH,
    (PAPER, STEADY): BOTH,
    ("lora r=6", "lora r=2"): BOTH,
    (CUT, "lora r=6"): BOTH,
    (CUT, "lora r=2"): BOTH,
    (LAYER, "lora r=6"): (*BOTH, TUNER),
    (PAPER, LAYER): BOTH,
    (LAYER, "lora r=2"): BOTH[1:],
    (NORM, PAPER): BOTH,
    (NORM, CUT): BOTH[1:],
    (ANSWERS, PAPER): BOTH,
    (PAPER, CUT): BOTH,
    (GIVEN, PERMUTED): BOTH,
    (ANSWERS, GIVEN): BOTH,
    (STEADY, CHANCE): BOTH[1:],
    (GIVEN, "lora r=2"): BOTH[1:],
}
IN_LOSS = {
    (PAPER, "lora r=2"): BOTH,
    (PAPER, STEADY): BOTH,
    (PAPER, CUT): BOTH[1:],
    (LAYER, "lora r=6"): BOTH[1:],
    (PAPER, LAYER): BOTH[1:],
    ("lora r=6", "lora r=2"): BOTH[1:],
    (GIVEN, PERMUTED): BOTH[1:],
    (GIVEN, "lora r=2"): BOTH[1:],
    (ANSWERS, GIVEN): BOTH[1:],
}

# What a claim with a record says, recomputed from it; its status and note stand on this.
CHECKS = {
    "unequal needs": unequal_needs,
    "share": share,
    "calmer pruning": calmer_pruning,
    "initial budget": initial_budget,
    "cheap": cheap,
    "answers": answers,
    "unread answers": unread_answers,
    "chance": chance,
    "other penalties": other_penalties,
    "tuned LoRA": tuned_lora,
    "better score": better_score,
    "the layer": the_layer,
    "one cut": one_cut,
    "more than chance": more_than_chance,
    "the amount": the_amount,
    "the place": the_place,
    "the path": the_path,
    "one map": one_map,
}


def test_each_claim_has_a_name_of_its_own_and_words_of_the_ledger():
    assert len({claim.id for claim in claims()}) == len(claims()) == len(ledger())
    assert {claim.whose for claim in claims()} == set(WHOSE)
    assert {claim.status for claim in claims()} == set(STATUSES)


@each_claim
def test_the_evidence_is_there(claim):
    assert claim.evidence
    for item in claim.evidence:
        if number := re.fullmatch(r"notebook (\d\d)", item):
            assert list((ROOT / "notebooks").glob(f"{number[1]}_*.ipynb")), item
        else:
            records = (ROOT / item).glob("*/record.json")  # where it is a folder of them
            assert (ROOT / item).is_file() or any(records), item


@each_claim
def test_what_a_record_decides_is_recomputed(claim):
    assert (claim.id in CHECKS) == any(item.startswith("results/") for item in claim.evidence)
    assert claim.id not in CHECKS or CHECKS[claim.id]()


@cache
def bullets(text: str) -> list[str]:
    """The bullets of a Markdown file, or of what a notebook concludes."""
    if text.endswith(".ipynb"):
        cells = nbformat.read(ROOT / text, 4).cells
        words = next(cell.source for cell in cells if "## What we now know" in cell.source)
    else:
        words = (ROOT / text).read_text(encoding="utf-8")
    return [" ".join(words.split()) for words in re.split(r"^ *- ", words, flags=re.MULTILINE)]


@pytest.mark.parametrize("arm, against", IN_POINTS)
def test_a_difference_that_a_text_quotes_is_the_records(arm, against):
    figures = in_words(trial_difference(arm, against), 100, 2)
    for text in IN_POINTS[arm, against]:
        assert any(all(f in bullet for f in figures) for bullet in bullets(text)), (text, figures)


@pytest.mark.parametrize("arm, against", IN_LOSS)
def test_a_training_loss_that_a_text_quotes_is_the_records(arm, against):
    figures = in_words(loss_difference(arm, against), 1, 3)
    for text in IN_LOSS[arm, against]:
        assert any(all(f in bullet for f in figures) for bullet in bullets(text)), (text, figures)


def test_what_18_says_of_the_tuning_is_the_records():
    assert at_one_cell("lora r=6", "lora r=2", 5e-4, 16) == [0.42, 0.16]
    assert at_one_cell(CUT, "lora r=2", 5e-4, 16) == [0.30, 0.10]
    assert at_one_cell(PAPER, ANSWERS, 1e-3, 16) == [0.44, -0.44]
    means = tuning()[tuning().arm == PAPER].groupby(["batch_size", "learning_rate"]).score.mean()
    assert (means[16] > means[32]).sum() == 3 and len(means[16]) == 4


def test_what_18_says_of_longer_runs_is_the_records():
    at = ["arm", "seed", "learning_rate", "batch_size"]
    both = summaries.load(ROOT / "results/trial_sst2_length").merge(tuning(), on=at)
    both["gain"] = (100 * (both.holdout_score_x - both.holdout_score_y)).round(2)
    longer = both[both.epochs_x == 8].set_index("arm").gain
    assert longer.to_dict() == {PAPER: 0.72, "lora r=2": 0.32}
    shorter = both[both.epochs_x == 2].gain
    assert (len(shorter), shorter.min(), shorter.max()) == (4, -1.82, -0.98)


def test_what_is_not_run_names_no_record():
    for claim in claims():
        records = [item for item in claim.evidence if item.startswith("results/")]
        assert not (records and claim.status == "not run"), claim.id


def test_another_word_for_whose_is_refused():
    with pytest.raises(ValueError, match=r"whose 'theirs' .*use paper, ours"):
        ledger("theirs")


def test_readme_has_the_papers_side_of_the_ledger():
    assert as_markdown("paper") in (ROOT / "README.md").read_text(encoding="utf-8")
