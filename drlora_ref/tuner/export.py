"""A trained model's surviving components as a stock LoRA adapter that any user of PEFT can load."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from drlora_ref.inject import head_modules, in_head
from drlora_ref.layer import RankOneComponents, dynamic_layers
from drlora_ref.plotting import plot_rank_heatmap
from drlora_ref.tuner.card import model_card
from drlora_ref.tuner.layer import check_settled
from drlora_ref.tuner.model import DynamicRankModel, find_tuner

# In the order in which they are written: what PEFT reads first is last.
FILES = ("rank_map.png", "README.md", "adapter_model.safetensors", "adapter_config.json")

# PEFT's name for a kind of task, and transformers' models that do it.
TASK_TYPES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def export_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    uniform: bool = False,
    adapter_name: str | None = None,
    base_model: str | None = None,
    task: str | None = None,
    metric: dict[str, float] | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a stock PEFT LoRA adapter with a model card; returns the rank of every matrix.

        ΔW = scaling · Σ cᵢ bᵢaᵢᵀ over surviving i = B A,   A = lora_A[mask],
                                                           B = (scaling · c · lora_B)[:, mask]

    c and scaling fold into B, and lora_alpha = r makes LoRA's own factor 1. Every matrix has the
    rank that it kept (`rank_pattern`), one that lost all has no adapter, and the head comes along.
    PeftModel.from_pretrained(base, folder) then gives the same outputs without this package.

    `model`: a PeftModel with a DynamicRankConfig, or one that inject_adapters made. uniform: fill
    all matrices up to the largest rank with zeros, for servers that ignore rank_pattern.
    adapter_name: of a PeftModel with several. base_model, task and metric ({"accuracy": 0.93}) are
    for the card and, base_model, for PEFT; by default it is the name the model was loaded from.

    To publish, huggingface_hub.upload_folder takes the folder as it is. push_to_hub of the loaded
    PeftModel works as always, with a card of PEFT's own.

    Files, each written whole: adapter_config.json, adapter_model.safetensors, README.md (the card)
    and rank_map.png. Raises, before anything is written: ValueError if nothing survives (LoRA has
    no rank 0), pruning has not ended, or something was trained that LoRA cannot hold; TypeError for
    a model without components or a metric that is no number; FileExistsError if one of these files
    is there and overwrite is not set.
    """
    folder = Path(folder)
    _check_given(folder, metric, overwrite)
    layers, tensors, config = _take_apart(model, adapter_name)
    ranks = {name: layer.rank for name, layer in layers.items()}
    _check(layers, ranks)
    r = max(ranks.values())
    for name, layer in layers.items():
        if ranks[name]:
            A, B = fold(layer, pad_to=r if uniform else 0)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    config.r = config.lora_alpha = r
    config.target_modules = _targets(ranks)
    if not uniform:  # a key of rank_pattern is a regular expression; without "^" it may end a name
        kept = {n: rank for n, rank in ranks.items() if 0 < rank < r}
        config.rank_pattern = {"^" + re.escape(n): rank for n, rank in kept.items()}
        config.alpha_pattern = dict(config.rank_pattern)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    card = model_card(plain, config, ranks, task, metric or {})
    _write(folder, config, tensors, card, ranks)
    return ranks


@torch.no_grad()
def fold(components: RankOneComponents, pad_to: int = 0) -> tuple[Tensor, Tensor]:
    """(A, B) with ΔW = B A of the surviving components: (rank, d_in), (d_out, rank).

    With pad_to, rows and columns of zeros make the rank at least that.

    >>> components = RankOneComponents(4, 6, r=3)
    >>> components.component_mask[1] = False
    >>> A, B = fold(components)
    >>> A.shape, B.shape, bool(torch.allclose(B @ A, components.delta_weight()))
    (torch.Size([2, 4]), torch.Size([6, 2]), True)
    """
    mask = components.component_mask
    A = components.lora_A[mask]
    B = (components.lora_B * (components.scaling * components.lora_c))[:, mask]
    missing = max(pad_to - len(A), 0)
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


def _take_apart(
    model: nn.Module, adapter_name: str | None
) -> tuple[dict[str, RankOneComponents], dict[str, Tensor], LoraConfig]:
    """(components by module name, the head's tensors by PEFT's names, a LoraConfig to fill in)."""
    if isinstance(model, PeftModel):
        tuner = find_tuner(model)
        name = tuner.one_adapter(adapter_name)
        tuner.check_pruned(name)
        saved = get_peft_model_state_dict(model, adapter_name=name)
        head = {n: t for n, t in saved.items() if f".{DynamicRankModel.prefix}" not in n}
        given = tuner.peft_config[name]
        config = LoraConfig(
            task_type=given.task_type,
            modules_to_save=given.modules_to_save,
            base_model_name_or_path=given.base_model_name_or_path,
        )
        return tuner.layers(name), head, config
    layers = dynamic_layers(model)
    if not layers:
        raise TypeError(f"{type(model).__name__} has no dynamic-rank components to export")
    head = {f"base_model.model.{n}": t for n, t in model.state_dict().items() if in_head(n)}
    ours = {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in ours and not in_head(name):
            raise ValueError(f"{name} was trained too, and a LoRA adapter cannot hold it")
    kind = type(model).__name__
    loaded_from = getattr(getattr(model, "config", None), "name_or_path", None)
    config = LoraConfig(
        task_type=next((t for t, kinds in TASK_TYPES.items() if kind in kinds.values()), None),
        modules_to_save=head_modules(model),
        base_model_name_or_path=loaded_from or None,
    )
    return layers, head, config


def _check(layers: dict[str, RankOneComponents], ranks: dict[str, int]) -> None:
    if not layers:
        raise TypeError("the model has no components (any more): export it before they are merged")
    if not any(ranks.values()):
        raise ValueError(
            f"no component survives in any of {len(ranks)} matrices: a LoRA of rank 0 does not "
            "exist; the base model with the trained head is all there is to save"
        )
    check_settled(layers)


def _check_given(folder: Path, metric: dict[str, float] | None, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder} has {there[0]} already: name another, or overwrite=True")
    numbers = metric.values() if isinstance(metric, dict) else ["no dictionary"]
    if metric is not None and not all(isinstance(value, int | float) for value in numbers):
        raise TypeError(f"metric = {metric!r}: give names with numbers, as {{'accuracy': 0.93}}")


def _targets(ranks: dict[str, int]) -> list[str] | str:
    """Names of the matrices that have a rank, or a regular expression for exactly those.

    PEFT takes a name in a list for the end of a longer one, too.
    """
    kept = sorted(name for name, rank in ranks.items() if rank)
    emptied = [name for name, rank in ranks.items() if not rank]
    if any(other.endswith("." + name) for other in emptied for name in kept):
        return "(?:" + "|".join(map(re.escape, kept)) + ")"
    return kept


def _write(
    folder: Path,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    card: str,
    ranks: dict[str, int],
) -> None:
    """All files whole in a folder of their own first, then each moved in."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as made:
        unfinished = Path(made)
        figure = cast(plt.Figure, plot_rank_heatmap(ranks).figure)  # a whole one, no SubFigure
        figure.savefig(unfinished / "rank_map.png")
        plt.close(figure)
        (unfinished / "README.md").write_text(card)
        whole = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_file(whole, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(str(unfinished))
        settings = json.loads((unfinished / "adapter_config.json").read_text())
        if isinstance(settings["target_modules"], list):
            settings["target_modules"].sort()  # PEFT keeps a set, whose order changes by process
        (unfinished / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        for name in FILES:
            os.replace(unfinished / name, folder / name)
