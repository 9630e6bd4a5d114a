"""What each method does to a model before training, one short function each."""

from peft import LoraConfig, get_peft_model
from torch import nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.inject import (
    HEADS,
    default_target_modules,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.schedule import BudgetSchedule


def drlora(model, schedule: BudgetSchedule, lora_alpha: float, **allocation):
    """Dynamic-rank DoRA: init_r components in every layer and an allocator that takes them away."""
    inject_adapters(model, r=schedule.init_r, lora_alpha=lora_alpha)
    mark_only_adapters_trainable(model)
    return model, RankAllocator(model, schedule, **allocation)


def lora(model, schedule: BudgetSchedule, lora_alpha: float, **allocation):
    """LoRA by PEFT, target_r components in every layer: the same matrices, head and dropout."""
    heads = sorted(HEADS & {name.split(".")[-1] for name, _ in model.named_modules()})
    config = LoraConfig(
        r=schedule.target_r,
        lora_alpha=lora_alpha,
        lora_dropout=0.1,
        target_modules=default_target_modules(model),
        modules_to_save=heads,
    )
    return get_peft_model(model, config), None


METHODS = {"drlora": drlora, "lora": lora}


def prepare(
    method: str, model: nn.Module, schedule: BudgetSchedule, lora_alpha: float, **allocation
):
    """(model ready to train, its allocator or None); `allocation` is beta, score and seed.

    Raises ValueError for an unknown method, and as inject_adapters and RankAllocator do.
    """
    check_method(method)
    return METHODS[method](model, schedule, lora_alpha, **allocation)


def check_method(method: str) -> None:
    """Raise ValueError, naming the methods there are, if this is none of them.

    >>> check_method("lora")
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: must be one of {', '.join(METHODS)}")


def peft_rank_pattern(model: nn.Module) -> dict[str, int]:
    """Rank of each matrix that PEFT adapted, by the module's name in the model that was given."""
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and isinstance(getattr(module, "r", None), dict)
    }
