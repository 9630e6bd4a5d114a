"""Tiny runs that several test files train, and what makes two of their records comparable."""

import dataclasses
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.sources.models import resolve_model

# Thirty steps, an evaluation every fourth: 64 generated sentences in batches of 16.
TINY = Settings(
    task="cola",
    data_dir="generated",
    model_name="tiny-roberta",
    max_steps=30,
    deltaT=3,
    checkpoint_every=5,
    lora_alpha=64,
    learning_rate=1e-2,
)
# What a run that went on after it was killed may have otherwise than one that never stopped.
COSTS = ("seconds", "evaluation_seconds", "peak_memory_mib", "tokens_per_second")


def tiny(folder: str | Path, **given) -> Settings:
    """TINY in this folder, and otherwise as given."""
    return dataclasses.replace(TINY, output_dir=str(folder), **given)


def without_costs(record: dict) -> dict:
    """The part of a record that must not depend on interruptions, nor on where it is kept."""
    parameters = {k: v for k, v in record["parameters"].items() if k != "output_dir"}
    return {k: v for k, v in record.items() if k not in COSTS} | {"parameters": parameters}


def still_model(folder: str | Path) -> None:
    """tiny-roberta without dropout, saved: several draw other random numbers than one alone."""
    path = resolve_model("tiny-roberta").path
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModel.from_pretrained(path, **still).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
