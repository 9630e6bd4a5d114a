"""How many steps a second: each method eager and captured, and 1, 5 and 20 replicas.

In less than three minutes, and to be read as ratios of one run: each figure is of some seconds on a
machine that may have other work.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from drlora_ref.allocator import RankAllocator
from drlora_ref.experiments.given import read_json
from drlora_ref.experiments.methods import METHODS, Prepared
from drlora_ref.experiments.replicas.many_runs import set_up_replicas
from drlora_ref.experiments.replicas.memory import forget
from drlora_ref.experiments.run import one_run, records
from drlora_ref.experiments.run.engine import Engine, OneModel
from drlora_ref.experiments.run.graphs import padded_length
from drlora_ref.experiments.run.order import Order, make_order
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.evaluation import row_lengths

FILE = "benchmark.json"
REPLICAS = (1, 5, 20)
STEPS = 20  # taken over and over: the same rows, so that every length is recorded before the clock
BASE = Settings(task="cola", learning_rate=1e-3, max_steps=10_000, dem_weight=0.15)


class Materialising(RankAllocator):
    """Scores as the authors' code computes them: layer by layer, every component as a matrix."""

    @torch.no_grad()
    def scores(self) -> Tensor:
        """As RankAllocator's, the slow way."""
        found = []
        for layer in self.layers.values():
            parts = torch.einsum("r,or,ri->roi", layer.lora_c, layer.lora_B, layer.lora_A)
            share = torch.linalg.matrix_norm(parts)
            found.append(share / (torch.linalg.matrix_norm(parts.sum(dim=0)) + 1e-8))
        return torch.cat(found)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(
    engine: Engine, order: Order, lengths: list[int], seconds: float, steps: int = STEPS
) -> dict[str, float]:
    """Optimizer steps a second, scores and EMA included, of this engine on some steps' rows.

    And `tokens`, those of a step on average, padding included; `lengths` are those of all rows. One
    round is taken before the clock starts: it records the graphs and fills the caches.
    """
    groups = [group for _, group in zip(range(steps), order.groups(), strict=False)]
    live = [True] * len(order.generators)
    widths = [max(lengths[n] for batch in group for own in batch for n in own) for group in groups]
    rows = sum(len(own) for batch in groups[0] for own in batch)
    taken, began, spent = 0, 0.0, 0.0
    while spent < seconds:
        for group in groups:
            taken += 1
            engine.optimizer_step(taken, group)
            engine.allocate(taken, live)
        _wait()
        now = time.perf_counter()
        began = began or now
        spent = now - began
    tokens = rows * sum(map(padded_length, widths)) / steps
    return {"steps": round((taken - steps) / spent, 3), "tokens": round(tokens)}


def of_one_run(settings: Settings, seconds: float, authors: bool = False) -> dict[str, Any]:
    """Steps a second and peak memory of a single run; `authors`: with scores computed as theirs."""
    ready = one_run.set_up(settings)
    prepared = cast(Prepared, ready.prepared)
    if authors:
        materialising = Materialising(prepared.model, ready.schedule)
        prepared = prepared._replace(allocator=materialising)
    engine = OneModel(prepared, ready.inputs, ready.schedule, settings, ready.accelerator)
    order, lengths = make_order([ready.inputs], [settings]), row_lengths(ready.inputs.train)
    found = _measured(engine, order, lengths, seconds)
    return found | ({"captured": engine.captured.about()} if engine.captured else {})


def of_replicas(settings: Settings, replicas: int, seconds: float) -> dict[str, Any]:
    """Steps a second of a pass of so many replicas; each of them is a step of every run."""
    folder = settings.output_dir
    own = [replace(settings, seed=i, output_dir=f"{folder}/{i}") for i in range(replicas)]
    runs, loop = set_up_replicas(own)
    found = _measured(loop.engine, loop.order, row_lengths(runs[0].inputs.train), seconds)
    return found | {"replicas": replicas, "run_steps": round(replicas * found["steps"], 3)}


def _measured(engine: Engine, order: Order, lengths: list[int], seconds: float) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = dict(speed(engine, order, lengths, seconds))
    return found | {"peak_memory_mib": records.peak_memory_mib(device)}


def benchmark(
    out: Path,
    model_name: str,
    data_dir: str = "",
    seconds: float = 3.0,
    base: Settings = BASE,
    replicas: tuple[int, ...] = REPLICAS,
) -> dict[str, Any]:
    """Measure, print, and write FILE in `out`; returns what it holds.

    Whatever cannot be measured (a method that this model has not, too little memory) is named in
    `failed`, and the rest is measured. Raises as one_run.set_up does, for the model and the data.
    """
    base = replace(base, model_name=model_name, data_dir=data_dir or base.data_dir)
    dynamic = replace(base, method="drlora")
    cells: dict[str, tuple[Settings, Callable[[Settings], dict]]] = {}
    for method in METHODS:
        for capture, word in ((False, "eager"), (True, "captured")):
            own = replace(base, method=method, capture=capture)
            cells[f"{method}, {word}"] = own, partial(of_one_run, seconds=seconds)
    authors = partial(of_one_run, seconds=seconds, authors=True)
    cells["drlora, the authors' scores"] = dynamic, authors
    for n in replicas:
        together = partial(of_replicas, replicas=n, seconds=seconds)
        cells[f"drlora, {n} replicas"] = replace(dynamic, capture=True), together
    source = one_run.resolve_model(model_name)
    found: dict[str, Any] = {"cells": {}, "failed": {}}
    for name, (own, measure) in cells.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found["cells"][name] = measure(replace(own, output_dir=folder))
                print(f"{name}: {found['cells'][name]['steps']:.1f} steps a second", flush=True)
            except (RuntimeError, ValueError) as error:
                found["failed"][name] = " ".join(str(error).split())[:200]
                print(f"{name}: not measured: {found['failed'][name]}", flush=True)
        forget()
    found |= {
        "task": base.task,
        "batch_size": base.batch_size,
        "model": records.without_places(source.about()),
        "environment": records.environment(),
        "code": one_run.code_hash(),
    }
    records.make_folder(out, "folder")
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with records.whole_file(out / FILE, overwrite=True) as file:
        file.write(text.encode())
    return found


def read_benchmark(out: Path) -> dict[str, Any]:
    """What `benchmark` wrote in a folder; {} where it has not."""
    return read_json(out / FILE) if (out / FILE).exists() else {}


def table(found: dict[str, Any]) -> str:
    """A benchmark as a table in Markdown, in ratios to drlora's eager step (Table 9's question)."""
    one = found["cells"]["drlora, eager"]
    lines = [
        f"| {found['model']['source']}, {found['task']}, {found['environment']['device']} "
        "| run-steps a second | ratio | peak memory, ratio |",
        "|---|---|---|---|",
    ]
    for name, cell in found["cells"].items():
        rate = cell.get("run_steps", cell["steps"])
        memory = cell["peak_memory_mib"] / one["peak_memory_mib"]
        lines.append(f"| {name} | {rate:.1f} | {rate / one['steps']:.2f} | {memory:.2f} |")
    return "\n".join(lines)
