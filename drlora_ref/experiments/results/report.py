"""Summaries as people read them: beside the paper's figures, and as plain text in percent."""

import math

import pandas as pd

from drlora_ref.experiments.results.paper import table
from drlora_ref.experiments.results.summaries import STATISTICS
from drlora_ref.experiments.sources import mpnet

COUNTS = ("collapsed", "diverged", "unpaired")
# What stands in a cell's text, of examples.py, power.py and rank_maps.py.
COMPARED = ("examples", "seeds_low", "seeds_high", "examples_low", "examples_high", "error",
            "freedom", "smallest", "mean_rank", "spearman", "permuted", "permuted_low",
            "permuted_high")  # fmt: skip


def beside_paper(summary: pd.DataFrame, number: int) -> pd.DataFrame:
    """Table `number` of the paper, and beside each figure (`paper`) ours; both as fractions.

    `summary` is one or several (pd.concat) of `summarise`'s and `average`'s, with the columns by
    which the table tells its cells apart: Table 5 needs `dem`, Table 6 `init_r`. What was not run
    keeps its row, with NaN; methods of ours that the paper lacks follow at the end. Table 9 is in
    its own units, and is not told apart by budget.
    Raises ValueError for a missing column or another table.
    """
    figures = table(number).rename(columns={"value": "paper"})
    if "paper" not in figures:
        raise ValueError(f"table {number} holds no results: take one of 2 to 6, or 9")
    if number == 9:
        figures = figures.drop(columns="budget")
    else:
        figures["paper"] /= 100
    keys = [c for c in figures if c not in ("paper", "trainable_parameters")]
    if missing := [name for name in keys if name not in summary]:
        raise ValueError(
            f"table {number} needs the columns {', '.join(missing)}: summarise by them"
        )
    ours = summary[summary.task.isin(figures.task)].astype(figures[keys].dtypes)
    both = figures.merge(ours, on=keys, how="left")
    known = figures.set_index(keys).index
    both = pd.concat([both, ours[~ours.set_index(keys).index.isin(known)]], ignore_index=True)
    both.attrs = summary.attrs
    return both


def show(frame: pd.DataFrame, across: str = "", scale: float = 100) -> str:
    """A summary, differences or a comparison with the paper as plain text, in percent.

    One line a cell, or with `across` (such as "task") one column for each of its values. A mean
    comes with its std, a difference with its 95 % interval. `scale` multiplies every figure: 1 for
    seconds and MiB; mean ranks and rank correlations are never scaled. A difference by examples
    has three intervals: over seeds and examples, then over each alone. "min" is the smallest effect
    that could have been shown. Where runs started from an encoder that was trained on more than
    text alone (mpnet-base), a last line says so.

    >>> cell = dict(method="lora", mean=0.751, std=0.013, n=5, ci_low=0.735, ci_high=0.767)
    >>> print(show(pd.DataFrame([cell | {"collapsed": 1}])))
    method                              ours
      lora 75.1 ± 1.3 (5 seeds, 1 collapsed)
    """
    hidden = (*STATISTICS, *COUNTS, *COMPARED, "paper", "trainable_parameters")
    keys = [name for name in frame if name not in hidden]
    texts = frame[keys].copy()
    if "paper" in frame:
        texts["paper"] = [
            "" if math.isnan(figure) else f"{scale * figure:.2f}" for figure in frame.paper
        ]
    texts["ours"] = [_cell_text(row, scale) for row in frame.to_dict("records")]
    trained = [source for source in frame.attrs.get("models", []) if mpnet.TRAINED in source]
    note = "".join(f"\nencoder: {source}" for source in trained)
    if not across:
        return texts.to_string(index=False) + note
    if "paper" in texts:
        texts["ours"] += [f", paper {figure}" if figure else "" for figure in texts.paper]
    one_metric = "metric" in texts and texts.groupby(across).metric.nunique().max() == 1
    keys = [name for name in keys if name != across and not (one_metric and name == "metric")]
    grid = texts.set_index([*keys, across]).ours
    return grid.unstack(across, sort=False, fill_value="not run").to_string() + note


def _cell_text(row: dict, scale: float) -> str:
    n, paired = row["n"], "baseline" in row
    if math.isnan(n):
        return "not run"
    if "mean_rank" in row:
        return f"{row['mean_rank']:.2f} ({int(n)} task{'s' * (n != 1)})"
    what = ("pair" if "unpaired" in row else "task") if paired else "seed"
    counts = [f"{int(n)} {what}{'s' * (n != 1)}"]
    counts += [f"{int(row['examples'])} examples"] if row.get("examples") else []
    counts += [f"{int(row[name])} {name}" for name in COUNTS if row.get(name)]
    if "spearman" in row:
        low, high = row["permuted_low"], row["permuted_high"]
        permuted = f"permuted {row['permuted']:.2f} [{low:.2f}, {high:.2f}]"
        return f"{row['spearman']:.2f}, {permuted} ({', '.join(counts)})"
    if n == 0:
        return f"({', '.join(counts)})"
    sign = "+" if paired else ""
    mean, low, high = (f"{scale * row[name]:{sign}.1f}" for name in ("mean", "ci_low", "ci_high"))
    if math.isnan(row["ci_low"]):
        return f"{mean} ({', '.join(counts)})"
    # Of a difference one asks whether it could be nothing.
    spread = f" [{low}, {high}]" if paired else f" ± {scale * row['std']:.1f}"
    for name in ("seeds", "examples"):
        if f"{name}_low" in row:
            bounds = (f"{scale * row[f'{name}_{end}']:+.1f}" for end in ("low", "high"))
            spread += f", {name} [{', '.join(bounds)}]"
    smallest = f", min {scale * row['smallest']:.1f}" if "smallest" in row else ""
    return f"{mean}{spread}{smallest} ({', '.join(counts)})"
