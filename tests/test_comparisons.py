"""Comparisons of a trial: intervals over seeds and examples, power, means over tasks, rank maps."""

import json
import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_LLAMA
from made_up_records import five, record
from scipy import stats
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from drlora_ref.experiments.results.examples import (
    METRICS,
    paired_by_example,
    pseudo_values,
    two_way,
)
from drlora_ref.experiments.results.power import (
    add_smallest_effect,
    mean_over_tasks,
    mean_ranks,
    smallest_effect,
)
from drlora_ref.experiments.results.rank_maps import map_agreement, mean_spearman, same_shape
from drlora_ref.experiments.results.report import show
from drlora_ref.experiments.results.summaries import choose, load, paired_difference, summarise
from drlora_ref.experiments.run.records import write_predictions
from drlora_ref.experiments.tasks import glue
from drlora_ref.inject import default_target_modules, find_targets

SCORE_OF = {
    "accuracy": accuracy_score,
    "matthews": lambda labels, found: np.corrcoef(labels, found)[
        0, 1
    ],  # of zeros and ones: the same
    "pearson": lambda labels, found: stats.pearsonr(labels, found).statistic,
}


def made_up(metric: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, labels) that agree most of the time."""
    if metric == "pearson":
        labels = rng.uniform(0, 5, n)
        return labels + rng.normal(0, 1, n), labels
    labels = (rng.random(n) < 0.7).astype(int)
    return np.where(rng.random(n) < 0.8, labels, 1 - labels), labels


# --- pseudo-values and the two-way interval ----------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_pseudo_values_are_those_of_leaving_each_example_out(metric):
    found, labels = made_up(metric, 40, np.random.default_rng(1))
    score, rows = SCORE_OF[metric], np.arange(40)
    whole = score(labels, found)
    out = [score(labels[rows != i], found[rows != i]) for i in rows]
    np.testing.assert_allclose(
        pseudo_values(metric, found, labels), 40 * whole - 39 * np.array(out), atol=1e-9
    )


def test_matthews_of_three_classes_and_of_one_answer_only():
    rng = np.random.default_rng(2)
    labels, found = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    rows = np.arange(60)
    out = [matthews_corrcoef(labels[rows != i], found[rows != i]) for i in rows]
    expected = 60 * matthews_corrcoef(labels, found) - 59 * np.array(out)
    np.testing.assert_allclose(pseudo_values("matthews", found, labels), expected, atol=1e-9)
    assert not pseudo_values("matthews", np.zeros(60, int), labels).any()  # a collapsed run
    assert not pseudo_values("pearson", np.full(60, 2.0), labels).any()
    assert not pseudo_values("pearson", np.full(60, np.nan), labels).any()


METRIC_OF = {"accuracy": "sst2", "matthews": "cola", "pearson": "stsb"}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-6, "one NaN", "one other answer", "none"])
def test_a_run_that_scores_zero_by_choice_has_zeros_for_all_its_examples(metric, spread):
    """By example it is as bad as by seed: the task's metric and the pseudo-values agree."""
    rng = np.random.default_rng(14)
    found, labels = made_up(metric, 50, rng)
    if isinstance(spread, float):
        found = (1 + spread * rng.standard_normal(50) * (metric == "pearson")).astype(np.float32)
    elif spread == "one other answer":
        found = np.ones(50)
        found[3] = 0
    as_answered = found.astype(float)
    if spread == "one NaN":
        as_answered[7] = math.nan
    score = glue.metric(METRIC_OF[metric], as_answered, labels)
    # As a record keeps it: a class of -1 where the answer was NaN.
    kept = as_answered if metric == "pearson" else np.nan_to_num(as_answered, nan=-1).astype(int)
    values = pseudo_values(metric, kept, labels)
    if spread == "one NaN" or (metric == "pearson" and isinstance(spread, float)):
        assert score == 0 and not values.any()
    rows = np.arange(50)
    left_out = [glue.metric(METRIC_OF[metric], as_answered[rows != i], labels[rows != i])
                for i in rows] if score else np.zeros(50)  # fmt: skip
    np.testing.assert_allclose(values, 50 * score - 49 * np.array(left_out), atol=1e-6)


def test_of_no_example_there_is_no_metric():
    for metric in METRICS:
        with pytest.raises(ValueError, match="no example: there is nothing to compare"):
            pseudo_values(metric, np.array([]), np.array([]))


@pytest.mark.parametrize("metric", METRICS)
def test_the_error_over_examples_is_that_of_a_brute_force_bootstrap(metric):
    rng = np.random.default_rng(3)
    found, labels = made_up(metric, 400, rng)
    values = pseudo_values(metric, found, labels)
    draws = rng.integers(0, 400, (2000, 400))
    drawn = [SCORE_OF[metric](labels[rows], found[rows]) for rows in draws]
    assert two_way(values[None]).examples.error == pytest.approx(np.std(drawn), rel=0.1)


def crossed(S, N, of_seed, of_example, of_both, rng, mean=0.0) -> np.ndarray:
    u, v = rng.normal(0, of_seed, (S, 1)), rng.normal(0, of_example, N)
    return mean + u + v + rng.normal(0, of_both, (S, N))


def test_with_one_source_of_chance_the_interval_is_scipys():
    rng = np.random.default_rng(4)
    seeds_only = np.repeat(rng.normal(size=(6, 1)), 50, axis=1)
    expected = stats.ttest_1samp(seeds_only[:, 0], 0).confidence_interval(0.95)
    for spread in (two_way(seeds_only).seeds, two_way(seeds_only).both):
        assert 2 * spread.half_width == pytest.approx(expected.high - expected.low)
    assert two_way(seeds_only).examples.error == pytest.approx(0, abs=1e-12)
    examples_only = np.repeat(rng.normal(size=(1, 50)), 6, axis=0)
    expected = stats.ttest_1samp(examples_only[0], 0).confidence_interval(0.95)
    for spread in (two_way(examples_only).examples, two_way(examples_only).both):
        assert 2 * spread.half_width == pytest.approx(expected.high - expected.low)


def test_the_whole_error_is_the_true_one_and_the_parts_are_less():
    """Over many trials of known variances: 0.3²/8 + 1²/200 + 2²/1600."""
    rng, estimates, means = np.random.default_rng(5), [], []
    for _ in range(600):
        values = crossed(8, 200, 0.3, 1.0, 2.0, rng)
        found = two_way(values)
        estimates.append([s.error**2 for s in found])
        means.append(values.mean())
    seeds, examples, both = np.mean(estimates, axis=0)
    parts = 0.3**2 / 8, 1.0 / 200, 4.0 / 1600
    assert both == pytest.approx(sum(parts), rel=0.06) == pytest.approx(np.var(means), rel=0.15)
    assert seeds == pytest.approx(parts[0] + parts[2], rel=0.06)
    assert examples == pytest.approx(parts[1] + parts[2], rel=0.06)


@pytest.mark.parametrize("spreads", [(0.3, 1.0, 2.0), (0.0, 1.0, 2.0), (0.5, 0.0, 2.0), (0, 0, 1)])
def test_the_interval_covers_the_truth_as_often_as_it_says_or_more(spreads):
    rng, covered, trials = np.random.default_rng(6), 0, 1000
    for _ in range(trials):
        values = crossed(5, 100, *spreads, rng, mean=0.7)
        covered += abs(values.mean() - 0.7) <= two_way(values).both.half_width
    assert 0.935 <= covered / trials <= 0.995


def test_one_seed_tells_of_examples_alone():
    found = two_way(np.random.default_rng(7).normal(size=(1, 30)))
    assert math.isnan(found.seeds.error) and math.isnan(found.both.half_width)
    assert found.examples.error > 0


# --- paired by example -------------------------------------------------------------------------


@pytest.fixture
def trial(tmp_path):
    """A function that writes runs with predictions on 200 held-out examples, and loads them.

    It is given {arm: share of right answers}; an arm's answers are right on the same examples in
    every seed but for a few, so that examples matter and are shared.
    """

    def make(shares, seeds=4, metric="accuracy", n=200, change=None) -> pd.DataFrame:
        rng = np.random.default_rng(8)
        labels, ease = rng.integers(0, 2, n), rng.random(n)
        for arm, share in shares.items():
            for seed in range(seeds):
                noise = np.random.default_rng([len(arm), seed]).normal(0, 0.05, n)
                found = np.where(ease + noise < share, labels, 1 - labels)
                kept = {"holdout_predictions": found.astype(np.int8),
                        "holdout_labels": labels.astype(np.int8)}  # fmt: skip
                folder = tmp_path / f"{arm}{seed}"
                folder.mkdir()
                held = record(arm, seed, 0.5, init_r=6)
                held |= {"metric_name": metric}
                held = change(arm, seed, held, kept) if change else held
                if kept:
                    held["predictions"] = write_predictions(kept, folder)
                (folder / "record.json").write_text(json.dumps(held))
        return load(tmp_path)

    return make


LORA, DYNAMIC = "lora r=2", "drlora r=6→2 abs_c"


def test_differences_are_of_the_same_examples_and_the_same_seeds(trial):
    found = trial({"lora": 0.80, "drlora": 0.83})
    row = paired_by_example(found, LORA).iloc[0]
    assert (row.task, row.arm, row.baseline, row.n, row.examples, row.unpaired) == (
        "cola", DYNAMIC, LORA, 4, 200, 0
    )  # fmt: skip
    by_seed = []
    for seed in range(4):
        runs = found[found.seed == seed].set_index("arm").folder
        kept = [np.load(f"{runs[arm]}/predictions.npz") for arm in (DYNAMIC, LORA)]
        scores = [(k["holdout_predictions"] == k["holdout_labels"]).mean() for k in kept]
        by_seed.append(scores[0] - scores[1])
    assert row["mean"] == pytest.approx(np.mean(by_seed))
    expected = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert (row.seeds_low, row.seeds_high) == pytest.approx((expected.low, expected.high))
    assert row.ci_high - row.ci_low >= max(
        row.seeds_high - row.seeds_low, row.examples_high - row.examples_low
    ) * 0.9  # fmt: skip
    assert row.smallest > 0
    # Unpaired, each arm's own sampling error would make it far wider.
    alone = 1.96 * math.sqrt(2 * 0.8 * 0.2 / 200)
    assert row.examples_high - row["mean"] < alone


def test_matthews_differences_agree_with_a_crossed_bootstrap(trial):
    matthews = SCORE_OF["matthews"]
    found = trial({"lora": 0.75, "drlora": 0.8}, seeds=6, metric="matthews")
    row = paired_by_example(found, LORA).iloc[0]
    tables = {arm: [np.load(f"{f}/predictions.npz") for f in runs.folder]
              for arm, runs in found.sort_values("seed").groupby("arm")}  # fmt: skip
    labels = tables[LORA][0]["holdout_labels"]
    answers = {arm: [k["holdout_predictions"] for k in kept] for arm, kept in tables.items()}
    rng, drawn = np.random.default_rng(9), []
    for _ in range(300):  # these examples anew, and these seeds anew
        rows, seeds = rng.integers(0, 200, 200), rng.integers(0, 6, 6)
        drawn.append(np.mean([matthews(labels[rows], answers[DYNAMIC][s][rows])
                              - matthews(labels[rows], answers[LORA][s][rows])
                              for s in seeds]))  # fmt: skip
    whole = np.mean([matthews(labels, answers[DYNAMIC][s])
                     - matthews(labels, answers[LORA][s]) for s in range(6)])  # fmt: skip
    assert row["mean"] == pytest.approx(whole, abs=2e-3)  # the jackknife's own bias is 1/N
    # The crossed bootstrap counts what seed and example do together up to three times.
    assert 0.75 < (row.ci_high - row.ci_low) / 2 / (1.96 * np.std(drawn)) < 1.35


def test_a_run_that_diverged_counts_as_wrong_everywhere(trial):
    def change(arm, seed, held, kept):
        if (arm, seed) != ("drlora", 2):
            return held
        kept.clear()
        return held | {"status": "diverged", "best": None, "evaluations": []}

    found = trial({"lora": 0.8, "drlora": 0.8}, change=change)
    row = paired_by_example(found, LORA).iloc[0]
    assert row.n == 4 and row["mean"] < -0.15


def shorter(arm, seed, held, kept):
    if (arm, seed) == ("drlora", 1):
        kept.update({name: array[:-3] for name, array in kept.items()})
    return held


def unequal(arm, seed, held, kept):
    if (arm, seed) == ("drlora", 1):
        kept["holdout_predictions"] = kept["holdout_predictions"][:-3]
    return held


def other_labels(arm, seed, held, kept):
    if (arm, seed) == ("drlora", 1):
        kept["holdout_labels"] = 1 - kept["holdout_labels"]
    return held


def of_another_split(arm, seed, held, kept):
    kept["validation_predictions"] = kept.pop("holdout_predictions")
    kept["validation_labels"] = kept.pop("holdout_labels")
    return held


def another_metric(arm, seed, held, kept):
    return held | {"metric_name": "f1"}


def one_nan(arm, seed, held, kept):
    """In each of the second arm's runs one answer is NaN."""
    if arm == "drlora":
        kept["holdout_predictions"][0] = -1
        held["holdout"] = {"metric": 0.0, "size": 200}
        return held
    right = kept["holdout_predictions"] == kept["holdout_labels"]
    return held | {"holdout": {"metric": float(right.mean()), "size": 200}}


def test_a_model_that_answers_nan_is_as_bad_by_example_as_by_seed(trial):
    found = trial({"lora": 0.8, "drlora": 0.8}, change=one_nan)
    by_example = paired_by_example(found, LORA).iloc[0]
    (by_seed,) = paired_difference(found, value="holdout_score", by="task").itertuples()
    assert by_example["mean"] == pytest.approx(by_seed.mean) and by_seed.mean < -0.7


def test_a_baseline_alone_gives_an_empty_table_with_its_columns(trial):
    found = trial({"lora": 0.8})
    assert {"mean", "ci_low", "error", "smallest"} <= set(paired_by_example(found, LORA).columns)
    empty = add_smallest_effect(paired_difference(found))
    assert empty.empty and {"mean", "std", "smallest"} <= set(empty.columns)


@pytest.mark.parametrize(
    "change, message",
    [
        (shorter, "lora0 has 200 examples, .*drlora1 has 197|drlora1 has 197 examples, .* has 200"),
        (unequal, "drlora1: 197 predictions for 200 labels"),
        (other_labels, "differ in 200 labels: other examples"),
        (of_another_split, r"no predictions on 'holdout', only on \['validation'\]"),
        (another_metric, "unknown metric of examples 'f1'"),
    ],
)
def test_predictions_that_do_not_belong_together_are_refused(trial, change, message):
    found = trial({"lora": 0.8, "drlora": 0.8}, change=change)
    with pytest.raises(ValueError, match=message):
        paired_by_example(found, LORA)


def test_a_changed_file_of_predictions_is_refused(trial, tmp_path):
    found = trial({"lora": 0.8, "drlora": 0.8})
    path = tmp_path / "lora0" / "predictions.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"lora0/predictions.npz is not the file"):
        paired_by_example(found, LORA)


# --- power -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 5, 8, 30])
def test_the_smallest_effect_is_found_in_four_of_five_trials(n):
    effect = smallest_effect(1.0 / math.sqrt(n), n - 1)
    rng = np.random.default_rng(10)
    trials = rng.normal(effect, 1.0, (20_000, n))
    assert (stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(
        0.8, abs=0.01
    )


def test_of_many_runs_it_is_the_normal_distributions():
    assert smallest_effect(1.0, math.inf) == pytest.approx(1.95996 + 0.84162, abs=1e-3)
    assert smallest_effect(0.0, 4) == 0 and math.isnan(smallest_effect(math.nan, 0))


def test_differences_say_what_so_few_pairs_could_have_shown(frame):
    scores = [0.5, 0.6, 0.55], [0.52, 0.6, 0.6]
    differences = paired_difference(frame(*five("lora", scores[0]), *five("drlora", scores[1])))
    row = add_smallest_effect(differences).iloc[0]
    spread = np.std(np.subtract(*scores), ddof=1)
    assert row.smallest == pytest.approx(smallest_effect(spread / math.sqrt(3), 2))
    assert f", min {100 * row.smallest:.1f} (3 pairs)" in show(add_smallest_effect(differences))


# --- means over tasks --------------------------------------------------------------------------


def test_a_mean_over_tasks_is_of_differences(frame):
    luck = [0.0, 0.02, 0.01], [0.1, 0.12, 0.08]
    runs = [run for i, task in enumerate(("cola", "rte")) for run in
            (*five("lora", [0.5] * 3, task=task),
             *five("drlora", [0.5 + x for x in luck[i]], task=task))]  # fmt: skip
    differences = paired_difference(frame(*runs))
    row = mean_over_tasks(differences).iloc[0]
    assert (row.task, row.method, row.n) == ("mean of 2 tasks", "drlora", 2)
    assert row["mean"] == pytest.approx(np.mean(luck))
    error = math.sqrt(sum(np.var(own, ddof=1) / 3 for own in luck)) / 2
    # Four degrees of freedom if both tasks had one variance (Welch), fewer if not.
    half = (row.ci_high - row.ci_low) / 2
    assert stats.t.ppf(0.975, 4) * error < half < stats.t.ppf(0.975, 2) * error
    assert "(2 tasks)" in show(mean_over_tasks(differences))


def test_a_mean_over_tasks_of_differences_by_example_has_the_error_of_both(trial):
    differences = paired_by_example(trial({"lora": 0.8, "drlora": 0.83}), LORA)
    two = pd.concat([differences, differences.assign(task="rte")])
    row, one = mean_over_tasks(two, "arm").iloc[0], differences.iloc[0]
    assert row["mean"] == pytest.approx(one["mean"]) and row.n == 2
    half = stats.t.ppf(0.975, 2 * one.freedom) * one.error / math.sqrt(2)
    assert (row.ci_high - row.ci_low) / 2 == pytest.approx(half)
    assert "(4 pairs, 200 examples)" in show(differences)


def test_a_mean_over_tasks_is_of_one_budget(frame):
    runs = []
    for task, r in (("cola", 3), ("rte", 2)):
        for method in ("lora", "drlora"):
            runs += five(method, [0.5, 0.6], task=task, target_r=r, init_r=r)
    differences = paired_difference(frame(*runs))
    assert differences.budget.nunique() == 2
    with pytest.raises(ValueError, match="drlora has several budgets: take one at a time"):
        mean_over_tasks(differences)


def test_a_mean_of_raw_metrics_is_refused(frame):
    summary = summarise(frame(*five("lora", [0.5, 0.6])))
    with pytest.raises(ValueError, match="raw metrics, not differences; take mean_ranks"):
        mean_over_tasks(summary)


def test_an_arm_that_lacks_a_task_has_no_mean(frame):
    # fmt: off
    runs = [*five("lora", [0.5, 0.6]), *five("drlora", [0.5, 0.6]), *five("bitfit", [0.1, 0.2]),
            *five("lora", [0.5, 0.6], task="rte"), *five("drlora", [0.5, 0.6], task="rte")]
    # fmt: on
    found = frame(*runs)
    with pytest.raises(ValueError, match="bitfit was not run on rte"):
        mean_ranks(summarise(found))
    ranks = mean_ranks(summarise(found[found.method != "bitfit"]))
    assert dict(zip(ranks.method, ranks.mean_rank, strict=True)) == {"drlora": 1.5, "lora": 1.5}
    assert "1.50 (2 tasks)" in show(ranks)
    unpaired = paired_difference(frame_without(found, "rte"))
    with pytest.raises(ValueError, match="drlora has no pair on rte"):
        mean_over_tasks(unpaired)


def frame_without(found: pd.DataFrame, task: str) -> pd.DataFrame:
    """Without the baseline on this task, and without bitfit."""
    return found[~((found.task == task) & (found.method == "lora")) & (found.method != "bitfit")]


# --- rank maps ---------------------------------------------------------------------------------

MATRICES = [
    f"roberta.encoder.layer.{i}.{name}"
    for i in range(6)
    for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                 "attention.output.dense", "intermediate.dense", "output.dense")
]  # fmt: skip


def test_mean_spearman_is_scipys_over_all_pairs():
    ranks = np.random.default_rng(11).integers(0, 7, (5, 36))
    pairs = [stats.spearmanr(a, b).statistic for a, b in combinations(ranks, 2)]
    assert mean_spearman(ranks) == pytest.approx(np.mean(pairs))
    assert math.isnan(mean_spearman(np.array([[1, 1, 1], [1, 2, 3]])))


def test_matrices_of_one_shape_are_attentions_and_each_feed_forward_one():
    assert sorted(map(len, same_shape(MATRICES))) == [6, 6, 24]
    with pytest.raises(ValueError, match="lm_head is none of the paper's matrices"):
        same_shape(["lm_head"])


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Gemma2Config])
def test_where_queries_share_keys_the_groups_of_names_are_those_of_shapes(config):
    sizes = dict(TINY_LLAMA, head_dim=4) if config is Gemma2Config else TINY_LLAMA
    model = AutoModelForCausalLM.from_config(config(**sizes))
    shapes = {
        n: m.weight.shape for n, m in find_targets(model, default_target_modules(model)).items()
    }
    by_shape = {}
    for place, shape in enumerate(shapes.values()):
        by_shape.setdefault(shape, []).append(place)
    assert sorted(same_shape(list(shapes))) == sorted(by_shape.values()) and len(by_shape) == 4


def maps(frame, patterns) -> pd.DataFrame:
    return frame(*[record("drlora", seed) | {"rank_pattern": dict(zip(MATRICES, own, strict=True))}
                   for seed, own in enumerate(patterns)])  # fmt: skip


def test_runs_that_find_one_map_agree_beyond_their_permuted_maps(frame):
    rng = np.random.default_rng(12)
    truth = rng.permutation(36)
    patterns = [(truth + rng.normal(0, 3, 36)).round().astype(int).tolist() for _ in range(5)]
    row = map_agreement(maps(frame, patterns), permutations=300).iloc[0]
    assert (row.task, row.n) == ("cola", 5) and row.spearman > 0.8
    assert row.permuted_low < row.permuted < row.permuted_high < 0.3 < row.spearman
    expected = f"{row.spearman:.2f}, permuted {row.permuted:.2f}"
    assert expected in show(pd.DataFrame([row])) and "(5 seeds)" in show(pd.DataFrame([row]))


def test_a_run_that_diverged_has_no_map_and_is_counted(frame):
    runs = [record("drlora", seed) | {"rank_pattern": dict(zip(MATRICES, own, strict=True))}
            for seed, own in enumerate([range(36), range(36), range(36, 0, -1)])]  # fmt: skip
    found = frame(*runs[:2], runs[2] | {"status": "diverged"})
    row = map_agreement(found, permutations=20).iloc[0]
    assert row.spearman == pytest.approx(1) and (row.n, row.diverged) == (2, 1)
    assert "(2 seeds, 1 diverged)" in show(pd.DataFrame([row]))
    with pytest.raises(ValueError, match="permutations = 0: must be at least 1"):
        map_agreement(found, permutations=0)


@pytest.mark.filterwarnings("error")
def test_runs_without_maps_agree_on_nothing_and_say_so_without_warnings(frame):
    runs = [record("lora", seed) | {"rank_pattern": {}} for seed in range(2)]
    assert math.isnan(map_agreement(frame(*runs)).iloc[0].spearman)


def test_maps_that_share_only_what_a_shape_gets_agree_no_more_than_permuted_ones(frame):
    rng, groups = np.random.default_rng(13), same_shape(MATRICES)
    patterns = np.zeros((6, 36), dtype=int)
    for level, places in enumerate(groups):
        patterns[:, places] = rng.integers(0, 4, (6, len(places))) + 3 * level
    row = map_agreement(maps(frame, patterns.tolist()), permutations=500).iloc[0]
    assert row.permuted > 0.3  # the shapes alone make them alike
    assert row.permuted_low <= row.spearman <= row.permuted_high


def test_maps_of_other_matrices_are_refused_and_one_run_has_no_agreement(frame, tmp_path):
    found = maps(frame, [range(36), range(36)])
    assert map_agreement(found[:1]).empty
    path = tmp_path / "grid" / "run1" / "record.json"
    held = json.loads(path.read_text())
    del held["rank_pattern"][MATRICES[3]]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"run1 and .*run0 have ranks of other matrices"):
        map_agreement(found)


# --- columns of a trial ------------------------------------------------------------------------


def test_each_run_may_have_a_permutation_of_its_own_and_no_map_as_it_is_among_them(frame):
    runs = [record("lora", seed, 0.5 + 0.01 * seed, rank_map="maps", permute_map=permutation)
            for seed, permutation in enumerate((1, 2, 3, 0))]  # fmt: skip
    everything = frame(*runs)
    permuted = everything[everything.permute_map > 0]
    (row,) = summarise(permuted, ["task", "arm"]).itertuples()
    assert (row.arm, row.n, row.mean) == ("lora r=2 permuted map", 3, pytest.approx(0.51))
    with pytest.raises(ValueError, match="differ in permute_map: permuted and as it is"):
        summarise(everything, ["task", "method"])
    apart = summarise(permuted, ["task", "permute_map"])
    assert apart.permute_map.tolist() == [1, 2, 3]  # who asks for them apart gets them apart


def test_a_row_names_its_arm_its_final_loss_and_its_score_on_the_rows_held_out(frame):
    runs = [
        record("drlora", 0, init_r=6),
        record("prune-once", 0, init_r=6, tfinal=0.0),
        record("lora", 1, rank_map="maps", permute_map=0),
        record("lora", 2, rank_map="maps", permute_map=4),
        record("bitfit", 0),
        record("lora", 3, status="diverged"),
        record("drlora", 4, init_r=6, beta=0.999),
    ]
    for run in runs[:5]:
        run |= {"loss_curve": [*[9.0] * 80, *[0.5] * 10, *[0.7] * 10]}
        run |= {"holdout": {"size": 5, "metric": 0.25, "collapsed": False}}
    runs[5] |= {"loss_curve": [0.5, None], "holdout": None, "steps": 2}
    found = frame(*runs)
    assert found.arm.tolist() == [
        "drlora r=6→2 abs_c", "prune-once r=6→2 last act", "lora r=2 given map",
        "lora r=2 permuted map", "bitfit", "lora r=2", "drlora r=6→2 abs_c beta=0.999",
    ]  # fmt: skip
    assert found.final_loss.tolist()[:5] == pytest.approx([0.6] * 5)
    assert math.isnan(found.final_loss[5])
    assert found.holdout_score.tolist()[:6] == [0.25] * 5 + [0.0]


def test_older_records_have_neither(frame):
    row = frame(record()).iloc[0]
    assert math.isnan(row.final_loss) and math.isnan(row.holdout_score)


@pytest.mark.parametrize("name", ["metric_name", "scoring", "holdout"])
def test_arms_that_were_measured_otherwise_are_not_compared(frame, name):
    other = {"scoring": "authors"} if name == "scoring" else {}
    other |= {"holdout": 2000} if name == "holdout" else {}
    runs = [record("lora", 0), record("drlora", 0, **other)]
    for run in runs:
        run["holdout"] = {"size": 5, "metric": 0.25, "collapsed": False}
    if name == "metric_name":
        runs[1]["metric_name"] = "accuracy"
    with pytest.raises(ValueError, match=f"differ in {name}"):
        paired_difference(frame(*runs), value="holdout_score" if name == "holdout" else "score")


def test_of_a_loss_the_lowest_is_the_best(frame):
    runs = [record("lora", 0, learning_rate=1e-3), record("lora", 0, learning_rate=1e-2)]
    runs += [record("drlora", 0, learning_rate=1e-3)]
    for run, loss in zip(runs, (0.1, 0.9, 0.5), strict=True):
        run["loss_curve"] = [loss] * 100
    found = frame(*runs)
    assert choose(found, value="final_loss")["cola", "lora"] == 1e-3
    one_rate = found[found.learning_rate == 1e-3]
    losses = mean_ranks(summarise(one_rate, ("task", "method"), value="final_loss"))
    assert losses.set_index("method").mean_rank.to_dict() == {"lora": 1.0, "drlora": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": None},
        {"data": None},
        {"parameters": []},
        {"total_steps": "100"},
        {"total_steps": 0},
        {"total_steps": True},
        {"best": "high"},
        {"trainable_parameters": 7},
    ],
)
def test_a_record_with_something_of_another_kind_is_named(frame, change):
    with pytest.raises(ValueError, match=r"run0.record\.json is not the record of a run"):
        frame(record() | change)


def test_maps_that_somebody_wrote_are_told_apart_by_what_is_in_them(frame):
    runs = [record("lora", seed, rank_map="map.yaml", permute_map=0) for seed in (0, 1)]
    for run, sha256 in zip(runs, ("aaaa", "bbbb"), strict=True):
        run["rank_map"] = {"source": "file map.yaml", "sha256": sha256}
    with pytest.raises(ValueError, match="differ in rank_map_file: aaaa and bbbb"):
        summarise(frame(*runs))


def test_rates_that_were_tried_otherwise_are_no_choice(frame):
    runs = [record("lora", 0, learning_rate=rate) for rate in (1e-3, 1e-2)]
    runs[1]["model"]["sha256"] = "other"
    with pytest.raises(ValueError, match="differ in model_sha256"):
        choose(frame(*runs))


def test_a_cost_may_be_compared_however_the_score_was_taken(frame):
    found = frame(record("lora", 0), record("drlora", 0, scoring="authors"))
    assert paired_difference(found, value="seconds")["mean"].item() == 0


def test_losses_and_scores_are_not_ranked_together(frame):
    found = frame(record("lora", 0), record("drlora", 0))
    mixed = pd.concat([summarise(found), summarise(found, value="seconds")])
    with pytest.raises(ValueError, match="best when high, others when low"):
        mean_ranks(mixed.assign(task=mixed.task + mixed.metric, budget=""))
