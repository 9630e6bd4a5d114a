"""What is most worth doing first, as far as the time goes; and later from there, anywhere.

notebooks/grids/queue.yaml lists grids in order of value. Each is worked through by grids/grid.py,
in passes of as many replicas as fit. When the time is over the run at work saves a checkpoint and
ends. What has been done is told by the records, so the same command goes on from there: in another
hour, or on another machine that was given the folder of results.
"""

import functools
import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from drlora_ref.experiments.given import check_known, place, read_yaml, shown
from drlora_ref.experiments.gpu.benchmark import benchmark, read_benchmark
from drlora_ref.experiments.grids.grid import TO_DO, run_grid, state_of
from drlora_ref.experiments.grids.plans import Grid, Parameters, PlannedRun, pack, plan, read_grid
from drlora_ref.experiments.run import records
from drlora_ref.experiments.run.graphs import padded_length
from drlora_ref.experiments.run.loop import readable_time
from drlora_ref.experiments.run.one_run import claim, code_hash
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.run.termination import TERMINATED, Terminated
from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.tasks.evaluation import row_lengths
from drlora_ref.experiments.tasks.families import FAMILIES

KEYS = ("grid", "notebook", "settings", "out", "only", "parameters", "best_of", "model_name")
SAMPLE = 300  # rows whose lengths stand for a task's
START = 20  # seconds until a pass takes its first step: imports, model, rows, graphs
ASKED = 0.005  # seconds in which a replica reads its answers to one batch of an evaluation


@dataclass(frozen=True)
class Entry:
    """One line of the queue: a grid as it is to be done here, and the folder for its records."""

    name: str
    grid: Grid
    out: Path


def choose_encoder(model_name: str = "") -> str:
    """The base-size encoder that can be had: the one named, roberta-base, else mpnet-base.

    Raises ConnectionError, naming both ways, where neither can be had.
    """
    if model_name:
        return model_name
    try:
        resolve_model("roberta-base")
        return "roberta-base"
    except (ConnectionError, FileNotFoundError):
        pass
    try:
        resolve_model("mpnet-base")
        print("roberta-base cannot be had here: mpnet-base takes its place", flush=True)
        return "mpnet-base"
    except ImportError:
        raise ConnectionError(
            "no base-size encoder: go online for roberta-base, or pip install "
            '"drlora-ref[mpnet]", or name a folder by --model'
        ) from None


def read_queue(file: str | Path, out: Path, model_name: str, data_dir: str = "") -> list[Entry]:
    """The entries of a queue's file, in its order; raises ValueError naming what is wrong.

    `model_name` takes the place of roberta-base wherever an entry does not name a model itself.
    Tasks whose data are not here are left out, and so is an entry of which nothing is left.
    """
    content = read_yaml(file)
    check_known(f"{file}: a queue has no", content, ["queue", "parameters"])
    entries = content.get("queue")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: queue = {shown(entries)} must be a list of names with values")
    found = []
    for entry in entries:
        check_known(f"{file}: an entry has no", entry, KEYS)
        if "out" not in entry or ("grid" in entry) == ("notebook" in entry):
            raise ValueError(f"{file}: {shown(entry)} needs out, and either grid or notebook")
        common = content.get("parameters", {}) if "grid" in entry else {}
        model = entry.get("model_name", model_name)
        common = common | {"model_name": model, "data_dir": data_dir}
        try:
            if model != model_name:
                resolve_model(model)
            grid = _with_data(_grid_of(entry, place(file).parent, common))
        except (ConnectionError, ImportError, FileNotFoundError) as error:
            print(f"{entry['out']}: left out, {str(error).splitlines()[0]}", flush=True)
            continue
        name = str(entry.get("grid") or entry["notebook"])
        if grid:
            found.append(Entry(name, grid, out / entry["out"]))
    return found


def _grid_of(entry: dict, folder: Path, common: dict) -> Grid:
    """The grid of an entry, without its notebook: so any parameter may be set."""
    if "notebook" in entry:
        given = read_yaml(folder / entry["settings"])
        own = given | entry.get("parameters", {}) | common
        return {"notebook": Path(os.path.relpath(folder / entry["notebook"])), "parameters": own}
    grid = read_grid(folder / entry["grid"])
    for name in ("notebook", "cost", "slurm"):
        grid.pop(name, None)  # type: ignore[misc]
    own = common | entry.get("parameters", {})
    grid["parameters"] = grid.get("parameters", {}) | own
    if "best_of" in entry:
        grid["best_of"]["folder"] = entry["best_of"]
    return restrict(grid, entry.get("only", {}))


def restrict(grid: Grid, only: dict[str, list]) -> Grid:
    """The part of a grid whose runs have one of these values, for each parameter that is named.

    >>> grid = {"vary": {"task": ["rte", "cola"]}, "cases": [{"method": "lora"}]}
    >>> restrict(grid, {"task": ["cola"], "method": ["lora"]})["vary"]
    {'task': ['cola']}
    """
    grid = grid.copy()
    for name, values in only.items():
        grid["vary"] = {
            key: [v for v in given if key != name or v in values]
            for key, given in grid.get("vary", {}).items()
        }
        cases: list[Parameters] = grid.get("cases", [{}])
        grid["cases"] = [case for case in cases if case.get(name, values[0]) in values]
    return grid


def _with_data(grid: Grid) -> Grid | None:
    """Without the tasks that have no data here; None if no run is left."""
    same = grid.get("parameters", {})
    named = [same, *grid.get("cases", [])]
    tasks = {one["task"] for one in named if "task" in one} | {
        *grid.get("vary", {}).get("task", [])
    }
    without = {str(t): why for t in sorted(map(str, tasks))
               if (why := _no_data(t, str(same.get("data_dir", ""))))}  # fmt: skip
    if not without:
        return grid
    print(f"no data for {', '.join(without)}: left out", flush=True)
    if same.get("task") in without:
        return None
    grid = restrict(grid, {"task": [task for task in tasks if task not in without] or [""]})
    empty = not grid["cases"] or not all(grid["vary"].values())
    return None if empty else grid


@functools.cache
def _no_data(task: str, data_dir: str) -> str:
    """Why a task's data cannot be had, or ""."""
    try:
        FAMILIES[task].load_task(task, data_dir)
        return ""
    except (FileNotFoundError, ConnectionError) as error:
        return str(error).splitlines()[0]


class Speeds:
    """Seconds of a pass, from what a benchmark has measured.

        seconds of a step = a + b · tokens        a: starting it, b: the arithmetic

    a and b are from the passes of 1, 5 and 20 replicas. A method that cannot be a replica has its
    own a. An evaluation is a third of the arithmetic, batch by batch and eagerly.
    """

    def __init__(self, found: dict[str, Any]):
        self.cells = found["cells"]
        points = [(c["tokens"], 1 / c["steps"]) for c in self.cells.values() if "replicas" in c]
        if not points:
            raise ValueError("the benchmark has measured no replicas: nothing can be estimated")
        self.most = max(c["replicas"] for c in self.cells.values() if "replicas" in c)
        (self.few, fast), (many, slow) = min(points), max(points)
        self.b = max(0.0, (slow - fast) / (many - self.few)) if many > self.few else 0.0
        self.a = fast - self.b * self.few
        self.eager = 1 / self.cells["drlora, eager"]["steps"]

    def step(self, method: str, tokens: float) -> float:
        """Seconds of an optimizer step on so many tokens, padding included."""
        if method in ("drlora", "lora"):
            return max(self.a, 0.0) + self.b * tokens
        own = self.cells.get(f"{method}, captured") or self.cells.get(f"{method}, eager")
        return 1 / own["steps"] + self.b * (tokens - own["tokens"]) if own else self.eager

    def run(self, settings: Settings, steps: int, replicas: int) -> float:
        """Seconds of a pass of so many replicas of this run, from start to end."""
        lengths, windows, asked = rows_of_task(
            settings.task, settings.data_dir, settings.model_name, settings.max_length
        )
        rows = replicas * settings.batch_size * settings.grad_accumulation
        if not settings.max_steps:
            steps = round(steps * windows)
        # Rows of one batch are alike in length or random, those of other replicas are random.
        random_rows = replicas if settings.group_by_length else rows
        step = self.step(settings.method, rows * _mean_width(lengths, random_rows))
        # Evaluations: before training, after each epoch, and at the end the final questions.
        times = 2 + (settings.epochs if not settings.max_steps else steps // 500)
        batches = asked / settings.eval_batch_size
        mean = sum(lengths) / len(lengths)
        one = asked * replicas * mean * self.b / 3 + batches * (self.eager / 3 + replicas * ASKED)
        return START + steps * max(step, 1e-6) + times * one


@functools.cache
def rows_of_task(
    task: str, data_dir: str, model_name: str, max_length: int
) -> tuple[list[int], float, int]:
    """(tokens of some training rows, rows for each example, rows that an evaluation reads)."""
    family = FAMILIES[task]
    data = family.load_task(task, data_dir)
    few = data.train.select(range(min(SAMPLE, len(data.train))))
    validation = {split: rows.select(range(1)) for split, rows in data.validation.items()}
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model_name).path, local_files_only=True)
    small = replace(data, train=few, validation=validation, holdout=None)
    inputs = family.make_inputs(small, tokenizer, max_length=max_length)
    asked = sum(map(len, data.validation.values()))
    return row_lengths(inputs.train), len(inputs.train) / len(few), asked


def _mean_width(lengths: list[int], rows: int) -> float:
    """To how many tokens batches of so many random rows are padded, on average."""
    draw = random.Random(0)
    drawn = [max(draw.choices(lengths, k=rows)) for _ in range(50)]
    return sum(padded_length(n) or n for n in drawn) / len(drawn)


def left_of(entry: Entry, speeds: Speeds, code: str) -> tuple[int, float]:
    """(runs that are still to do, seconds that they will take). Raises as plan does."""
    runs = [run for run in plan(entry.grid, entry.out) if state_of(run, code)[0] == TO_DO]
    return len(runs), sum(map(functools.partial(_seconds, speeds), pack(runs, speeds.most)))


def _seconds(speeds: Speeds, runs: list[PlannedRun]) -> float:
    settings = Settings(**runs[0].work.parameters)  # type: ignore[arg-type]
    return speeds.run(settings, runs[0].steps, len(runs))


def show(entries: list[Entry], speeds: Speeds) -> None:
    """A line for each entry of which something is left, and what all of it will take."""
    total, code = 0.0, code_hash()
    for entry in entries:
        try:
            runs, seconds = left_of(entry, speeds, code)
        except (FileNotFoundError, ValueError) as error:
            print(f"{entry.out.name}: waits: {' '.join(str(error).split())[:150]}", flush=True)
            continue
        total += seconds
        if runs:
            about = readable_time(seconds)
            print(f"{entry.out.name}: {runs} runs to do, about {about} ({entry.name})", flush=True)
    print(f"all that can be planned by now: about {readable_time(total)}", flush=True)


@contextmanager
def time_box(minutes: float) -> Iterator[threading.Event]:
    """After so many minutes this process is told to end, as by a cluster, and the event is set."""
    over = threading.Event()

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(60 * minutes, end)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()


def check_minutes(minutes: float) -> None:
    """Raise ValueError unless there is time to do something.

    >>> check_minutes(0)
    Traceback (most recent call last):
    ValueError: minutes = 0: must be above 0; --dry-run says what is left and does nothing
    """
    if not 0 < minutes < 10**6:
        raise ValueError(
            f"minutes = {minutes}: must be above 0; --dry-run says what is left and does nothing"
        )


def work(
    file: str | Path,
    out: Path,
    minutes: float,
    model_name: str = "",
    data_dir: str = "",
    dry_run: bool = False,
) -> int:
    """Work through a queue for so many minutes; returns the exit status.

    It is 0 if all went well, also where the time was over; 1 if a run failed; else run_grid's.
    Raises ValueError and FileNotFoundError before any work; BlockingIOError if another queue is at
    work in `out`.
    """
    if not dry_run:
        check_minutes(minutes)
    records.make_folder(out, "folder")
    with claim(out):
        model_name = choose_encoder(model_name)
        entries = read_queue(file, out, model_name, data_dir)
        speeds = Speeds(_benchmark_of_here(out, model_name, data_dir))
        show(entries, speeds)
        return 0 if dry_run else _work(entries, speeds, minutes)


def _benchmark_of_here(out: Path, model_name: str, data_dir: str) -> dict[str, Any]:
    """What was measured on this machine with this model; measured now, if it was not."""
    found, here = read_benchmark(out), records.environment()
    sha256 = resolve_model(model_name).sha256
    if found and found["environment"]["device"] == here["device"]:
        if found["model"]["sha256"] == sha256:
            return found
    return benchmark(out, model_name, data_dir)


def _work(entries: list[Entry], speeds: Speeds, minutes: float) -> int:
    status = 0
    with time_box(minutes) as over:
        for entry in itertools.takewhile(lambda entry: not over.is_set(), entries):
            print(f"\n{entry.name}, into {entry.out}", flush=True)
            try:
                ended = run_grid(entry.grid, entry.out, replicas="auto")
            except Terminated:
                ended = TERMINATED
            except (FileNotFoundError, ValueError) as error:
                print(f"left out for now: {error}", flush=True)
                continue
            if ended > 1 and not over.is_set():
                return ended  # somebody else ended it
            status = max(status, int(ended == 1))
    if over.is_set():
        print("\nthe time is over; the same command goes on from here. What is left:", flush=True)
        show(entries, speeds)
    return status
