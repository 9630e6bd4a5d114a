"""Notebook 14 on made-up records: what it prints and the tables that it leaves."""

import json
from pathlib import Path

import pandas as pd
import pytest
from in_process import execute

from drlora_ref.experiments.results import paper

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "14_tables_and_rank_maps.ipynb"
MATRICES = ("query", "key", "value")
FOLDERS = {"results_dir": "results", "output_dir": "out"}


def write(folder: Path, method: str, seed: int, score: float, **given) -> None:
    """A record of RoBERTa-base at the small budget, with as much as the tables read."""
    status = given.pop("status", "completed")
    task, metric = given.pop("task", "cola"), given.pop("metric_name", "matthews")
    extras = given.pop("extras", {})
    end = {"step": 100, "epoch": 2, "metric": score, "collapsed": status == "collapsed", **extras}
    parameters = dict(task=task, method=method, seed=seed, model_name="roberta-base", init_r=3,
                      target_r=2, dem_weight=0.15, max_steps=0, batch_size=16)  # fmt: skip
    record = {
        "status": status, "best": score, "best_ever": score, "last": score, "evaluations": [end],
        "metric_name": metric, "total_steps": 100, "steps": 100, "seconds": 60.0,
        "evaluation_seconds": 10.0, "parameters": parameters | given,
        "rank_pattern": {f"layer.{i}.{m}": (i + seed) % 4 for i in range(3) for m in MATRICES},
    }  # fmt: skip
    place = folder / f"{task}-{method}-{seed}-{given.get('target_r', 2)}-{given.get('dem_weight')}"
    place.mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """(the folder that the notebook filled, what it printed), once for all tests here."""
    root = tmp_path_factory.mktemp("tables")
    for seed, (dynamic, plain) in enumerate([(0.62, 0.60), (0.64, 0.61), (0.0, 0.59)]):
        status = "collapsed" if dynamic == 0 else "completed"
        write(root / "results" / "table_2", "drlora", seed, dynamic, status=status)
        write(root / "results" / "table_2", "lora", seed, plain)
        for dem_weight, score in ((0.0, 0.5), (0.15, 0.6), (0.3, 0.7)):
            write(root / "results" / "table_5", "drlora", seed, score, dem_weight=dem_weight,
                  init_r=12, target_r=8)  # fmt: skip
    write(root / "results" / "table_3", "drlora", 0, 0.92, task="squad_v1", metric_name="f1",
          extras={"exact_match": 0.86, "f1": 0.92})  # fmt: skip
    for target_r in (2, 4):
        write(root / "results" / "figure_2", "drlora", 0, 0.95, task="sst2", metric_name="accuracy",
              target_r=target_r, init_r=target_r * 3 // 2)  # fmt: skip
    places = {name: str(root / folder) for name, folder in FOLDERS.items()}
    return root / "out", execute(NOTEBOOK, places)


def cell(folder: Path, number: int, **keys) -> pd.Series:
    table = pd.read_csv(folder / f"table_{number}.csv")
    (found,) = [row for _, row in table.iterrows() if all(row[k] == v for k, v in keys.items())]
    return found


def test_a_cell_is_the_mean_over_all_seeds_beside_the_papers_figure(tables):
    found = cell(tables[0], 2, method="drlora", budget="small", task="cola")
    assert found["mean"] == pytest.approx((0.62 + 0.64 + 0) / 3)
    assert found.n == 3 and found.collapsed == 1 and found.paper == pytest.approx(0.649)
    assert "42.0 ± 36.4 (3 seeds, 1 collapsed)" in tables[1]


def test_what_was_not_run_says_so_in_every_table(tables):
    folder, text = tables
    for number in (2, 3, 4, 5, 6, 9):
        assert pd.read_csv(folder / f"table_{number}.csv").n.isna().any()
        assert f"notebooks/grids/table_{number}.yaml" in text
    assert pd.isna(cell(folder, 2, method="bitfit", task="cola")["mean"])
    assert "not run, paper 84.45" not in text and "not run, paper 84.44" in text


def test_exact_match_and_f1_are_of_one_evaluation(tables):
    found = {
        metric: cell(tables[0], 3, method="drlora", budget="small", task="squad_v1", metric=metric)
        for metric in ("exact_match", "f1")
    }
    assert [row["mean"] for row in found.values()] == [0.86, 0.92]


def test_figure_2_is_drawn_from_the_records_of_its_budgets(tables):
    folder, text = tables
    assert "Figure 2: not run" not in text
    assert (folder / "rank_maps.png").stat().st_size > 10_000


def test_the_claims_of_section_5_2_are_held_against_all_maps_of_a_model(tables):
    _, text = tables
    cola, sst2 = (text[text.index(f"{task}, roberta-base, maps:") :] for task in ("cola", "sst2"))
    assert cola.startswith("cola, roberta-base, maps: 6\n")  # one for each seed and budget
    # the made-up ranks are the same in the three matrices of a layer
    lines = [line.split() for line in cola.splitlines()[2:7]]
    assert lines[0] == "middle Wq, Wk: more +0.00 ± 0.00 0 of 6 does not".split()
    assert lines[2] == "early Wo: more -- 0 of 0 too few maps".split()  # they have no Wo
    assert sst2.splitlines()[2].split()[-6:] == "0 of 2 too few maps".split()


def test_the_outside_run_is_shown_with_its_caveats(tables):
    _, text = tables
    shown = text[text.index("AI_DoRA") :]
    assert shown.startswith("AI_DoRA, runs: 1: drlora 93.69\n")
    assert all(caveat in shown for caveat in paper.outside_runs().caveats[0])


def test_table_5_tells_the_authors_weight_from_the_printed_one(tables):
    folder, text = tables
    with_dem, without = (cell(folder, 5, task="cola", dem=dem) for dem in (True, False))
    assert (with_dem["mean"], without["mean"]) == pytest.approx((0.6, 0.5))
    assert with_dem.n == without.n == 3
    assert "70.0 ± 0.0 (3 seeds)" in text[text.index("twice as much") :]


def test_runs_of_another_grid_do_not_get_into_a_table(tables):
    assert pd.isna(cell(tables[0], 2, method="drlora", budget="large", task="cola")["mean"])
    assert pd.isna(cell(tables[0], 2, method="drlora", budget="small", task="sst2")["mean"])
