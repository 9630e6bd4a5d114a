"""The model card of an exported adapter: what it is, how good it was, and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCardData
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

CARD = """---
{front}
---

# LoRA adapter{of_base}, ranks by dynamic-rank DoRA

{components} components over {matrices} weight matrices, {mean:.2f} per matrix on average, \
distributed while training by
dynamic-rank DoRA ([arXiv 2405.17357](https://arxiv.org/abs/2405.17357)). What is here is a plain \
LoRA {form}:
it needs nothing but PEFT.

| | |
|---|---|
{facts}

![Surviving components of each matrix](rank_map.png)

```python
from peft import PeftModel
{make_base}
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def model_card(
    model: nn.Module,
    config: LoraConfig,
    ranks: dict[str, int],
    task: str | None,
    metric: dict[str, float],
) -> str:
    """The README.md of an exported adapter, which PEFT and the hub read too.

    `model` is the plain one that was adapted; a local folder is named without its place.
    """
    base = config.base_model_name_or_path
    local = Path(base) if base and Path(base).exists() else None
    name = local.name if local else base
    facts = {
        "base model": (f"{name} (a local folder)" if local else name) or "not named",
        "task": task or "not named",
        **{name: f"{value:.4g}" for name, value in metric.items()},
        "rank": f"{min(ranks.values())} to {max(ranks.values())}",
    }
    escaped = {str(k).replace("|", r"\|"): str(v).replace("|", r"\|") for k, v in facts.items()}
    front = ModelCardData(
        base_model=None if local else base,
        library_name="peft",
        tags=["lora", "dynamic-rank", "arxiv:2405.17357"],
    )
    form = f"of rank {config.r}"
    if config.rank_pattern:
        form = "whose matrices have ranks of their own (`rank_pattern`)"
    elif any(0 < rank < config.r for rank in ranks.values()):
        form += ", filled up with zeros"
    return CARD.format(
        front=front.to_yaml(),
        of_base=f" for {name}" if name else "",
        components=sum(ranks.values()),
        matrices=len(ranks),
        mean=sum(ranks.values()) / len(ranks),
        form=form,
        facts="\n".join(
            f"| {name} | {value} |".replace("\n", " ") for name, value in escaped.items()
        ),
        make_base=_make_base(model, name),
    )


def _make_base(model: nn.Module, name: str | None) -> str:
    """The lines of Python that make the base model."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"base = ...  # the {kind} that was adapted"
    labels = f", num_labels={model.config.num_labels}" if "Classification" in kind else ""
    load = f'{kind}.from_pretrained("{name or "name-of-the-base-model"}"{labels})'
    return f"from transformers import {kind}\n\nbase = {load}"
