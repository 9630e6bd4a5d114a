"""A notebook of two cells that writes a record and trains nothing, and grids of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import yaml

from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.run.one_run import code_hash

PARAMETERS = """
task = "cola"
data_dir = "generated"
model_name = "tiny-roberta"
method = "drlora"
seed = 0
init_r = 3
target_r = 2
learning_rate = 1e-3
max_steps = 5
output_dir = "runs/mine"
overwrite = False
"""
# Seed 13 fails; a seed from 50 waits, the first time, until somebody ends it.
BODY = """
import json, os, pathlib, time
folder = pathlib.Path(output_dir)
if seed == 13:
    raise ValueError("an unlucky\\nseed")
if seed >= 50 and not (folder / "kernel").exists():
    (folder / "kernel").write_text(str(os.getpid()))
    time.sleep(600)
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
record = {
    "status": "completed", "best": 0.5, "metric_name": "matthews", "seed": seed,
    "code": CODE, "key": output_dir.rsplit("-", 1)[1],
    "environment": {name: os.environ.get(name) for name in names},
}
(folder / "record.json").write_text(json.dumps(record))
"""


def write_notebook() -> None:
    """fake.ipynb in the current folder."""
    sources = PARAMETERS.strip(), BODY.replace("CODE", repr(code_hash()))
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata.tags = ["parameters"]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(book, "fake.ipynb")


def write_grid(text: str | None = None, **grid) -> str:
    """grid.yaml in the current folder: this text, or a grid of the notebook with a tiny model.

    With `notebook=None` the grid has no notebook.
    """
    grid = {"notebook": "fake.ipynb", "parameters": {"data_dir": "generated"}, **grid}
    grid["parameters"] = {"model_name": "tiny-roberta", **grid["parameters"]}
    grid = {name: value for name, value in grid.items() if value is not None}
    text = yaml.safe_dump(grid, sort_keys=False) if text is None else text
    Path("grid.yaml").write_text(text)
    return "grid.yaml"


def pretend(monkeypatch, fails=(), writes=True, **fields) -> list[processes.WorkItem]:
    """Let jobs write their record at once, or fail for some seeds; returns those started."""
    started = []

    def start(tasks):
        for number, (task,) in enumerate(tasks):
            started.append(task)
            log = Path("log.err")
            seed = task.parameters["seed"]
            error = "Traceback: ...\nRuntimeError: no luck\n" if seed in fails else ""
            log.write_text(error)
            if writes and not error:
                task.folder.mkdir(parents=True, exist_ok=True)
                record = {"key": task.folder.name.rsplit("-", 1)[1], "code": code_hash(), "best": 1}
                (task.folder / "record.json").write_text(json.dumps(record | fields))
            paths = SimpleNamespace(result_pickle=log, stderr=log)
            yield number, SimpleNamespace(paths=paths, exception=lambda e=error: e or None)

    monkeypatch.setattr(processes, "starter", lambda *given: start)
    return started


def files(folder=".") -> dict[str, bytes]:
    """All that is there, by its path."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
