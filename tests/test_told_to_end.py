"""Ctrl-C, SIGTERM and a kernel that dies: what is kept, what is said, and how it goes on."""

import os
import signal
import threading
import time
from pathlib import Path

import nbformat
import pytest

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.grids.notebooks import run_notebook
from drlora_ref.experiments.run.records import Pending, read_record

GIVEN = dict(data_dir="generated", model_name="tiny-roberta", max_steps=5000, checkpoint_every=9999)
WORDS = [word for name, value in GIVEN.items() for word in ("-p", name, str(value))]
PARAMETERS = """
seed = 0
place = ""
overwrite = False
output_dir = "x"
"""
RECORD = """
import os, pathlib, signal
from drlora_ref.experiments.run import records
from drlora_ref.experiments.run.termination import Hearing
folder = records.check_output_dir(output_dir, overwrite)
print("in", folder, "from", place)
record = records.earlier_record(folder)
if record is None:
    pathlib.Path("trained").open("a").write("x")
    record = {"seed": seed, "place": place}
records.write_record(record, folder, overwrite)
if not pathlib.Path("may_end").exists():
    os.kill(os.getpid(), signal.SIGKILL)
"""
WAITS = """
pathlib.Path(folder, "waits").touch()
with Hearing() as hearing:
    while not hearing.told:
        pass
    hearing.answer("step 7 is saved")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notebook(name: str, *bodies: str) -> str:
    cells = [nbformat.v4.new_code_cell(text) for text in (PARAMETERS.strip(), *bodies)]
    cells[0].metadata.tags = ["parameters"]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(book, name)
    return name


def send(number: int, once: Path, later: float = 0) -> None:
    """Send this process a signal as soon as there is such a file, or so many seconds later."""

    def wait():
        ends = time.monotonic() + 100
        while not once.exists() and time.monotonic() < ends:
            time.sleep(0.01)
        time.sleep(later)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(
    "number, status, said",
    [
        (signal.SIGTERM, 143, r"terminated: SIGTERM: a checkpoint is saved after step"),
        (signal.SIGINT, 130, "interrupted: the same command goes on from the last checkpoint"),
    ],
)
def test_a_run_that_is_told_to_end_says_so_in_one_line(number, status, said, capsys):
    send(number, Path("out", ".lock"), later=1)  # the first steps are taken
    assert main(["run", "out", *WORDS]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert Path("out", "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "number, status, said",
    [
        (signal.SIGTERM, 143, "terminated: step 7 is saved\n"),
        (signal.SIGINT, 130, "interrupted: the same command goes on from the last checkpoint\n"),
    ],
)
def test_a_notebook_that_is_told_to_end_says_so_in_one_line(number, status, said, capfd):
    Path("may_end").touch()
    file = notebook("waits.ipynb", RECORD, WAITS)
    send(number, Path("out", "waits"))
    assert main(["notebook", file, "out"]) == status
    assert capfd.readouterr().err == said
    assert "print" in Path("out", "waits.ipynb").read_text()  # what was executed is kept


def test_a_notebook_killed_after_its_record_is_finished_by_the_same_command(here, capsys):
    """... in a folder whose name papermill would fill in, and without a path in what is kept."""
    file, out = notebook("book {seed}.ipynb", RECORD, "print('the end')"), here / "é {seed} {x}"
    given = ["-p", "seed", "3", "-p", "place", str(here / "data")]
    assert main(["notebook", file, str(out), *given]) == 1
    assert "Kernel died" in capsys.readouterr().err
    before = (out / "record.json").read_bytes()
    assert read_record(out) == {"seed": 3, "place": "data"} and Pending(out).given()

    for others in (given[3:], [*given, "-p", "seed", "4"]):  # another run
        assert main(["notebook", file, str(out), *others]) == 1
        assert "holds a record already" in capsys.readouterr().err

    Path("may_end").touch()
    assert main(["notebook", file, str(out), *given]) == 0
    assert (out / "record.json").read_bytes() == before and Path("trained").read_text() == "x"
    text = (out / file).read_text()
    assert "the end" in text and str(here) not in text and "injected-parameters" in text
    assert {path.name for path in out.iterdir()} == {file, "record.json", "run.log"}
    assert main(["notebook", file, str(out), *given]) == 1
    assert "holds a record already" in capsys.readouterr().err


def test_a_record_that_is_to_be_replaced_is_none_of_the_notebooks_own(here):
    pending, record = Pending(here), here / "record.json"
    assert pending.given() is None
    record.write_text("{}")
    pending.begin(["nb", {"seed": 1}])
    assert pending.given() is None  # the old record is still there
    record.write_text('{"new": 1}')
    assert pending.given() == ["nb", {"seed": 1}]
    pending.end()
    assert pending.given() is None


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"given": []}'])
def test_a_note_of_a_pending_notebook_that_is_damaged_is_one_line(text, here, capsys):
    Path("out").mkdir()
    Path("out", "record.json").write_text("{}")
    Path("out", ".notebook").write_text(text)
    assert main(["notebook", notebook("book.ipynb", RECORD), "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: out/.notebook") and error.count("\n") == 1


def own_source(folder: Path) -> None:
    (folder / "book.ipynb").symlink_to("../book.ipynb")


def hard_link(folder: Path) -> None:
    os.link("book.ipynb", folder / "book.ipynb")


def copied(folder: Path) -> None:
    (folder / "book.ipynb").write_bytes(Path("book.ipynb").read_bytes())


def notes(folder: Path) -> None:
    (folder / "book.ipynb").write_text("my notes")


def other_folder(folder: Path) -> None:
    (folder / "book.ipynb").mkdir()


def dangling(folder: Path) -> None:
    (folder / "book.ipynb").symlink_to("nowhere")


@pytest.mark.parametrize("there", [own_source, hard_link, copied, notes, other_folder, dangling])
@pytest.mark.parametrize("given", [{}, {"overwrite": True}])
def test_a_notebook_never_writes_over_what_it_has_not_written(there, given, here):
    notebook("book.ipynb", RECORD)
    Path("out").mkdir()
    there(Path("out"))
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"the notebook itself|not written by this command"):
        run_notebook("book.ipynb", "out", given)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("folder", [".", "sub/..", "ABSOLUTE"])
def test_the_folder_of_the_notebook_itself_is_refused(folder, here):
    notebook("book.ipynb", RECORD)
    Path("sub").mkdir()
    with pytest.raises(FileExistsError, match=r"book\.ipynb is the notebook itself"):
        run_notebook("book.ipynb", str(here) if folder == "ABSOLUTE" else folder, {})


NO_NOTEBOOKS = ["", "{", "[]", "null", "[" * 100_000, '{"cells": 3}', "\xff"]


@pytest.mark.parametrize("text", NO_NOTEBOOKS, ids=lambda text: text[:8])
def test_what_is_no_notebook_is_one_line(text, capsys):
    Path("book.ipynb").write_bytes(text.encode("latin-1"))
    assert main(["notebook", "book.ipynb", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: book.ipynb ") and error.count("\n") == 1
    assert not Path("out").exists()


def test_a_notebook_that_writes_nothing_needs_no_output_dir():
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")])
    nbformat.write(book, "book.ipynb")
    for _ in range(2):  # the second replaces what the first has written
        assert main(["notebook", "book.ipynb", "out"]) == 0
        (cell,) = nbformat.read("out/book.ipynb", 4).cells
        assert cell.outputs[0].text == "42\n"
    assert not nbformat.read("book.ipynb", 4).cells[0].outputs


WHILE = {  # a file is read, in whose place anything may be raised
    "the parameters": ("yaml.constructor.SafeConstructor.construct_yaml_int", "-f"),
    "config.json": ("transformers.AutoConfig.from_pretrained", ""),
    "the tokenizer": ("transformers.AutoTokenizer.from_pretrained", ""),
    "the weights": ("transformers.AutoModelForSequenceClassification.from_pretrained", ""),
    "a notebook": ("papermill.inspect_notebook", "notebook"),
}


@pytest.mark.parametrize("what", WHILE)
def test_sigterm_while_a_file_is_read_is_not_taken_for_damage(what, monkeypatch, capsys):
    place, door = WHILE[what]
    Path("given.yaml").write_text("seed: 1")
    words = ["run", "out", *WORDS, *(["-f", "given.yaml"] if door == "-f" else [])]
    if door == "notebook":
        words = ["notebook", notebook("any.ipynb", "1"), "out"]
    monkeypatch.setattr(place, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert main(words) == 143
    error = capsys.readouterr().err
    assert error == "terminated: SIGTERM: the same command goes on from the last checkpoint\n"
