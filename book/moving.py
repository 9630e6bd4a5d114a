"""Three things to move by hand: for each the form, its data, and a picture for who has no script.

The data and the pictures come from the package; static/moving.js draws the same again as a reader
moves the controls.
"""

import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from drlora_ref import BudgetSchedule, ema_update, plotting

ROOT = Path(__file__).parents[1]
STEPS = 120  # of the picture of smoothing; the true score jumps after the first third


def write(folder: Path) -> None:
    """smoothing.html, budget.html and ranks.html."""
    folder.mkdir(parents=True)
    for make in (smoothing, budget, ranks):
        (folder / f"{make.__name__}.html").write_text(make())


def smoothing() -> str:
    """β and noise -> smoothed scores (Eq. 8)."""
    draws = torch.randn(STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    truth = torch.where(torch.arange(STEPS) < STEPS // 3, 0.2, 0.8)
    raw = truth + 0.2 * torch.tensor(draws)
    average, line = torch.zeros(()), []
    for score in raw:
        average = ema_update(average, score, 0.9)
        line.append(average.item())
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    axes.plot(raw, ".", color="0.6", label="raw score, noise 0.2")
    axes.plot(truth, "--", color="black", lw=1, label="true score")
    axes.plot(line, color=plotting.DISTINCT[0], lw=2, label="smoothed, β = 0.9")
    axes.set(xlabel="step", ylabel="score")
    axes.legend(frameon=False)
    controls = _range("beta", "memory β", 0, 0.99, 0.01, 0.9)
    controls += _range("noise", "noise on the score", 0, 0.5, 0.02, 0.2)
    words = "A score that jumps from 0.2 to 0.8, seen through noise, and its moving average."
    return _page("smoothing", {"draws": [round(d, 4) for d in draws]}, controls, figure, words)


def budget() -> str:
    """tinit, tfinal, deltaT, curve, b(0), b(T) -> how many may stay, and when some go (Eq. 9)."""
    schedule = BudgetSchedule(3, 2, 1000, deltaT=50)
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    plotting.plot_budget({"the paper's curve": schedule}, axes)
    controls = _range("tinit", "warm-up tinit, steps", 0, 900, 10, 150)
    controls += _range("tfinal", "final phase tfinal, steps", 0, 900, 10, 500)
    controls += _range("deltaT", "steps between events, deltaT", 1, 200, 1, 50)
    controls += _range("init_r", "b(0), per matrix at the start", 1, 16, 1, 3)
    controls += _range("target_r", "b(T), per matrix at the end", 1, 16, 1, 2)
    controls += _choice("curve", "curve", {"paper": "the paper's", "adalora": "AdaLoRA's"})
    words = "How many of the components of 72 matrices may stay, over 1,000 steps; dots are events."
    return _page("budget", {"total_steps": 1000, "matrices": 72}, controls, figure, words)


def ranks() -> str:
    """Noise and score -> the ranks found, out of results/found_ranks.json."""
    table = json.loads((ROOT / "results" / "found_ranks.json").read_text())
    planted, runs = table["planted_ranks"], table["runs"]
    noises = sorted({run["noise"] for run in runs})
    first = next(r for r in runs if r["score"] == "frobenius_share" and r["noise"] == 0.5)
    mean = torch.tensor(first["ranks"]).double().mean(0)
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    places = torch.arange(len(planted))
    axes.bar(places, planted, width=0.9, color="0.85", label="planted")
    axes.bar(places, mean, width=0.4, color=plotting.DISTINCT[0], label="found, mean")
    axes.set_xticks(places, planted)
    axes.set(xlabel="planted rank of the map", ylabel="components")
    axes.legend(frameon=False)
    names = dict.fromkeys(run["score"] for run in runs)
    controls = _choice("score", "score", {name: name for name in names})
    which = {str(i): f"{noise:g}" for i, noise in enumerate(noises)}
    controls += _choice("noise", "noise on the answers", which, str(noises.index(0.5)))
    words = (
        "The ranks found in eight maps of known rank, mean and range of "
        f"{len(table['seeds'])} seeds; each run is in results/found_ranks.json."
    )
    return _page("ranks", {**table, "noises": noises}, controls, figure, words)


def _range(name: str, label: str, least: float, most: float, step: float, value: float) -> str:
    return (
        f'<label>{label} <output data-of="{name}">{value}</output>'
        f'<input type="range" name="{name}" min="{least}" max="{most}" step="{step}" '
        f'value="{value}"></label>\n'
    )


def _choice(name: str, label: str, options: dict[str, str], chosen: str = "") -> str:
    listed = "".join(
        f'<option value="{value}"{" selected" if value == chosen else ""}>{words}</option>'
        for value, words in options.items()
    )
    return f'<label>{label} <select name="{name}">{listed}</select></label>\n'


def _page(name: str, data: dict, controls: str, figure: plt.Figure, words: str) -> str:
    """The form is there for scripts only; without one, the picture of its first values is seen."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = re.sub(r"^.*?<svg", "<svg", buffer.getvalue(), flags=re.S)
    svg = re.sub(r"<svg", f'<svg role="img" aria-label="{words}"', svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(#|id=\")(?=[\w.])(?![0-9a-f]{6}\")", rf"\g<1>{name}-", svg)
    text = json.dumps(data).replace("</", "<\\/")
    return (
        f'<div class="move" data-move="{name}">\n<p>{words}</p>\n'
        f'<form hidden aria-label="controls">\n{controls}</form>\n'
        f'<div class="picture">{svg}</div>\n<p class="said" role="status"></p>\n'
        f'<script type="application/json">{text}</script>\n</div>'
    )
