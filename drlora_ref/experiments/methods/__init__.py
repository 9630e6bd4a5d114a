"""What each method of the paper's tables does to a model before training, one short function each.

Every method trains the head, since it is new. To add a method, write its function and its entry in
METHODS; a parameter of its own is a keyword argument here and a field of run/settings.py.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.experiments.given import check_name
from drlora_ref.experiments.methods.adalora import AdaLoRAAllocator, check_prunes
from drlora_ref.experiments.methods.bottleneck import insert_adapters
from drlora_ref.experiments.methods.prune_once import OneCut
from drlora_ref.experiments.methods.rank_maps import lora_ranks
from drlora_ref.inject import (
    count_parameters,
    default_target_modules,
    find_targets,
    head_modules,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.regularizer import penalty_function, penalty_loss
from drlora_ref.schedule import BudgetSchedule


class Allocator(Protocol):
    """What changes a model's ranks while it trains."""

    def step(self, global_step: int) -> None:
        """After optimizer step number global_step."""

    def rank_pattern(self) -> dict[str, int]:
        """Surviving components of each matrix, by its name in the model that was given."""

    def state_dict(self) -> dict:
        """All that decides the next step."""

    def load_state_dict(self, state: dict) -> None:
        """Go on where state_dict() was taken."""


class Prepared(NamedTuple):
    """A model ready to train, and what its method asks of the training loop.

    allocator: None, or its `step(t)` is to be called after the t-th optimizer step and before the
    gradients are cleared (AdaLoRA reads them).
    loss_term: None, or a function of the step's number t (from 1) that gives what belongs into that
    step's loss, once however many batches are accumulated; or None where that is nothing.
    without_rank: matrices that a rank map leaves as they are; the model does not show them.
    count_adapter: None, or a function that counts the adapter's surviving parameters, where the
    model's own tensors do not show which survive.
    """

    model: nn.Module
    allocator: Allocator | None = None
    loss_term: Callable[[int], Tensor | None] | None = None
    without_rank: tuple[str, ...] = ()
    count_adapter: Callable[[], int] | None = None


@dataclass(frozen=True)
class Method:
    """One method: how it prepares a model, and what the other rooms need to know of it.

    prepare(model, schedule, *, ...): makes the model ready, in place. Its keyword arguments are
    parameters of a run (run/settings.py), by their names there; it is given these and no others.
    budget: the parameters that its schedule is made of. A method that has init_r among them prunes.
    replicable: all that it trains is rank-1 components and the head, so that many runs can share
    one encoder; and the loop of train.py is enough for it.
    check(schedule): raises ValueError for a budget that the method cannot have.
    """

    prepare: Callable[..., Prepared]
    budget: tuple[str, ...] = ()
    replicable: bool = False
    check: Callable[[BudgetSchedule], None] = lambda schedule: None

    @property
    def prunes(self) -> bool:
        """Whether it starts from init_r and ends at target_r."""
        return "init_r" in self.budget

    @property
    def parameters(self) -> set[str]:
        """The parameters of a run that concern this method and not every other one.

        >>> sorted(METHODS["lora"].parameters)
        ['lora_alpha', 'lora_dropout', 'permute_map', 'rank_map', 'target_r']
        """
        return {*self.budget, *self.own}

    @property
    def own(self) -> list[str]:
        """The names that `prepare` takes."""
        arguments = inspect.signature(self.prepare).parameters.values()
        return [a.name for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY]


def drlora(
    model: nn.Module,
    schedule: BudgetSchedule,
    *,
    lora_alpha: float = 8,
    lora_dropout: float = 0.1,
    dem_weight: float = 0.0,
    penalty: str = "dem",
    beta: float = 0.9,
    score: str = "frobenius_share",
    uniform: bool = False,
    seed: int = 0,
) -> Prepared:
    """Dynamic-rank DoRA: init_r components in every matrix, an allocator that prunes, and DEM.

    `penalty` names what takes DEM's place, under the same weight. With `uniform` as many are
    removed, evenly over all matrices: the method without its distribution. Raises ValueError for a
    negative dem_weight or an unknown penalty, and as inject_adapters and RankAllocator do.
    """
    if dem_weight < 0:
        raise ValueError(f"dem_weight = {dem_weight}: must be 0 (no DEM) or more")
    of_layer = penalty_function(penalty)
    inject_adapters(model, r=schedule.init_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    mark_only_adapters_trainable(model)

    def term(step: int) -> Tensor | None:
        return None if schedule.pruning_ended(step) else dem_weight * penalty_loss(model, of_layer)

    allocator = RankAllocator(model, schedule, beta, score, seed, uniform=uniform)
    return Prepared(model, allocator, term if dem_weight else None)


def lora(
    model: nn.Module,
    schedule: BudgetSchedule,
    *,
    lora_alpha: float = 8,
    lora_dropout: float = 0.1,
    rank_map: Mapping[str, int] | None = None,
    permute_map: int = 0,
) -> Prepared:
    """LoRA (2106.09685) by PEFT: target_r in every matrix, the same matrices, head and dropout.

    With a rank_map each matrix has its own rank; permute_map is the seed by which matrices of one
    shape swap theirs, 0 for none. Raises ValueError as rank_maps.lora_ranks does.
    """
    if rank_map is None:
        ranks = dict(r=schedule.target_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        return Prepared(_with_peft(model, LoraConfig, **ranks))
    given = lora_ranks(model, rank_map, permute_map, schedule.target_r, lora_alpha)
    without = tuple(name for name in rank_map if name not in given["target_modules"])
    adapted = _with_peft(model, LoraConfig, lora_dropout=lora_dropout, **given)
    return Prepared(adapted, without_rank=without)


def prune_once(
    model: nn.Module, schedule: BudgetSchedule, *, lora_alpha: float = 8, lora_dropout: float = 0.1
) -> Prepared:
    """LoRA by PEFT with init_r in every matrix, cut at t_end to target_r on average: see OneCut."""
    ranks = dict(r=schedule.init_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    adapted = _with_peft(model, LoraConfig, **ranks)
    allocator = OneCut(adapted, schedule)
    return Prepared(adapted, allocator, count_adapter=allocator.count_parameters)


def dora_wd(
    model: nn.Module, schedule: BudgetSchedule, *, lora_alpha: float = 8, lora_dropout: float = 0.1
) -> Prepared:
    """NVIDIA's *weight-decomposed* DoRA (2402.09353) by PEFT: LoRA and a magnitude per output.

    Not the method of this package, which only shares the name (notebook 13).
    """
    ranks = dict(r=schedule.target_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    return Prepared(_with_peft(model, LoraConfig, use_dora=True, **ranks))


def adalora(
    model: nn.Module, schedule: BudgetSchedule, *, lora_alpha: float = 8, lora_dropout: float = 0.1
) -> Prepared:
    """AdaLoRA (2303.10512) by PEFT: init_r components in every matrix, pruned by sensitivity.

    Choice: β₁ = β₂ = 0.85 and weight 0.5 of the orthogonality term, as PEFT sets them; the paper
    does not say. The term is a loss term of its own here: the model's loss is the task's alone.
    Raises ValueError where target_r is init_r.
    """
    check_prunes(schedule)
    names = ("init_r", "target_r", "tinit", "tfinal", "deltaT")
    peft_model = _with_peft(
        model,
        AdaLoraConfig,
        total_step=schedule.total_steps,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        **{name: getattr(schedule, name) for name in names},
    )
    allocator = AdaLoRAAllocator(peft_model, schedule)
    return Prepared(
        peft_model,
        allocator,
        lambda step: allocator.penalty(),
        count_adapter=allocator.count_parameters,
    )


def h_adapter(model: nn.Module, schedule: BudgetSchedule, *, bottleneck: int = 8) -> Prepared:
    """Houlsby's adapters (1902.00751): after self-attention and after feed-forward."""
    return Prepared(
        insert_adapters(mark_only_adapters_trainable(model), bottleneck, after_attention=True)
    )


def p_adapter(model: nn.Module, schedule: BudgetSchedule, *, bottleneck: int = 8) -> Prepared:
    """Pfeiffer's adapters (2005.00247): after feed-forward only."""
    return Prepared(
        insert_adapters(mark_only_adapters_trainable(model), bottleneck, after_attention=False)
    )


def bitfit(model: nn.Module, schedule: BudgetSchedule) -> Prepared:
    """BitFit (2106.10199): every bias of the encoder, layer norms included.

    Raises ValueError for a model without one (Llama).
    """
    mark_only_adapters_trainable(model)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise ValueError(f"bitfit trains biases, and {type(model).__name__} has none")
    for bias in biases:
        bias.requires_grad_(True)
    return Prepared(model)


def full(model: nn.Module, schedule: BudgetSchedule) -> Prepared:
    """Full fine-tuning: everything trains."""
    return Prepared(model.requires_grad_(True))


METHODS = {
    "drlora": Method(drlora, ("init_r", "target_r", "deltaT", "curve"), replicable=True),
    "lora": Method(lora, ("target_r",), replicable=True),
    "adalora": Method(adalora, ("init_r", "target_r", "deltaT"), check=check_prunes),
    "h-adapter": Method(h_adapter),
    "p-adapter": Method(p_adapter),
    "bitfit": Method(bitfit),
    "full": Method(full),
    "dora-wd": Method(dora_wd, ("target_r",)),
    "prune-once": Method(prune_once, ("init_r", "target_r")),
}


def prepare(method: str, model: nn.Module, schedule: BudgetSchedule, **given: Any) -> Prepared:
    """Make `model` ready for one of METHODS, in place; it takes those of `given` that concern it.

    New weights come from torch's generator: call torch.manual_seed first. Raises ValueError for an
    unknown method, a parameter that no method has or that is out of range, and a kind of model
    without target modules.
    """
    check_method(method)
    known = {name for one in METHODS.values() for name in one.own}
    for name in given:
        check_name("parameter of a method", name, sorted(known))
    chosen = METHODS[method]
    if "target_r" in chosen.budget:
        _check_rank(model, schedule.init_r)
    return chosen.prepare(model, schedule, **{k: given[k] for k in chosen.own if k in given})


def _check_rank(model: nn.Module, r: int) -> None:
    # More components than that are not linearly independent, and may not fit into memory.
    for name, matrix in find_targets(model, default_target_modules(model)).items():
        if r > (most := min(matrix.weight.shape)):
            raise ValueError(f"rank {r}: {name} can have {most} at most, its smaller side")


def check_method(method: str) -> None:
    """Raise ValueError, naming the methods there are, if this is none of them.

    >>> check_method("lora")
    """
    check_name("method", method, METHODS)


def rank_pattern(prepared: Prepared) -> dict[str, int]:
    """Components of each matrix now, by its name in the model that was given; {} without ranks.

    In the model's order, the matrices without rank among the others.
    """
    if prepared.allocator:
        return prepared.allocator.rank_pattern()
    named = prepared.model.named_modules()
    modules = {name.removeprefix("base_model.model."): module for name, module in named}
    return {
        name: module.r["default"] if isinstance(module, LoraLayer) else 0
        for name, module in modules.items()
        if isinstance(module, LoraLayer) or name in prepared.without_rank
    }


def count_trainable(prepared: Prepared) -> dict[str, int]:
    """{"adapter": ..., "head": ...} as count_parameters, of PEFT's components too the survivors.

    With full fine-tuning "adapter" is the encoder.
    """
    counts = count_parameters(prepared.model)
    if prepared.count_adapter:
        counts["adapter"] = prepared.count_adapter()
    return counts


def _with_peft(model: nn.Module, config_class: type[LoraConfig], **given: Any) -> PeftModel:
    given = {"target_modules": default_target_modules(model)} | given
    config = config_class(modules_to_save=head_modules(model), **given)
    with warnings.catch_warnings():
        # PEFT asks a question of transformers by its old name; the answer is the right one.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)
