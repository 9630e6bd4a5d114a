"""The model card of an exported adapter: what it is, how good it was, and how to load it."""

import os
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

TITLE = "ranks by dynamic-rank DoRA"
CARD = """---
{front}
---

# LoRA adapter{of_base}, {title}

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

    `model` is the plain one that was adapted; a local folder is named without its place. Names are
    data: whatever stands in them, the page shows it and its code quotes it.
    """
    base = config.base_model_name_or_path or ""
    local = os.path.exists(base)
    name = Path(base).name if local else base
    facts = {
        "base model": f"{name} (a local folder)" if local else name or "not named",
        "task": task or "not named",
        **{name: f"{value:.4g}" for name, value in metric.items()},
        "rank": f"{min(ranks.values())} to {max(ranks.values())}",
    }
    front = ModelCardData(
        base_model=base if not local and _on_the_hub(base) else None,
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
        title=TITLE,
        of_base=f" for {shown(name)}" if name else "",
        components=sum(ranks.values()),
        matrices=len(ranks),
        mean=sum(ranks.values()) / len(ranks),
        form=form,
        facts="\n".join(f"| {shown(name)} | {shown(value)} |" for name, value in facts.items()),
        make_base=_make_base(model, name),
    )


def shown(text: str) -> str:
    """The text as one line of Markdown that reads as it stands, without markup or HTML.

    >>> print(shown("<b>*a*</b>"), shown("FacebookAI/roberta-base"))
    \\<b\\>\\*a\\*\\</b\\> FacebookAI/roberta-base
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&:@])", r"\\\1", line)


def is_our_card(path: Path) -> bool:
    """Whether this file is a card that model_card has written."""
    return path.is_file() and TITLE in path.read_text(encoding="utf-8", errors="replace")


def _on_the_hub(name: str) -> bool:
    """Whether the hub could have a model of this name: it refuses a card that names another."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _make_base(model: nn.Module, name: str) -> str:
    """The lines of Python that make the base model."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"base = ...  # the {kind} that was adapted"
    labels = f", num_labels={model.config.num_labels}" if "Classification" in kind else ""
    load = f"{kind}.from_pretrained({name or 'name-of-the-base-model'!r}{labels})"
    return f"from transformers import {kind}\n\nbase = {load}"
