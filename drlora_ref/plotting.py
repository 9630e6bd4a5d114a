"""Every figure of the notebooks. Each function draws on the axes it is given, or on new ones."""

import re
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from drlora_ref.inject import matrix_label
from drlora_ref.schedule import BudgetSchedule

if TYPE_CHECKING:  # the tuner draws a rank map, and needs no pandas for it
    import pandas as pd

# The rows of the paper's Figure 2, and a decoder's cross-attention below them.
LABELS = ["Wq", "Wk", "Wv", "Wo", "Wf1", "Wf2"]


def use_style() -> None:
    """Small, light figures: 72 dots an inch, no frame on the top and on the right."""
    plt.rcParams.update(
        {"figure.dpi": 72, "savefig.dpi": 72, "axes.spines.top": False, "axes.spines.right": False}
    )


def _axes(axes: plt.Axes | None, **size) -> plt.Axes:
    return axes if axes is not None else plt.subplots(layout="constrained", **size)[1]


def matrix_name(module: str) -> str:
    """The paper's label of an adapted matrix, or the module's own last name.

    >>> matrix_name("encoder.layer.3.attention.output.dense"), matrix_name("layer.3.output.dense")
    ('Wo', 'Wf2')
    >>> matrix_name("decoder.layers.0.encoder_attn.q_proj")
    'Wq cross'
    """
    if label := matrix_label(module):
        return label
    cross = " cross" if re.search(r"(?i)encoder_attn|encdecattention|crossatt", module) else ""
    return module.split(".")[-1] + cross


def plot_outer_products(lora_A: Tensor, lora_B: Tensor, lora_c: Tensor) -> plt.Figure:
    """A sum of outer products as a row of pictures: c₁b₁a₁ᵀ + c₂b₂a₂ᵀ + ... = ΔW.

    Shapes: lora_A (r, d_in), lora_B (d_out, r), lora_c (r,)
    """
    parts = torch.einsum("r,or,ri->roi", lora_c, lora_B, lora_A).detach()
    pictures = [*parts, parts.sum(0)]
    limit = max(p.abs().max().item() for p in pictures)
    figure, axes = plt.subplots(
        1, len(pictures), figsize=(2 * len(pictures), 2.2), layout="constrained"
    )
    titles = [rf"$c_{i} b_{i} a_{i}^\top$" for i in range(1, len(parts) + 1)] + ["sum = ΔW"]
    for ax, picture, title in zip(axes, pictures, titles, strict=True):
        image = ax.imshow(picture, cmap="RdBu", vmin=-limit, vmax=limit)
        ax.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def plot_trajectories(trajectories: Tensor, ylabel: str, axes: plt.Axes | None = None) -> plt.Axes:
    """One line per component over the steps: trajectories (steps, components)."""
    axes = _axes(axes, figsize=(6, 3))
    axes.plot(range(1, len(trajectories) + 1), trajectories, lw=1.2)
    axes.set(xlabel="step", ylabel=ylabel)
    return axes


def plot_budget(schedules: dict[str, BudgetSchedule], axes: plt.Axes | None = None) -> plt.Axes:
    """b(t) of each schedule by name, with its pruning events as dots."""
    axes = _axes(axes, figsize=(6, 3))
    for label, schedule in schedules.items():
        steps = range(schedule.total_steps + 1)
        (line,) = axes.plot(steps, [schedule.budget(t) for t in steps], label=label)
        events = [t for t in steps if schedule.prunes_at(t)]
        axes.plot(events, [schedule.budget(t) for t in events], ".", color=line.get_color())
    axes.set(xlabel="step t", ylabel="budget b(t), components per layer")
    axes.legend(frameon=False)
    return axes


def plot_pruning_map(masks: dict[int, Tensor], axes: plt.Axes | None = None) -> plt.Axes:
    """Which component survives after which event: masks {step: bool (N,)}; dark survives."""
    axes = _axes(axes, figsize=(6, 3))
    table = torch.stack(list(masks.values())).T.float()  # (N, events)
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(masks)), map(str, masks), rotation=90, fontsize=7)
    axes.set(xlabel="pruning event at step", ylabel="component, by position")
    return axes


def plot_rank_heatmap(
    rank_pattern: dict[str, int], axes: plt.Axes | None = None, title: str = ""
) -> plt.Axes:
    """Surviving components by matrix (rows) and layer (columns), as the paper's Figure 2."""
    cells = {}
    for module, rank in rank_pattern.items():
        index = re.search(r"\.(\d+)\.", module)
        side = "d" if "decoder" in module else ""  # BART has two stacks of layers
        column = side, int(index[1]) if index else 0
        row = matrix_name(module)
        cells[module if (row, column) in cells else row, column] = rank
    # In the paper's order, whatever order the pattern is in: a record sorts its names.
    cross = [f"{label} cross" for label in LABELS]
    order = [*LABELS, *cross, *dict.fromkeys(matrix for matrix, _ in cells)]
    rows = sorted({matrix for matrix, _ in cells}, key=order.index)
    columns = sorted({layer for _, layer in cells})
    table = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    axes = _axes(axes, figsize=(1.8 + 0.42 * len(columns), 1 + 0.36 * len(rows)))
    image = axes.imshow(table, cmap="viridis", vmin=0, aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            bright = value > 0.6 * max(max(cells.values()), 1)
            axes.text(x, y, f"{value:g}", ha="center", va="center", color="k" if bright else "w")
    axes.set_xticks(range(len(columns)), [f"{side}{layer}" for side, layer in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="layer", title=title)
    axes.figure.colorbar(image, ax=axes, label="rank")
    return axes


def plot_rank_heatmaps(rank_patterns: dict[str, dict[str, int]], across: int = 2) -> plt.Figure:
    """One plot_rank_heatmap for each title, `across` in a row: Figure 2 with its four budgets.

    Each has its own scale of colours: budgets differ, what is compared is the pattern.
    """
    down = -(-len(rank_patterns) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(6.8 * across, 3.2 * down), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(rank_patterns) :]:
        ax.set_axis_off()
    for ax, (title, pattern) in zip(axes.flat, rank_patterns.items(), strict=False):
        plot_rank_heatmap(pattern, ax, title)
    return figure


def plot_scores(
    summary: "pd.DataFrame", labels: str = "method", axes: plt.Axes | None = None
) -> plt.Axes:
    """A dot per row with its 95 % interval, in percent; a cross is the paper's figure, if given.

    `summary`: what summarise, paired_difference or beside_paper gives, of one task and metric;
    `labels` is the column that names the rows. A single run is a dot without an interval.
    """
    axes = _axes(axes, figsize=(6, 0.8 + 0.32 * len(summary)))
    rows = range(len(summary))
    half = 100 * (summary.ci_high - summary["mean"])
    axes.errorbar(100 * summary["mean"], rows, xerr=half, fmt="o", ms=5, capsize=3, label="ours")
    if "paper" in summary:
        axes.plot(100 * summary.paper, rows, "x", color="0.4", label="paper")
        axes.legend(frameon=False)
    if "unpaired" in summary:
        axes.axvline(0, lw=0.8, color="0.7")  # no difference
    axes.set_yticks(rows, summary[labels])
    axes.set_ylim(len(summary) - 0.5, -0.5)  # the first row on top, as in a table
    axes.set(xlabel=f"{summary.metric.iloc[0] if 'metric' in summary else 'difference'}, percent")
    return axes


def plot_learning_curve(record: dict, axes: plt.Axes | None = None) -> plt.Axes:
    """Training loss of every step (left scale) and the metric of every evaluation (right)."""
    axes = _axes(axes, figsize=(6, 3))
    axes.plot(range(1, len(record["loss_curve"]) + 1), record["loss_curve"], lw=0.8, color="0.6")
    axes.set(xlabel="step", ylabel="training loss")
    right = axes.twinx()
    evaluations = record["evaluations"]
    right.plot([e["step"] for e in evaluations], [e["metric"] for e in evaluations], "o-")
    right.set_ylabel(record.get("metric_name", "metric"))
    return axes
