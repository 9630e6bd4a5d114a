"""What a person wrote is judged alike, and in the same words, by whichever door it comes."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from fake_grid import write_grid, write_notebook

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.given import check_kind, check_name, nearest
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.families import FAMILIES, Family

HINT = "(YAML reads 1e-3 as a word, and 1.0e-3 as a number)"
WRONG = {
    "learning_rate: 1e-3": f"learning_rate = '1e-3': expected a number, as DEFAULT {HINT}",
    "learning_rate: true": "learning_rate = True: expected a number, as DEFAULT",
    "learning_rate: high": "learning_rate = 'high': expected a number, as DEFAULT",
    "max_steps: 1.5": "max_steps = 1.5: expected a whole number, as DEFAULT",
    "max_steps: 1e3": "max_steps = '1e3': expected a whole number, as DEFAULT",
    "overwrite: 1": "overwrite = 1: expected true or false, as False",
    "method: 3": "method = 3: expected a word, as 'drlora'",
}
# The defaults of Settings, and those of the notebook in fake_grid.py.
DEFAULTS = {
    "run": {"learning_rate": 0.002, "max_steps": 0},
    "notebook": {"learning_rate": 0.001, "max_steps": 5},
}
DEFAULTS["grid"] = DEFAULTS["notebook"]


# A grid itself decides what it overwrites.
@pytest.mark.parametrize(
    "door, line",
    [(d, line) for d in DEFAULTS for line in WRONG if (d, line) != ("grid", "overwrite: 1")],
)
def test_a_value_of_the_wrong_kind_is_the_same_line_by_every_door(
    door, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    name, _, value = line.partition(": ")
    Path("given.yaml").write_text(line)
    words = {
        "run": ["run", "out", "-f", "given.yaml"],
        "notebook": ["notebook", "fake.ipynb", "out", "-f", "given.yaml"],
        "grid": ["grid", write_grid(f"{{notebook: fake.ipynb, vary: {{{name}: [{value}]}}}}")],
    }[door]
    assert main(words) == 1
    expected = WRONG[line].replace("DEFAULT", repr(DEFAULTS[door].get(name)))
    assert capsys.readouterr().err == f"ValueError: {expected}\n"


def test_a_whole_number_is_a_number_and_a_list_is_a_list():
    check_kind("learning_rate", 1, default=0.1)
    check_kind("seeds", [0], default=[0, 1])
    with pytest.raises(ValueError, match=r"seeds = '0': expected a list, as \[0, 1\]$"):
        check_kind("seeds", "0", default=[0, 1])
    with pytest.raises(ValueError, match=r"data_dir = 3: expected a word$"):
        check_kind("data_dir", 3, default="")


def test_the_nearest_name_is_found_in_whatever_case_and_of_whatever_kind():
    assert nearest("DELTAT", ["deltaT", "dem_weight"]) == "deltaT"
    assert nearest("zebra", ["deltaT"]) == ""
    with pytest.raises(ValueError, match=r"unknown table 12 \(nearest: 2\): use 2, 3$"):
        check_name("table", 12, (2, 3))
    with pytest.raises(ValueError, match=r"unknown task \['cola'\] "):
        check_name("task", ["cola"], {"cola": 1})


@pytest.mark.parametrize("task", FAMILIES)
def test_a_family_has_every_name_of_the_protocol_and_takes_its_options_from_the_settings(task):
    family = FAMILIES[task]
    names = [name for name in vars(Family) if not name.startswith("_")]
    assert set(names) >= {"TASKS", "OPTIONS", "metric_name", "load_task", "load_model"}
    assert all(hasattr(family, name) for name in names)
    assert task in family.TASKS
    _, _, *options = inspect.signature(family.make_inputs).parameters  # data, tokenizer
    assert tuple(options) == family.OPTIONS
    assert set(options) <= {field.name for field in fields(Settings)}
