"""Before an adapter goes into a model: what is asked of both, and how the model is put back."""

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.models.auto import modeling_auto

from drlora_ref.inject import head_modules, in_head, new_modules
from drlora_ref.tuner.config import DynamicRankConfig
from drlora_ref.tuner.layer import in_4_bits

# PEFT's name for a kind of task, and transformers' models that do it.
TASK_TYPES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# It has none for multiple choice.
MULTIPLE_CHOICE = set(modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())

# The ends of names that PEFT trains whole of itself, once the adapter is in.
TRAINED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Parts of the names that an adapter's tensors have.
OUR_WORDS = set(
    "base_model model base_layer dynamic_rank_components dynamic_rank_state lora_A lora_B lora_c "
    "lora_dropout component_mask ema last_step settings generator original_module modules_to_save"
    .split()
)  # fmt: skip


def whole_modules(model: nn.Module, config: DynamicRankConfig) -> list[str]:
    """Full names of what is trained whole beside the components: the head, and modules_to_save.

    PEFT takes a name for the end of longer ones, and wraps a module inside another that is wrapped
    as well: it would be trained and never used. So here of two nested modules stands the outer one.
    Raises ValueError for a name of the user's that no module has, and where PEFT would take one of
    these names for the end of another module's, or would wrap one of the user's inside another all
    the same.
    """
    ends = TRAINED_BY_PEFT.get(config.task_type or "", ())
    heads = head_modules(model)
    if not ends and type(model).__name__ not in MULTIPLE_CHOICE:
        heads = [h for h in heads if any(in_head(name, [h]) for name in new_modules(model))]
    found = {part for head in heads for part in wrappable(model, head, ends)}
    named = [name for name, _ in model.named_modules()]
    wanted = tuple(config.modules_to_save or ())
    added = TRAINED_BY_PEFT.values()  # PEFT adds these itself, for whatever model
    for name in set(wanted).difference(*added):
        if not any(n.endswith(name) for n in named):
            raise ValueError(f"modules_to_save: no module has a name that ends with {name!r}")
    found |= {n for n in named if n.endswith(wanted)}
    whole = [n for n in named if n in found and not in_head(n.rpartition(".")[0], found)]
    check_ends(model, whole)
    for outer in whole:  # PEFT has the user's own names, too
        for inner, _ in model.get_submodule(outer).named_modules():
            if inner.endswith(wanted):
                raise ValueError(
                    f"modules_to_save: {outer}.{inner} has a name that PEFT would take for one of "
                    f"them inside {outer}, which is saved whole already: give longer names"
                )
    return whole


def wrappable(model: nn.Module, name: str, ends: tuple[str, ...]) -> list[str]:
    """The module, or its parts where PEFT will wrap one inside it because of how its name ends."""
    module = model.get_submodule(name)
    if not any(inside.endswith(ends) for inside, _ in module.named_modules() if inside):
        return [name] if any(True for _ in module.parameters()) else []
    return [p for c, _ in module.named_children() for p in wrappable(model, f"{name}.{c}", ends)]


def check_ends(model: nn.Module, whole: list[str]) -> None:
    """Raise ValueError if PEFT would take one of these names for the end of another module's."""
    for name, _ in model.named_modules():
        if name.endswith(tuple(whole)) and not in_head(name, whole):
            raise ValueError(
                f"modules_to_save = {', '.join(whole)}: PEFT takes these for ends of names, and "
                f"would train {name} whole, too. Rename the module of the head"
            )


def check_name(model: nn.Module, adapter_name: str, whole: list[str]) -> None:
    """Raise ValueError for a name by which PEFT could not tell the adapter's tensors apart."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter name {adapter_name!r}: it must not be empty or have a dot in it")
    words = {word for name, _ in model.named_parameters() for word in name.split(".")}
    heads = {end for ends in TRAINED_BY_PEFT.values() for end in ends}.union(whole)
    if adapter_name in words | OUR_WORDS or adapter_name.endswith(tuple(heads)):
        raise ValueError(
            f"adapter name {adapter_name!r}: PEFT would take it for a part of the model, or of its "
            "head, whose names have that word; take another"
        )


def check_task(model: nn.Module, task_type: str | None) -> None:
    """Raise ValueError for a task type that is not the model's: PEFT finds out when it is late."""
    generates = hasattr(model, "prepare_inputs_for_generation")
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not generates:
        raise ValueError(
            f"task_type = {task_type!r} is for models that generate, and {type(model).__name__} "
            "does not: leave it out, or give the one of its head"
        )


def check_quantised(model: nn.Module) -> None:
    """Raise TypeError for a model with quantised weights, unless they are 4-bit ones on a GPU.

    A GGUF file that was loaded unpacked is not quantised any more, whatever the model is marked as.
    """
    if not getattr(model, "is_quantized", False):
        return
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = [module for module in linear if in_4_bits(module)]
    if places := {layer.weight.device.type for layer in layers} - {"cuda"}:
        raise TypeError(
            f"4-bit weights are adapted on a GPU only, and these are on {', '.join(places)}: load "
            "the model in float32 or bfloat16"
        )
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    unpacked = method == "gguf" and all(p.is_floating_point() for p in model.parameters())
    if not layers and not unpacked:
        raise TypeError(
            "quantised models cannot be adapted, but for 4 bits by bitsandbytes on a GPU: load it "
            "in float32 or bfloat16"
        )


class Before:
    """A model's modules and what in it is trained, to be put back if an adapter does not go in."""

    def __init__(self, model: nn.Module, adapter_name: str):
        self.adapter_name = adapter_name
        self.children = [(module, dict(module._modules)) for module in model.modules()]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
            if isinstance(module, AuxiliaryTrainingWrapper):
                module._adapters.discard(self.adapter_name)
        for parameter, trained in self.trained:
            parameter.requires_grad_(trained)
