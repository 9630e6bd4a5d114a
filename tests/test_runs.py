"""Notebooks 10 to 12 and the command `run`: two doors to one run, judged by the records behind."""

import dataclasses
from pathlib import Path

import papermill
import pytest
import yaml
from in_process import execute
from tiny_runs import COSTS

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.families import FAMILIES
from solved import are_solved, write_in_place

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SETTINGS = NOTEBOOKS / "settings"
FIELDS = {field.name for field in dataclasses.fields(Settings)}
# What only one family of tasks knows, and so only its notebook has.
SQUAD, XSUM = {"stride", "scoring"}, {"summary_length", "num_beams", "scoring"}
# Of grids without a notebook.
CONTROLS = {"rank_map", "permute_map", "holdout", "tinit", "tfinal", "group_by_length", "penalty",
            "uniform"}  # fmt: skip
# How a step is computed, and what is kept of it; by the command and in grids.
STEP = {"capture", "attention", "fused_adamw", "frozen_bf16", "compile_encoder", "film_events"}
OWN = {"10_roberta_glue": set(), "11_squad": SQUAD, "12_xsum": XSUM}
SMALL = dict(data_dir="generated", batch_size=8, max_steps=10, deltaT=2, checkpoint_every=0,
             init_r=3, target_r=2)  # fmt: skip
GIVEN = {
    "10_roberta_glue": dict(task="mnli", model_name="tiny-roberta", method="adalora", seed=3),
    "11_squad": dict(task="squad_v2", model_name="tiny-roberta", method="drlora", max_length=40,
                     stride=8),
    "12_xsum": dict(task="xsum", model_name="tiny-bart", method="drlora", summary_length=12),
}  # fmt: skip
EXTRAS = {"10_roberta_glue": set(), "11_squad": {"exact_match", "f1"},
          "12_xsum": {"rouge1", "rouge2", "rougeL"}}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_notebook_has_every_setting_that_concerns_its_tasks_but_the_controls_own(name):
    assert (
        set(papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb")))
        == FIELDS - (SQUAD | XSUM | CONTROLS | STEP) | OWN[name]
    )


@pytest.mark.parametrize("name", OWN)
def test_the_notebook_and_the_command_are_one_run(name, tmp_path):
    given = SMALL | GIVEN[name]
    path = NOTEBOOKS / f"{name}.ipynb"
    copy, folder = write_in_place(path, tmp_path), tmp_path / "notebook"
    # In this process: a kernel takes ten seconds to start, and test_grid.py runs 10 in one.
    text = execute(copy, given | {"output_dir": str(folder)})
    assert are_solved(path, text)
    all_of_them = read_record(tmp_path / "notebook")["parameters"]
    del all_of_them["output_dir"]
    words = [word for key, value in all_of_them.items() for word in ("-p", key, repr(value))]
    assert main(["run", str(tmp_path / "command"), *words]) == 0
    records = [read_record(tmp_path / door) for door in ("notebook", "command")]
    for record in records:
        assert {key: record["parameters"][key] for key in given} == given
        for different in (*COSTS, "parameters"):
            del record[different]
    assert records[0] == records[1]

    record = records[0]
    assert record["steps"] == record["total_steps"] == 10
    assert record["data"]["source"] == f"generated {given['task']} set"
    assert record["metric_name"] == FAMILIES[given["task"]].metric_name(given["task"])
    matrices = len(record["rank_pattern"])
    assert record["surviving_components"] == 2 * matrices == (48 if "xsum" in name else 24)
    assert record["budget_curve"][-1] == [5, 2 * matrices]
    assert EXTRAS[name] <= set(record["evaluations"][-1])
    assert {"curves.png", "rank_map.png"} <= {p.name for p in (tmp_path / "notebook").iterdir()}


# The notebook that each file of settings is for; the others are 09's (tests/test_real_run.py).
REAL = {"cola_roberta": "10_roberta_glue", "squad_roberta": "11_squad", "xsum_bart": "12_xsum"}


@pytest.mark.parametrize("name", REAL)
def test_the_settings_of_real_runs_are_the_papers(name):
    from drlora_ref.experiments.results import paper

    given = yaml.safe_load((SETTINGS / f"{name}.yaml").read_text())
    assert set(given) <= set(papermill.inspect_notebook(str(NOTEBOOKS / f"{REAL[name]}.ipynb")))
    settings = Settings(**given)
    printed = paper.settings(settings.task, settings.method)
    assert {key: getattr(settings, key) for key in printed} == printed


@pytest.mark.parametrize("method", ["drlora", "lora", "bitfit"])
def test_commonsense_tasks_run_by_the_same_command(method, tmp_path, capsys):
    task = {"drlora": "boolq", "lora": "hellaswag", "bitfit": "winogrande"}[method]
    given = dict(SMALL, task=task, method=method, model_name="tiny-roberta", max_steps=4)
    words = [word for key, value in given.items() for word in ("-p", key, repr(value))]
    assert main(["run", str(tmp_path), *words]) == 0
    assert read_record(tmp_path)["metric_name"] == "accuracy"


def test_a_run_that_cannot_be_ends_in_one_line(tmp_path, capsys):
    assert main(["run", str(tmp_path / "run"), "-p", "task", "cola", "-p", "epoch", "3"]) == 1
    error = capsys.readouterr().err.strip()
    assert "epoch" in error and "epochs" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_every_file_of_settings_is_for_a_notebook():
    known = {*REAL, "laptop", "glue_laptop"}
    assert {path.stem for path in SETTINGS.glob("*.yaml")} == known
