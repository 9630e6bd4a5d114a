"""What the scores cost in one training step of a base-size encoder: writes speed_scores.json.

python results/speed_scores.py [repeats]

RoBERTa-base's shapes with random weights, 72 matrices of r = 3, one batch of padded sentences. A
score's part of a step is timed by itself: what the layers show while they run (each z, and the
adding up), the score of every component and its smoothing. All scores and the whole training step
take turns.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import drlora_ref
from drlora_ref import BudgetSchedule, RankAllocator, inject_adapters, mark_only_adapters_trainable

BATCH, LENGTH = 16, 64  # sentences in a step, tokens in each
SCORES = ("frobenius_share", "output_norm", "loss_sensitivity")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CountCalls(TorchDispatchMode):
    """Counts calls of torch's operators, which on a GPU are about as many kernels."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def ready() -> dict:
    """{name: function}: the training step, and each score's part of it."""
    config = transformers.RobertaConfig(vocab_size=1000)
    model = inject_adapters(transformers.RobertaForSequenceClassification(config), r=3).to(DEVICE)
    mark_only_adapters_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(5, 1000, (BATCH, LENGTH), device=DEVICE)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), device=DEVICE)
    mask = (torch.arange(LENGTH, device=DEVICE) < lengths).long()
    labels = torch.randint(0, 2, (BATCH,), device=DEVICE)

    def training_step():
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()

    schedule = BudgetSchedule(3, 2, 1000)
    work = {"training step": training_step}
    for score in SCORES:
        allocator = RankAllocator(model, schedule, score=score)
        work[score] = its_part(allocator, mask)
        if allocator.watch:
            allocator.watch.stop()  # the step is timed as it is without
    return work


def its_part(allocator: RankAllocator, mask: torch.Tensor):
    """What one step of this score adds to a training step."""
    watch = allocator.watch
    z = [torch.randn(BATCH, LENGTH, 3, device=DEVICE) for _ in allocator.layers]

    def part():
        if watch:
            watch._begin(torch.nn.Identity(), (), {"attention_mask": mask})
            for eye, own in zip(watch.eyes, z, strict=True):
                eye(own)
            watch._end()
        allocator._smooth()

    return part


def in_turns(work: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function, after one run to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def count_calls(work: dict) -> dict[str, int]:
    calls = {}
    for name, function in work.items():
        with CountCalls() as counter:
            function()
        calls[name] = counter.calls
    return calls


def main(repeats: int = 9) -> None:
    torch.manual_seed(0)
    work = ready()
    times = in_turns(work, repeats)
    median = {name: statistics.median(values) for name, values in times.items()}
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    record = {
        "device": gpu or platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, drlora_ref)},
        "batch": BATCH,
        "length": LENGTH,
        "repeats": repeats,
        "step_ms": {name: round(ms, 3) for name, ms in median.items()},
        "step_ms_range": {n: [round(min(v), 3), round(max(v), 3)] for n, v in times.items()},
        "ratio_to_training_step": {
            name: round(ms / median["training step"], 6) for name, ms in median.items()
        },
        "operator_calls": count_calls(work),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
