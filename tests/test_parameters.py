"""Each notebook runs with other values of its parameters than those that are printed in it."""

import pytest
from in_process import execute
from other_parameters import VALUES, declared, mixture

from solved import NOTEBOOKS

# Of data, models and what is written: there is no other that every machine has.
PLACES = {"data_dir", "model_name", "output_dir", "record_path", "seeds_path", "table_path"}


def test_every_parameter_has_two_other_values():
    """... or one, where there are not more: two tasks of a kind, two ways to score."""
    assert VALUES.keys() == {path.name[:2] for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        others, defaults = VALUES[path.name[:2]], declared(path)
        assert others.keys() - PLACES == defaults.keys() - PLACES, path.name
        for name, values in others.items():
            if name in PLACES or (path.name[:2], name) == ("12", "task"):  # the only one there is
                continue
            either = {str: 1, bool: 1}.get(type(defaults[name]), 2)
            assert len([v for v in values if v != defaults[name]]) >= either, (path.name, name)


@pytest.mark.parametrize("index", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_all_parameters_changed_at_once(path, index):
    said = execute(path, mixture(path.name[:2], index))
    assert "Exercise 1: not solved yet" in said  # it came to its end


@pytest.mark.parametrize("number, task", [("10", "xsum"), ("11", "cola"), ("12", "cola")])
def test_a_task_of_another_kind_is_refused_before_any_training(number, task):
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(number)]
    with pytest.raises(ValueError, match=f"task = '{task}': this notebook is for"):
        execute(path, {"task": task})
