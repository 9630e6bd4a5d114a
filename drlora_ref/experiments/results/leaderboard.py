"""PEFT's public method comparison, read as data: an excerpt of its result files (notebook 20).

The facts are in leaderboard.yaml, each with the commit at which its file was read. They are PEFT's
runs, not ours: Llama-3.2-3B on MetaMathQA, scored by GSM8K's test questions.
"""

import re
from functools import cache
from pathlib import Path

import pandas as pd

from drlora_ref.experiments.given import read_yaml

FILE = Path(__file__).with_name("leaderboard.yaml")


@cache
def facts() -> dict:
    """The whole file: source, licence, folder, questions, seed; and what is read below."""
    return read_yaml(FILE)


def short_name(experiment: str) -> str:
    """An experiment's name without the model's, which is the same everywhere.

    >>> short_name("lora--llama-3.2-3B-rank32-dora"), short_name("vera--llama-3.2-3B-default")
    ('lora rank32-dora', 'vera default')
    """
    return re.sub("--llama-3.2-3B-", " ", experiment)


def runs() -> pd.DataFrame:
    """Five runs with all their facts, by short name: what a table shows, and what it leaves out.

    Columns: correct (of facts()["questions"]), trainable (parameters), peak_memory and file_size
    (bytes), train_time (seconds), date, config and loss (dictionaries; loss by step).

    >>> runs().loc["lora rank32", ["correct", "trainable"]].tolist()
    [629, 9175040]
    """
    rows = pd.DataFrame(facts()["runs"]["rows"])
    return rows.set_index(rows.pop("experiment").map(short_name).rename(None))


def campaign() -> pd.DataFrame:
    """One campaign, an experiment a row, the best first: correct and loss, by short name.

    >>> campaign().correct.iloc[[0, -1]].to_dict()
    {'lora rank64-rslora': 698, 'fourierft n_frequency-5000': 165}
    """
    rows = facts()["campaign"]["rows"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["correct", "loss"])
    return table.rename(index=short_name).sort_values("correct", ascending=False, kind="stable")


def repeats() -> pd.DataFrame:
    """The same experiment run again, months apart: a run a row, the oldest of each first.

    Columns: experiment, correct, loss, and peft, peft_commit of the run. Seed and settings are the
    same; PEFT, transformers and torch are those of the day.

    >>> repeats().query("experiment == 'lora rank32'").correct.tolist()
    [636, 636, 647, 629]
    """
    now, rows = facts()["campaign"]["rows"], []
    made = facts()["runs"]
    for name, history in facts()["repeats"].items():
        for run in history:
            if run == "campaign":
                run = [*now[name], made["peft"], made["peft_commit"][:7]]
            rows.append([short_name(name), *run[:4]])
    return pd.DataFrame(rows, columns=["experiment", "correct", "loss", "peft", "peft_commit"])


def rank_map() -> dict[str, int]:
    """What AdaLoRA left of 64 components, by the name of each of the 56 matrices.

    >>> found = rank_map()
    >>> len(found), sum(found.values()), found["model.layers.0.self_attn.v_proj"]
    (56, 1792, 62)
    """
    of = facts()["rank_map"]
    layers = range(len(of["q_proj"]))
    kinds = "q_proj", "v_proj"
    return {f"model.layers.{i}.self_attn.{kind}": of[kind][i] for i in layers for kind in kinds}
