"""A trained model's surviving components as a stock LoRA adapter that any user of PEFT can load."""

import ctypes
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drlora_ref.inject import head_modules, in_head
from drlora_ref.layer import RankOneComponents, bare, dynamic_layers, plain_name
from drlora_ref.plotting import plot_rank_heatmap
from drlora_ref.tuner.card import is_our_card, model_card
from drlora_ref.tuner.fitting import TASK_TYPES, TRAINED_BY_PEFT, check_ends, wrappable
from drlora_ref.tuner.layer import check_settled
from drlora_ref.tuner.model import DynamicRankModel, find_tuner

# In the order in which they are written one by one: what PEFT reads first is last.
FILES = ("README.md", "rank_map.png", "adapter_model.safetensors", "adapter_config.json")


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

    Files: adapter_config.json, adapter_model.safetensors, README.md (the card) and rank_map.png.
    They change as one: who kills the export finds the old set or the new one. Raises, before
    anything is written: ValueError if nothing survives (LoRA has no rank 0), pruning has not ended,
    a number is NaN or infinite, or something was trained that LoRA cannot hold; TypeError for a
    model without components or a metric that is no number; FileExistsError if one of these files is
    there and overwrite is not set.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, overwrite)
    metric = _as_numbers(metric)
    model = bare(model)
    layers, tensors, config = _take_apart(model, adapter_name)
    ranks = {name: layer.rank for name, layer in layers.items()}
    _check(layers, ranks)
    _check_all_held(model)
    r = max(ranks.values())
    for name, layer in layers.items():
        if ranks[name]:
            A, B = fold(layer, pad_to=r if uniform else 0)
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors |= _running_statistics(plain, config.modules_to_save or [])
    _check_finite(tensors)
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    config.r = config.lora_alpha = r
    config.target_modules = _targets(ranks)
    if not uniform:  # a key of rank_pattern is a regular expression; without "^" it may end a name
        kept = {n: rank for n, rank in ranks.items() if 0 < rank < r}
        config.rank_pattern = {"^" + re.escape(n): rank for n, rank in kept.items()}
        config.alpha_pattern = dict(config.rank_pattern)
    card = model_card(plain, config, ranks, task, metric)
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
            modules_to_save=[plain_name(n) for n in given.modules_to_save or []] or None,
            base_model_name_or_path=given.base_model_name_or_path,
        )
        return tuner.adapted_layers(name), head, config
    layers = dynamic_layers(model)
    if not layers:
        raise TypeError(f"{type(model).__name__} has no dynamic-rank components to export")
    kind = type(model).__name__
    task_type = next((t for t, kinds in TASK_TYPES.items() if kind in kinds.values()), None)
    ends = TRAINED_BY_PEFT.get(task_type or "", ())
    heads = [part for head in head_modules(model) for part in wrappable(model, head, ends)]
    check_ends(model, heads)
    head = {
        f"base_model.model.{plain_name(n)}": t
        for n, t in model.state_dict().items()
        if in_head(n, heads)
    }
    loaded_from = getattr(getattr(model, "config", None), "name_or_path", None)
    config = LoraConfig(
        task_type=task_type,
        modules_to_save=[plain_name(n) for n in heads],
        base_model_name_or_path=loaded_from or None,
    )
    return layers, head, config


def _running_statistics(model: nn.Module, whole: list[str]) -> dict[str, Tensor]:
    """The buffers of batch norms outside these modules: a forward pass in training moves them.

    Under their own names PEFT loads them into the base model.
    """
    norms = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {
        f"base_model.model.{name}.{buffer}": tensor
        for name, norm in norms.items()
        if not in_head(name, whole)
        for buffer, tensor in norm.named_buffers(recurse=False)
    }


def _check_all_held(model: nn.Module) -> None:
    """Raise ValueError naming what was trained and is neither in a component nor in the head."""
    peft = isinstance(model, PeftModel)
    heads = [] if peft else head_modules(model)
    held = {id(p) for n, p in model.named_parameters() if in_head(n, heads)}
    for module in model.modules():
        if isinstance(module, RankOneComponents):
            held |= {id(p) for p in (module.lora_A, module.lora_B, module.lora_c)}
        if isinstance(module, ModulesToSaveWrapper):
            held |= {id(p) for p in module.modules_to_save.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in held:
            way = "name its module in modules_to_save" if peft else "freeze it"
            raise ValueError(
                f"{name} was trained too, and a LoRA adapter cannot hold it: {way} before training"
            )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite numbers: training diverged")


def _check(layers: dict[str, RankOneComponents], ranks: dict[str, int]) -> None:
    if not layers:
        raise TypeError("the model has no components (any more): export it before they are merged")
    if not any(ranks.values()):
        raise ValueError(
            f"no component survives in any of {len(ranks)} matrices: a LoRA of rank 0 does not "
            "exist; the base model with the trained head is all there is to save"
        )
    check_settled(layers)


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    there = [name for name in FILES if (folder / name).exists()]
    # The configuration comes last: without it, with our card, an export was interrupted there.
    begun = FILES[-1] not in there and is_our_card(folder / "README.md")
    if there and not begun and not overwrite:
        raise FileExistsError(f"{folder} has {there[0]} already: name another, or overwrite=True")


def _as_numbers(metric: dict[str, Any] | None) -> dict[str, float]:
    """The metrics as numbers of Python's; single ones of numpy and torch are taken as well."""
    given = metric.items() if isinstance(metric, dict) else [("", metric)] if metric else []
    numbers = {
        name: value.item() if math.prod(getattr(value, "shape", [0])) == 1 else value
        for name, value in given
    }
    if not all(name and isinstance(value, int | float) for name, value in numbers.items()):
        raise TypeError(f"metric = {metric!r}: give names with numbers, as {{'accuracy': 0.93}}")
    return numbers


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
    """All files whole in a folder of their own beside it first, then they change places."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder.parent if os.access(folder.parent, os.W_OK) else folder
    with tempfile.TemporaryDirectory(dir=beside, prefix=".unfinished-") as made:
        unfinished = Path(made)
        figure = cast(plt.Figure, plot_rank_heatmap(ranks).figure)  # a whole one, no SubFigure
        figure.savefig(unfinished / "rank_map.png")
        plt.close(figure)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        whole = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_file(whole, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(str(unfinished))
        settings = json.loads((unfinished / "adapter_config.json").read_text())
        if isinstance(settings["target_modules"], list):
            settings["target_modules"].sort()  # PEFT keeps a set, whose order changes by process
        (unfinished / "adapter_config.json").write_text(json.dumps(settings, indent=2))
        _install(unfinished, folder)


def _install(new: Path, folder: Path) -> None:
    """The new files in the place of the old: all at once, or so that no mixture can be loaded."""
    ours_alone = {path.name for path in folder.iterdir()} <= set(FILES)
    here = Path.cwd().is_relative_to(folder)  # this process would be left in the old one
    new.chmod(folder.stat().st_mode)
    if ours_alone and not here and _exchange(new, folder):
        return  # what lies in `new` now is the old set
    (folder / FILES[-1]).unlink(missing_ok=True)  # without it, PEFT finds no adapter
    for name in FILES:
        os.replace(new / name, folder / name)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot (Linux can)."""
    if not hasattr(ctypes.pythonapi, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = here, os.fsencode(one), here, os.fsencode(other)
    return ctypes.pythonapi.renameat2(*paths, exchange) == 0
