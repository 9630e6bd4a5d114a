"""Every figure of the notebooks. Each function draws on the axes it is given, or on new ones."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.collections import PatchCollection, PolyCollection
from matplotlib.patches import Rectangle
from torch import Tensor

from drlora_ref.events import Events
from drlora_ref.inject import matrix_label
from drlora_ref.schedule import BudgetSchedule

if TYPE_CHECKING:  # the tuner draws a rank map, and needs no pandas for it
    import pandas as pd

# Colours of matrices that eyes with any kind of colour vision can tell apart (Okabe and Ito).
DISTINCT = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#4D4D4D"]
GONE = "#d9d9d9"  # a component that is pruned

# The rows of the paper's Figure 2, and a gate's (Llama); a decoder's cross-attention is below them.
LABELS = ["Wq", "Wk", "Wv", "Wo", "Wg", "Wf1", "Wf2"]


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
    """A sum of outer products as a row of tables: c₀b₀a₀ᵀ + c₁b₁a₁ᵀ + ... = ΔW.

    Each table has its column bᵢ on the left and its row aᵢ above it; all are counted from 0.

    Shapes: lora_A (r, d_in), lora_B (d_out, r), lora_c (r,)
    """
    A, B, c = lora_A.detach(), lora_B.detach(), lora_c.detach()
    parts = torch.einsum("r,or,ri->roi", c, B, A)
    limits = [t.abs().max().item() or 1.0 for t in (torch.cat([parts, parts.sum(0)[None]]), A, B)]
    panels = len(parts) + 1
    figure, axes = plt.subplots(1, panels, figsize=(2 * panels, 2.2), layout="constrained")
    for i, (ax, part) in enumerate(zip(axes, parts, strict=False)):
        image = _table(ax, part, limits[0])
        _table(ax, B[:, i : i + 1], limits[2], left=-1.6)  # the column
        _table(ax, A[i : i + 1], limits[1], top=-1.6)  # the row
        ax.set_title(rf"$c_{i}\, b_{i}\, a_{i}^\top,\ c_{i} = {c[i].item():.2g}$", fontsize=10)
    image = _table(axes[-1], parts.sum(0), limits[0])
    axes[-1].set_title("sum = ΔW", fontsize=10)
    for ax in axes:
        d_out, d_in = parts.shape[1:]
        ax.set(xlim=(-1.8, d_in), ylim=(d_out, -1.8))
        ax.set_xticks([i + 0.5 for i in range(d_in)], range(d_in), fontsize=7)
        ax.set_yticks([i + 0.5 for i in range(d_out)], range(d_out), fontsize=7)
        ax.tick_params(length=0, pad=1)
        ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _table(axes: plt.Axes, numbers: Tensor, limit: float, left: float = 0, top: float = 0):
    """A matrix as colours, a square a number, its corner at (left, top)."""
    down, across = numbers.shape
    where = left, left + across, top + down, top
    return axes.imshow(numbers.cpu().numpy(), cmap="RdBu", vmin=-limit, vmax=limit, extent=where)


def plot_layer(learning: dict[str, set[str]]) -> plt.Figure:
    """The layer as a road, x → A → c → B → +, once for each title: who gets a gradient is lit.

    `learning`: a title, and which of "A", "c" and "B" a gradient reaches then.

    Raises ValueError for any other name.
    """
    for title, names in learning.items():
        if wrong := names - {"A", "c", "B"}:
            raise ValueError(f"{title}: {sorted(wrong)} are no tensors of a layer: A, c and B are")
    figure, axes = plt.subplots(
        1, len(learning), figsize=(3.4 * len(learning), 2.0), layout="constrained", squeeze=False
    )
    for ax, (title, names) in zip(axes.flat, learning.items(), strict=True):
        ax.set(xlim=(-0.6, 4.7), ylim=(-1.0, 1.5))
        ax.set_title(title, fontsize=10)
        ax.set_axis_off()
        for x, name in enumerate(("x", "A", "c", "B", "+")):
            lit = name in names
            face = DISTINCT[1] if lit else ("white" if name in "x+" else GONE)
            box = dict(boxstyle="round,pad=0.35", fc=face, ec="0.3" if name in "AcB" else "none")
            ax.text(x, 0, name, ha="center", va="center", fontsize=12, bbox=box)
            if name in "AcB":
                words = "gradient" if lit else "no gradient"
                ax.text(x, -0.75, words, ha="center", fontsize=7, color="black" if lit else "0.45")
            if x < 4:
                _arrow(ax, (x + 0.3, 0), (x + 0.7, 0), "0.3")
        ax.plot([0, 0, 4], [0.35, 1.0, 1.0], color="0.3", lw=1)
        _arrow(ax, (4, 1.0), (4, 0.3), "0.3")
        ax.text(2, 1.08, "$W_0$, frozen", ha="center", fontsize=9)
    return figure


def _arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], color: str):
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=color, lw=1))


def plot_trajectories(
    trajectories: Tensor,
    ylabel: str,
    axes: plt.Axes | None = None,
    labels: Sequence[str] | None = None,
) -> plt.Axes:
    """One line per component over the steps: trajectories (steps, components).

    With `labels`, one a line, there is a legend on the right.
    """
    axes = _axes(axes, figsize=(6, 3))
    lines = axes.plot(range(1, len(trajectories) + 1), trajectories, lw=1.2)
    if labels is not None:
        axes.legend(
            lines, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
        )
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
    axes.plot([], [], ".", color="0.4", label="pruning event")
    axes.set(xlabel="step t", ylabel="budget b(t), per matrix")
    axes.legend(frameon=False)
    return axes


def plot_pruning_map(
    masks: dict[int, Tensor], axes: plt.Axes | None = None, layers: int = 1
) -> plt.Axes:
    """Which component survives after which event: masks {step: bool (N,)}; dark survives.

    With several `layers`, of equally many components each, lines part them, and components are
    counted within their layer.
    """
    axes = _axes(axes, figsize=(6, 3))
    table = torch.stack(list(masks.values())).T.float().cpu().numpy()  # (N, events)
    r = len(table) // layers
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    every = math.ceil(len(masks) / 25)
    events = list(masks)[::every]
    axes.set_xticks(range(0, len(masks), every), map(str, events), rotation=90, fontsize=7)
    axes.set(xlabel="pruning event at step", ylabel="component, by position")
    if layers > 1:
        each = max(1, r // 4)
        places = [place for place in range(len(table)) if place % r % each == 0]
        axes.set_yticks(places, [str(place % r) for place in places], fontsize=7)
        for layer in range(layers):
            middle = 1 - (layer + 0.5) / layers
            axes.annotate(
                f"layer {layer}", (0, middle), (-22, 0), "axes fraction", "offset points",
                rotation=90, ha="right", va="center", fontsize=9,
            )  # fmt: skip
            if layer:
                axes.axhline(layer * r - 0.5, color="0.25", lw=1)
        axes.set_ylabel("")
    return axes


def plot_ranks(events: Events, axes: plt.Axes | None = None) -> plt.Axes:
    """Surviving components of each matrix after every pruning event; thick: the mean of its kind.

    Ranks are whole numbers, so lines of one kind are shifted by a hair to stay apart.
    """
    axes = _axes(axes, figsize=(5.6, 2.8))
    ranks = torch.stack(events.masks).view(len(events.steps), len(events.names), -1).sum(dim=-1)
    places, rows, _ = _grid(events.names)
    for i, (row, colour) in enumerate(zip(rows, DISTINCT * len(rows), strict=False)):
        own = ranks[:, [place[0] == row for place in places]].float()  # (events, matrices)
        shift = 0.3 * ((i + 0.5) / len(rows) - 0.5)
        axes.plot(events.steps, own + shift, color=colour, lw=0.7, alpha=0.4)
        axes.plot(events.steps, own.mean(dim=1), color=colour, lw=2.2, label=row)
    axes.set(xlabel="pruning event at step", ylabel="rank")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return axes


def film(events: Events, schedule: BudgetSchedule, title: str = "") -> FuncAnimation:
    """The method at work: a frame for each event that was kept, and the last one held.

    Left, all components sorted by their smoothed score, with the cut that the budget makes. Right,
    the same components where they belong, coloured by kind of matrix: who is left. Below, the
    budget (Eq. 9) and where the frame stands on it. A record has the events where the run was given
    film_events (records.read_events), and planted.recover(events=...) hands them out.

    The animation saves itself, `film(...).save("film.gif", writer="pillow")`; `to_jshtml` is a
    player. Raises ValueError if there are no events, or not those of this schedule.

    >>> film(Events(), BudgetSchedule(3, 2, 100))
    Traceback (most recent call last):
    ValueError: there are no events to show: keep some, by film_events or Events.add
    """
    _check_film(events, schedule)
    places, rows, columns = _grid(events.names)
    colours = [DISTINCT[rows.index(row) % len(DISTINCT)] for row, _ in places]
    r = len(events.masks[0]) // len(places)
    of_each = [colour for colour in colours for _ in range(r)]  # component by component

    figure = plt.figure(figsize=(8, 5), dpi=100, layout="constrained", facecolor="white")
    panels = figure.subplot_mosaic("AB;AB;AB;CC", width_ratios=[1.1, 1])
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    left, right, below = panels["A"], panels["B"], panels["C"]
    heading = figure.suptitle(" ", x=0.02, ha="left", fontsize=13, fontweight="bold")
    bars, cut, words = _sorted_bars(left, events)
    cells = _component_grid(right, places, rows, columns, r)
    cursor, count = _budget_cursor(below, schedule, len(of_each))

    def draw(frame: int) -> None:
        frame = min(frame, len(events.steps) - 1)  # the last one stays a while
        step, scores, mask = events.steps[frame], events.scores[frame], events.masks[frame]
        order = scores.argsort(descending=True, stable=True).tolist()
        shown = [of_each[i] if mask[i] else GONE for i in range(len(of_each))]
        bars.set_verts([_bar(place, scores[i].item()) for place, i in enumerate(order)])
        bars.set_color([shown[i] for i in order])
        cells.set_facecolor(shown)
        kept = int(mask.sum())
        cut.set_xdata([kept, kept])
        on_the_right = kept < 0.66 * len(mask)  # where the bars are low
        words.set(x=kept, text=f"  the cut: {kept} stay  ", ha="left" if on_the_right else "right")
        cursor.set_data([step], [kept])
        count.set_text(f"step {step}: {kept} of {len(mask)}")
        heading.set_text(title or f"After {step} of {schedule.total_steps} steps")

    return FuncAnimation(figure, draw, frames=len(events.steps) + 5, interval=500)


def _check_film(events: Events, schedule: BudgetSchedule) -> None:
    if not events.steps:
        raise ValueError("there are no events to show: keep some, by film_events or Events.add")
    for step, mask in zip(events.steps, events.masks, strict=True):
        due = schedule.keep_count(step, len(mask))
        if not schedule.prunes_at(step) or int(mask.sum()) != due:
            raise ValueError(
                f"step {step} keeps {int(mask.sum())} of {len(mask)} components, but this schedule "
                f"{f'keeps {due}' if schedule.prunes_at(step) else 'has no event'} there: give the "
                "schedule that the events come from"
            )


def _bar(place: int, height: float) -> list[tuple[float, float]]:
    return [(place, 0), (place, height), (place + 1, height), (place + 1, 0)]


def _sorted_bars(axes: plt.Axes, events: Events) -> tuple:
    """The panel of all components by score: its bars, the cut and its words."""
    n, top = len(events.masks[0]), max(scores.max().item() for scores in events.scores)
    bars = PolyCollection([_bar(i, 0.0) for i in range(n)], linewidths=0)
    axes.add_collection(bars)
    cut = axes.axvline(n, color="black", lw=1.5)
    words = axes.text(n, 0.96 * top, "", ha="right", va="top", fontsize=10)
    axes.set(xlim=(0, n * 1.01), ylim=(0, 1.02 * top), ylabel="smoothed score")
    axes.set_xlabel("all components, the best first")
    axes.set_title("one queue", loc="left", fontsize=11)
    return bars, cut, words


def _component_grid(
    axes: plt.Axes, places: list[tuple], rows: list[str], columns: list[tuple[str, int]], r: int
) -> PatchCollection:
    """The panel of who is left: r squares in each matrix's cell, in the order of the places."""
    across = math.ceil(math.sqrt(r * 1.5)) if len(columns) > 1 else r
    down = math.ceil(r / across)
    squares = []
    for row, column in places:
        x, y = columns.index(column), rows.index(row)
        for i in range(r):
            corner = x + 0.08 + 0.84 * (i % across) / across, y + 0.1 + 0.8 * (i // across) / down
            squares.append(Rectangle(corner, 0.84 / across * 0.88, 0.8 / down * 0.88))
    cells = PatchCollection(squares, linewidths=0)
    axes.add_collection(cells)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    names = [f"{side}{number}" for side, number in columns] if len(columns) > 1 else [""]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], names)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    for label, colour in zip(axes.get_yticklabels(), DISTINCT * len(rows), strict=False):
        label.set(color=colour, fontweight="bold")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(columns) > 1:
        axes.set_xlabel("layer")
    axes.set_title("who is left in each matrix", loc="left", fontsize=11)
    return cells


def _budget_cursor(axes: plt.Axes, schedule: BudgetSchedule, n: int) -> tuple:
    """The panel of the budget: the dot on its curve, and the words beside it."""
    steps = range(schedule.total_steps + 1)
    axes.plot(steps, [schedule.keep_count(t, n) for t in steps], color="0.5", lw=1.5)
    (dot,) = axes.plot([], [], "o", color="black", ms=8)
    count = axes.text(0.99, 0.95, "", transform=axes.transAxes, ha="right", va="top", fontsize=11)
    axes.set(xlabel="optimizer step", xlim=(0, schedule.total_steps), ylabel="budget")
    axes.margins(y=0.15)
    return dot, count


def _grid(modules: list[str]) -> tuple[list[tuple], list[str], list[tuple[str, int]]]:
    """Where each matrix stands in Figure 2: its (row, column); all rows, and all columns."""
    places: list[tuple] = []
    for module in modules:
        index = re.search(r"\.(\d+)\.", module)
        side = "d" if "decoder" in module else ""  # BART has two stacks of layers
        place = matrix_name(module), (side, int(index[1]) if index else 0)
        places.append((module, place[1]) if place in places else place)
    # In the paper's order, whatever order the names are in: a record sorts them.
    cross = [f"{label} cross" for label in LABELS]
    order = [*LABELS, *cross, *dict.fromkeys(row for row, _ in places)]
    rows = sorted({row for row, _ in places}, key=order.index)
    return places, rows, sorted({column for _, column in places})


# The drawing's three matrices: four components each, with the score of each component.
DRAWN = {"$W_q$": (0.96, 0.55, 0.30, 0.10), "$W_v$": (0.90, 0.82, 0.73, 0.64),
         "$W_{f1}$": (0.42, 0.36, 0.20, 0.05)}  # fmt: skip
DRAWN_BUDGET = 6


def plot_schematic(dark: bool = False) -> plt.Figure:
    """The idea in one drawing: components of several matrices, one queue, unequal ranks.

    Its numbers are drawn, not measured. `dark`: light lines for a dark page; both are transparent.
    """
    ink, faint = ("#e6e6e6", "#5c5c5c") if dark else ("#1a1a1a", "#c8c8c8")
    figure, axes = plt.subplots(figsize=(10, 4.4), dpi=100)
    figure.patch.set_alpha(0)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 100), ylim=(44, 0))
    axes.set_axis_off()
    colours = ("#56B4E9", "#E69F00", "#2FBF8F") if dark else DISTINCT[:3]
    every = [(s, i, k) for k, scores in enumerate(DRAWN.values()) for i, s in enumerate(scores)]
    queue = sorted(every, reverse=True)
    kept = {(i, k) for _, i, k in queue[:DRAWN_BUDGET]}

    def text(x, y, words, size=12, **more):
        axes.text(x, y, words, size=size, **({"color": ink, "ha": "center", "va": "center"} | more))

    def box(x, y, width, height, colour, **more):
        axes.add_patch(Rectangle((x, y), width, height, fc=colour, lw=0, **more))

    def matrix(x, y, k, who):
        """W0 and the outer products of those components: a column and a row each."""
        box(x, y, 7, 8, faint)
        text(x + 3.5, y + 4, "$W_0$")
        for place, i in enumerate(who):
            left = x + 8.5 + 5.6 * place
            text(left, y + 4.2, "+", 11)
            box(left + 1, y + 1.2, 0.9, 6.8, colours[k])
            box(left + 2.1, y + 1.2, 2.6, 0.95, colours[k], alpha=0.75)
            text(left + 3.4, y + 4.6, f"$c_{i}$", 10)

    for k, name in enumerate(DRAWN):
        y = 9 + 12 * k
        text(3, y + 4, name, 15)
        matrix(6, y, k, range(4))
        left = [i for i in range(4) if (i, k) in kept]
        matrix(67.5, y, k, left)
        text(71, y + 9.4, f"rank {len(left)}", 12, weight="bold")
    for place, (score, i, k) in enumerate(queue):
        alive = (i, k) in kept
        box(46, 8.4 + 2.85 * place, 15 * score, 2.1, colours[k] if alive else faint)
    cut = 8.4 + 2.85 * DRAWN_BUDGET - 0.35
    axes.plot([44.5, 62], [cut, cut], color=ink, lw=2)
    text(62, cut - 1.6, "the cut", 11, ha="right")
    text(20, 3.5, r"every matrix: $W_0 + \sum_i\ c_i\, b_i a_i^\top$", 13)
    text(53.5, 3.5, "one queue, by score", 13)
    text(84, 3.5, "what is left: unequal ranks", 13)
    for start, end in ((38, 43.5), (62.7, 66.7)):
        arrow = dict(arrowstyle="-|>", color=ink, lw=2)
        axes.annotate("", (end, 25), (start, 25), arrowprops=arrow)
    return figure


def plot_rank_heatmap(
    rank_pattern: Mapping[str, float],
    axes: plt.Axes | None = None,
    title: str = "",
    largest: float | None = None,
) -> plt.Axes:
    """Surviving components by matrix (rows) and layer (columns), as the paper's Figure 2.

    Of one map whole numbers, of a mean of maps all with one decimal. `largest` is the rank at which
    the scale of colours ends: by default that of the map.
    """
    places, rows, columns = _grid(list(rank_pattern))
    cells = dict(zip(places, rank_pattern.values(), strict=True))
    table = [[cells.get((row, column), float("nan")) for column in columns] for row in rows]
    axes = _axes(axes, figsize=(1.8 + 0.42 * len(columns), 1 + 0.36 * len(rows)))
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=largest, aspect="auto")
    form = ".1f" if any(value % 1 for value in cells.values()) else ".0f"
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            bright = value > 0.6 * (largest or max(max(cells.values()), 1))
            axes.text(
                x, y, f"{value:{form}}", ha="center", va="center", color="k" if bright else "w"
            )
    axes.set_xticks(range(len(columns)), [f"{side}{layer}" for side, layer in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="layer", title=title)
    axes.figure.colorbar(image, ax=axes, label="rank")
    return axes


def plot_rank_heatmaps(
    rank_patterns: Mapping[str, Mapping[str, float]],
    across: int = 2,
    size: tuple[float, float] = (6.8, 3.2),
    largest: float | None = None,
) -> plt.Figure:
    """One plot_rank_heatmap for each title, `across` in a row: Figure 2 with its four budgets.

    `size`: width and height of each, in inches. Each has its own scale of colours (budgets differ,
    what is compared is the pattern), unless `largest` gives one to all.
    """
    down = -(-len(rank_patterns) // across)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(size[0] * across, size[1] * down),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(rank_patterns) :]:
        ax.set_axis_off()
    for ax, (title, pattern) in zip(axes.flat, rank_patterns.items(), strict=False):
        plot_rank_heatmap(pattern, ax, title, largest)
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


def plot_learning_curve(
    record: dict, axes: plt.Axes | None = None, title: str | None = None
) -> plt.Axes:
    """Training loss of every step, raw and smoothed (left), and the metric of every evaluation.

    The smoothed loss is an average that forgets by half in about 14 steps, without the pull
    towards zero at its start. By default the title says what was run.
    """
    axes = _axes(axes, figsize=(6, 3))
    losses = [float("nan") if loss is None else loss for loss in record["loss_curve"]]
    smoothed, weight, line = 0.0, 0.0, []
    for loss in losses:
        if math.isfinite(loss):
            smoothed, weight = 0.95 * smoothed + 0.05 * loss, 0.95 * weight + 0.05
        line.append(smoothed / weight if weight else math.nan)
    steps = range(1, len(losses) + 1)
    (raw,) = axes.plot(steps, losses, lw=0.6, color="0.75")
    (smooth,) = axes.plot(steps, line, lw=1.6, color=DISTINCT[0])
    axes.set(xlabel="step", ylabel="training loss")
    axes.yaxis.label.set_color(DISTINCT[0])
    axes.tick_params(axis="y", colors=DISTINCT[0])
    right, metric = axes.twinx(), record.get("metric_name", "metric")
    evaluations = record["evaluations"]
    points = [e["step"] for e in evaluations], [e["metric"] for e in evaluations]
    (dots,) = right.plot(*points, "o-", ms=4, color=DISTINCT[4])
    right.set_ylabel(metric, color=DISTINCT[4])
    right.tick_params(axis="y", colors=DISTINCT[4])
    right.spines["right"].set_visible(True)
    named = {"loss": raw, "loss, smoothed": smooth, metric: dots}
    axes.legend(named.values(), named, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3,
                frameon=False, fontsize=8)  # fmt: skip
    run = record.get("parameters", {})
    axes.set_title(
        " on ".join(filter(None, map(run.get, ("method", "task")))) if title is None else title
    )
    return axes
