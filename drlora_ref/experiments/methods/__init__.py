"""What each method of the paper's tables does to a model before training, one short function each.

Every method trains the head (inject.HEADS), since it is new. BudgetSchedule goes to all of them:
those that prune nothing take its target_r, or nothing at all.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.experiments.given import check_name
from drlora_ref.experiments.methods.adalora import AdaLoRAAllocator
from drlora_ref.experiments.methods.bottleneck import insert_adapters
from drlora_ref.inject import (
    count_parameters,
    default_target_modules,
    head_modules,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.regularizer import dem_loss
from drlora_ref.schedule import BudgetSchedule


class Prepared(NamedTuple):
    """A model ready to train, and what its method asks of the training loop.

    allocator: None, or its `step(t)` is to be called after the t-th optimizer step and before the
    gradients are cleared (AdaLoRA reads them). It has state_dict and load_state_dict.
    loss_term: None, or a function of the step's number t (from 1) that gives what belongs into that
    step's loss, once however many batches are accumulated; or None where that is nothing.
    """

    model: nn.Module
    allocator: RankAllocator | AdaLoRAAllocator | None = None
    loss_term: Callable[[int], Tensor | None] | None = None


def drlora(
    model, schedule, *, lora_alpha, lora_dropout, dem_weight, beta, score, seed, **_
) -> Prepared:
    """Dynamic-rank DoRA: init_r components in every matrix, an allocator that prunes, and DEM."""
    if dem_weight < 0:
        raise ValueError(f"dem_weight = {dem_weight}: must be 0 (no DEM) or more")
    inject_adapters(model, r=schedule.init_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    mark_only_adapters_trainable(model)

    def dem(step: int) -> Tensor | None:
        return None if schedule.pruning_ended(step) else dem_weight * dem_loss(model)

    allocator = RankAllocator(model, schedule, beta=beta, score=score, seed=seed)
    return Prepared(model, allocator, dem if dem_weight else None)


def lora(model, schedule, *, lora_alpha, lora_dropout, **_) -> Prepared:
    """LoRA (2106.09685) by PEFT: target_r in every matrix, the same matrices, head and dropout."""
    ranks = dict(r=schedule.target_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    return Prepared(_with_peft(model, LoraConfig, **ranks))


def dora_wd(model, schedule, *, lora_alpha, lora_dropout, **_) -> Prepared:
    """NVIDIA's *weight-decomposed* DoRA (2402.09353) by PEFT: LoRA and a magnitude per output.

    Not the method of this package, which only shares the name (notebook 13).
    """
    ranks = dict(r=schedule.target_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    return Prepared(_with_peft(model, LoraConfig, use_dora=True, **ranks))


def adalora(model, schedule, *, lora_alpha, lora_dropout, **_) -> Prepared:
    """AdaLoRA (2303.10512) by PEFT: init_r components in every matrix, pruned by sensitivity.

    Choice: β₁ = β₂ = 0.85 and weight 0.5 of the orthogonality term, as PEFT sets them; the paper
    does not say. The term is a loss term of its own here: the model's loss is the task's alone.
    Raises ValueError where target_r is init_r: PEFT fails if nothing is to be pruned.
    """
    if schedule.target_r == schedule.init_r:
        raise ValueError(f"adalora: init_r must be above target_r = {schedule.target_r}")
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT")
    model = _with_peft(
        model,
        AdaLoraConfig,
        total_step=schedule.total_steps,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        **{name: getattr(schedule, name) for name in names},
    )
    allocator = AdaLoRAAllocator(model, schedule)
    return Prepared(model, allocator, lambda step: allocator.penalty())


def h_adapter(model, schedule, *, bottleneck, **_) -> Prepared:
    """Houlsby's adapters (1902.00751): after self-attention and after feed-forward."""
    return Prepared(
        insert_adapters(mark_only_adapters_trainable(model), bottleneck, after_attention=True)
    )


def p_adapter(model, schedule, *, bottleneck, **_) -> Prepared:
    """Pfeiffer's adapters (2005.00247): after feed-forward only."""
    return Prepared(
        insert_adapters(mark_only_adapters_trainable(model), bottleneck, after_attention=False)
    )


def bitfit(model, schedule, **_) -> Prepared:
    """BitFit (2106.10199): every bias of the encoder, layer norms included."""
    for name, parameter in mark_only_adapters_trainable(model).named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return Prepared(model)


def full(model, schedule, **_) -> Prepared:
    """Full fine-tuning: everything trains."""
    return Prepared(model.requires_grad_(True))


METHODS = {
    "drlora": drlora,
    "lora": lora,
    "adalora": adalora,
    "h-adapter": h_adapter,
    "p-adapter": p_adapter,
    "bitfit": bitfit,
    "full": full,
    "dora-wd": dora_wd,
}


def prepare(
    method: str,
    model: nn.Module,
    schedule: BudgetSchedule,
    *,
    lora_alpha: float = 8,
    lora_dropout: float = 0.1,
    bottleneck: int = 8,
    dem_weight: float = 0.0,
    beta: float = 0.9,
    score: str = "frobenius_share",
    seed: int = 0,
) -> Prepared:
    """Make `model` ready for one of METHODS, in place; each takes the settings that concern it.

    `bottleneck` is the width of the adapters; dem_weight, beta, score and seed are drlora's alone.
    New weights come from torch's generator: call torch.manual_seed first. Raises ValueError for an
    unknown method, a kind of model without target modules, or a setting out of range.
    """
    check_method(method)
    return METHODS[method](
        model,
        schedule,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bottleneck=bottleneck,
        dem_weight=dem_weight,
        beta=beta,
        score=score,
        seed=seed,
    )


def check_method(method: str) -> None:
    """Raise ValueError, with the nearest method and all of them, if this is none.

    >>> check_method("lora")
    """
    check_name("method", method, METHODS)


def rank_pattern(prepared: Prepared) -> dict[str, int]:
    """Components of each matrix now, by its name in the model that was given; {} without ranks."""
    if prepared.allocator:
        return prepared.allocator.rank_pattern()
    return {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in prepared.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def count_trainable(prepared: Prepared) -> dict[str, int]:
    """{"adapter": ..., "head": ...} as count_parameters, of AdaLoRA's components too the survivors.

    With full fine-tuning "adapter" is the encoder.
    """
    counts = count_parameters(prepared.model)
    if isinstance(prepared.allocator, AdaLoRAAllocator):
        counts["adapter"] = prepared.allocator.count_parameters()
    return counts


def _with_peft(model: nn.Module, config_class: type[LoraConfig], **given) -> PeftModel:
    config = config_class(
        target_modules=default_target_modules(model), modules_to_save=head_modules(model), **given
    )
    with warnings.catch_warnings():
        # PEFT asks a question of transformers by its old name; the answer is the right one.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)
