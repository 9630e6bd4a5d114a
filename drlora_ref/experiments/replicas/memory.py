"""How many replicas a GPU's memory holds, and a pass for each so many."""

import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from drlora_ref.experiments.given import place
from drlora_ref.experiments.replicas.many_runs import run_replicas, set_up_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.checkpoints import CHECKPOINT
from drlora_ref.experiments.run.records import Record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.evaluation import row_lengths

MOST = 20  # more replicas hardly add to the runs' steps a second
SPARE = 0.1  # of the memory, for fragments and evaluation


def how_many(one: float, two: float, room: float) -> int:
    """Replicas that fit into `room`, if a pass of one takes `one` and a pass of two `two`.

    Each takes as much as the second did; a tenth of the room stays free.

    >>> how_many(one=3.0, two=4.0, room=20.0)  # 2 for what is shared, 1 for each
    16
    """
    each = max(two - one, 1e-9)
    return int(((1 - SPARE) * room - (one - each)) / each)


def measure(settings: Settings, replicas: int) -> int:
    """Bytes that a step of so many replicas of this run takes at most, on the longest rows.

    Raises torch.OutOfMemoryError.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = [
            replace(settings, seed=settings.seed + i, output_dir=str(Path(folder, str(i))))
            for i in range(replicas)
        ]
        runs, loop = set_up_replicas(own)
        lengths = row_lengths(runs[0].inputs.train)
        longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-settings.batch_size :]
        numbers = (longest,) * replicas
        torch.cuda.reset_peak_memory_stats()
        for step in (1, 2):  # the second one finds AdamW's averages there
            loop.engine.optimizer_step(step, [numbers] * settings.grad_accumulation)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def forget() -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free() -> int:
    """Bytes of the GPU's memory that nobody uses."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def that_fit(settings: Settings) -> int:
    """How many replicas of this run the memory of this GPU holds, at most MOST; 1 without a GPU.

    From a step of one and a step of two. Raises ValueError if not even one fits.
    """
    if not torch.cuda.is_available():
        return 1
    forget()
    room = _free()
    took: list[int] = []
    for replicas in (1, 2):
        try:
            took.append(measure(settings, replicas))
        except torch.OutOfMemoryError:
            break
        finally:
            forget()
    if not took:
        raise ValueError(one_run.TOO_LITTLE.format(room / 2**30))
    return max(1, min(MOST, how_many(took[0], took[1], room))) if len(took) == 2 else 1


def run_fitting(
    settings: list[Settings], auto: bool = False, refused: list[Exception] | None = None
) -> list[Record]:
    """run_replicas, in several passes one after the other where the memory does not hold all runs.

    With `auto` what fits is measured beforehand, otherwise when the memory has run out. What was
    begun in one pass is finished in one. Raises as run_replicas does; ValueError where not even one
    run fits, or no longer all those that were begun together.
    """
    begun = (place(settings[0].output_dir) / CHECKPOINT).exists()
    most = that_fit(settings[0]) if auto and not begun else len(settings)
    try:
        if most >= len(settings):
            return run_replicas(settings, refused)
    except torch.OutOfMemoryError:
        most = 0
    if not most:  # out of the handler, which would keep the pass in memory
        forget()
        most = that_fit(settings[0])
        if len(settings) == 1:
            raise ValueError(one_run.TOO_LITTLE.format(_free() / 2**30))
        if most >= len(settings):  # the line through two passes was too bold
            most = len(settings) // 2
        if (place(settings[0].output_dir) / CHECKPOINT).exists():
            raise ValueError(
                f"{len(settings)} replicas were begun together, and about {most} fit into this "
                "GPU's memory: take a larger one, or remove the checkpoint and start over"
            )
    print(
        f"{len(settings)} replicas do not fit into the memory at once: {most} at a time", flush=True
    )
    found: list[Record] = []
    for first in range(0, len(settings), most):
        found += run_fitting(settings[first : first + most], False, refused)
        forget()
    return found
