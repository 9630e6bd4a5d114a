"""Does everything work on this GPU? In less than two minutes, on a tiny model."""

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from drlora_ref.experiments.methods import METHODS
from drlora_ref.experiments.replicas import memory
from drlora_ref.experiments.replicas.many_runs import run_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.engine import OneModel
from drlora_ref.experiments.run.graphs import recording_by
from drlora_ref.experiments.run.loop import readable_time
from drlora_ref.experiments.run.records import Record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.sources.models import resolve_model

# Sixty steps with pruning from step 9 on, the last event at step 30, the mask fixed after it.
TINY = Settings(task="cola", data_dir="generated", model_name="tiny-roberta", max_steps=60,
                deltaT=4, learning_rate=1e-2, lora_alpha=32, lora_dropout=0.0, dem_weight=0.3,
                checkpoint_every=7, capture=True)  # fmt: skip
NEAR = 1e-4  # of a loss of about 0.7
FOUR = [dict(seed=0), dict(seed=1, method="lora"), dict(seed=2, score="frobenius_norm"),
        dict(seed=3, score="random", learning_rate=5e-3)]  # fmt: skip


class Failed(Exception):
    """A check found what must not be; the message says what."""


def need(condition: bool, otherwise: str) -> None:
    """Raise Failed unless the condition holds."""
    if not condition:
        raise Failed(otherwise)


def _alike(one: Record, other: Record, tolerance: float) -> float:
    """The largest difference of two runs' losses; Failed if it, or a mask, says they are two."""
    for name in ("status", "budget_curve", "rank_pattern"):
        need(one[name] == other[name], f"{name} differs")
    pairs = zip(one["loss_curve"], other["loss_curve"], strict=True)
    most = max(abs((a or 0.0) - (b or 0.0)) for a, b in pairs)
    need(most <= tolerance, f"the losses differ by {most:.1e}, at most {tolerance:.0e} may be")
    return most


def _still(settings: Settings, folder: Path) -> Settings:
    """The same without the model's own dropout: many draw other random numbers than one alone."""
    encoder = folder / "still"
    still: dict[str, object] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    resolve_model(settings.model_name).copy(encoder, still)
    return replace(settings, model_name=str(encoder))


def graph_against_eager(base: Settings, folder: Path) -> str:
    """The same run captured and not: losses of 60 steps, masks, ranks."""
    base = _still(base, folder)
    captured = one_run.run(replace(base, output_dir=str(folder / "captured")))
    with recording_by(None, "for comparison"):
        eager = one_run.run(replace(base, output_dir=str(folder / "eager")))
    need(captured["capture"] == "captured", f"not captured, {captured['capture']}")
    return f"losses of {base.max_steps} steps differ by {_alike(captured, eager, NEAR):.1e} at most"


def replicas_against_single_runs(base: Settings, folder: Path) -> str:
    """Four replicas in one graph, and each of them alone; in float32, where masks cannot differ."""
    AcceleratorState._reset_state(True)  # accelerate lets a process choose its precision once
    base = replace(_still(base, folder), precision="fp32")
    four = [replace(base, **own, output_dir=str(folder / f"of four {i}"))
            for i, own in enumerate(FOUR)]  # fmt: skip
    together = run_replicas(four)
    alone = [one_run.run(replace(one, output_dir=one.output_dir + " alone")) for one in four]
    most = max(_alike(*pair, 10 * NEAR) for pair in zip(together, alone, strict=True))
    return f"losses of four replicas differ from those of single runs by {most:.1e} at most"


def every_method_takes_steps(base: Settings, folder: Path) -> str:
    """Every method, captured: ten steps, finite losses."""
    eagerly = []
    for method in METHODS:
        own = replace(base, method=method, max_steps=10, output_dir=str(folder / method))
        record = one_run.run(own)
        need(record["status"] != "diverged", f"{method} diverged in its first steps")
        if record["capture"] != "captured":
            eagerly.append(f"{method} ({record['capture']})")
    return f"{len(METHODS)} methods; not captured: {', '.join(eagerly) or 'none'}"


class _Cut(Exception):
    pass


def a_run_that_is_cut_goes_on(base: Settings, folder: Path) -> str:
    """Cut in the middle of a step, and started again: the record of a run that nobody disturbed."""
    whole = one_run.run(replace(base, output_dir=str(folder / "whole")))
    cut = replace(base, output_dir=str(folder / "cut"))
    really, half = OneModel.optimizer_step, base.max_steps // 2 - 1

    def until_then(self: OneModel, step: int, group: list) -> torch.Tensor:
        if step == half:
            raise _Cut
        return really(self, step, group)

    OneModel.optimizer_step = until_then  # type: ignore[method-assign]
    try:
        with suppress(_Cut):
            one_run.run(cut)
    finally:
        OneModel.optimizer_step = really  # type: ignore[method-assign]
    most = _alike(whole, one_run.run(cut), NEAR)
    return f"cut in step {half} of {base.max_steps}, with losses that differ by {most:.1e} at most"


def _reserved(settings: Settings, replicas: int) -> int:
    """Bytes that torch takes of the GPU for a step of so many replicas."""
    memory.forget()
    memory.measure(settings, replicas)
    return torch.cuda.max_memory_reserved()


def replicas_that_do_not_fit(base: Settings, folder: Path) -> str:
    """Sixteen replicas where about ten fit: the pass is split, and all records are there."""
    if not torch.cuda.is_available():
        return "left out, there is no GPU"
    base = replace(base, batch_size=64, max_steps=4)
    whole = torch.cuda.get_device_properties(0).total_memory
    limit = (_reserved(base, 4) + _reserved(base, 16)) / 2
    memory.forget()
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    try:
        runs = [replace(base, seed=i, output_dir=str(folder / f"tight {i}")) for i in range(16)]
        found = memory.run_fitting(runs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    shared = sorted({record.get("replicas", 1) for record in found})
    need(len(found) == 16, f"{len(found)} records of 16")
    need(max(shared) < 16, "nothing was split")
    return f"in passes of {' and '.join(map(str, shared))}"


def peak_memory(base: Settings, folder: Path) -> str:
    """What a step takes at most, of one replica and of five."""
    if not torch.cuda.is_available():
        return "left out, there is no GPU"
    return ", ".join(f"{n}: {memory.measure(base, n) / 2**20:.0f} MiB" for n in (1, 5))


CHECKS: dict[str, Callable[[Settings, Path], str]] = {
    "graph against eager": graph_against_eager,
    "replicas against single runs": replicas_against_single_runs,
    "every method": every_method_takes_steps,
    "resumption": a_run_that_is_cut_goes_on,
    "out of memory": replicas_that_do_not_fit,
    "peak memory of replicas": peak_memory,
}


def check(base: Settings = TINY) -> int:
    """Make all checks, a line for each; returns how many failed."""
    failed, began = 0, time.perf_counter()
    for name, act in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict, found = "ok", act(base, Path(folder))
            except Exception as error:  # whatever a GPU may come up with: the others go on
                what = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
                verdict, found, failed = "FAILED", what + " ".join(str(error).split()), failed + 1
        memory.forget()
        AcceleratorState._reset_state(True)
        print(f"{verdict}: {name}: {found}", flush=True)
    took = readable_time(time.perf_counter() - began)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed in {took}", flush=True)
    return failed
