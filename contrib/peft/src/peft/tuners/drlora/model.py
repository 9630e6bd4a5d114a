# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The tuner."""

import copy
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from .allocator import AllocatorState, RankAllocator, check_dem, check_settled, dem_loss, warn_unfinished
from .config import BudgetSchedule, DrLoraConfig
from .layer import DrLoraLinear, RankOneComponents, bare, dynamic_layers, in_4_bits, plain_name
from .precision import train_in_float32


class BaseModel(NamedTuple):
    """What the package knows of one kind of transformer; a new kind is a new entry in BASE_MODELS.

    matrices: what is adapted in each layer, {end of the module's dotted name: the label of the
    paper's Figure 2; Wg for the gate of a feed-forward part that has one, which the paper's models
    have not}. cross_attention: the same for a decoder's, adapted only if asked for. causal: each
    token sees those before it only (a decoder without an encoder).
    """

    matrices: dict[str, str]
    cross_attention: dict[str, str] = {}  # noqa: RUF012 (never changed)
    causal: bool = False


_BERT = {
    "query": "Wq",
    "key": "Wk",
    "value": "Wv",
    "attention.output.dense": "Wo",
    "intermediate.dense": "Wf1",
    "output.dense": "Wf2",
}

_MPNET = {f"attn.{p}": f"W{p}" for p in "qkvo"} | {
    "intermediate.dense": "Wf1",
    "output.dense": "Wf2",
}

_PROJECTIONS = {"q_proj": "Wq", "k_proj": "Wk", "v_proj": "Wv", "out_proj": "Wo"}

# Several query heads may share one of key and value (grouped queries): Wk, Wv are then smaller.
_LLAMA = {f"self_attn.{p}_proj": f"W{p}" for p in "qkvo"} | {
    "mlp.gate_proj": "Wg",
    "mlp.up_proj": "Wf1",
    "mlp.down_proj": "Wf2",
}

BASE_MODELS = {
    "roberta": BaseModel(_BERT),
    "bert": BaseModel(_BERT),
    "mpnet": BaseModel(_MPNET),
    "bart": BaseModel(
        {f"self_attn.{p}": label for p, label in _PROJECTIONS.items()} | {"fc1": "Wf1", "fc2": "Wf2"},
        {f"encoder_attn.{p}": f"{label} cross" for p, label in _PROJECTIONS.items()},
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), BaseModel(_LLAMA, causal=True)),
}


def in_head(name: str, modules: list[str]) -> bool:
    """Whether a module or parameter is one of these modules, or inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def check_target(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise an error naming a module of the model that cannot be adapted.

    TypeError for what is no nn.Linear, or has a quantised weight; ValueError for a weight that is
    another module's too.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        raise TypeError(f"target_modules: {name} is {kind}; only nn.Linear can be adapted")
    if not module.weight.is_floating_point():
        raise TypeError(
            f"target_modules: {name} is {kind} with a weight of {module.weight.dtype}; quantised "
            "layers cannot be adapted, load the model in float32 or bfloat16"
        )
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is module.weight and not in_head(other, [name]):
            raise ValueError(
                f"target_modules: {name} has its weight in common with {other}: merged, the update "
                "would change both; leave it out, or load the model with tie_word_embeddings=False"
            )


# The ends of names that PEFT trains whole of itself, once the adapter is in.
TRAINED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Parts of the names that an adapter's tensors have.
OUR_WORDS = set(
    "base_model model base_layer drlora_components drlora_state lora_A lora_B lora_c "
    "lora_dropout component_mask ema last_step settings generator original_module modules_to_save"
    .split()
)  # fmt: skip


def whole_modules(model: nn.Module, config: DrLoraConfig) -> list[str]:
    """Names of what is trained whole beside the components; PEFT adds the head of the task by itself."""
    return list(config.modules_to_save or [])


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


class DrLoraModel(BaseTuner):
    """
    Creates a dynamic-rank DoRA model from a pretrained model. The method is described in
    https://huggingface.co/papers/2405.17357. It is not the weight-decomposed DoRA (`LoraConfig(use_dora=True)`), which
    has the same name.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        peft_config ([`DrLoraConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The model with adapters.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import DrLoraConfig, get_peft_model

        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> config = DrLoraConfig(init_r=12, target_r=8, total_step=1000, task_type="CAUSAL_LM")
        >>> model = get_peft_model(model, config)
        >>> for step, batch in enumerate(batches, start=1):
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     model.base_model.update_and_allocate(step)
        ...     optimizer.zero_grad()
        ```

    **Attributes**:
        - **model** ([`torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`DrLoraConfig`]) -- The configuration of the adapter.

    Merging goes by the mask of the components that are left, the forward pass by their scalars. The two agree once
    pruning has ended; merging before that raises a `ValueError`.
    """

    prefix = "drlora_"
    tuner_layer_cls = DrLoraLinear
    target_module_mapping: dict = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | {
        kind: list(known.matrices) for kind, known in BASE_MODELS.items()
    }
    uses_shared_state = True  # AllocatorState is here: a model without this wrapper cannot train
    peft_config: dict[str, DrLoraConfig]  # type: ignore[assignment]  # the base has any kind

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, *args, **kwargs):
        if bare(model) is not model:
            raise ValueError(
                f"the model is wrapped in {type(model).__name__}: adapt it first, and wrap what get_peft_model returns"
            )
        adapted = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        if adapted := adapted or list(dynamic_layers(model)):
            raise ValueError(
                f"the model has adapters already, in {adapted[0]} and elsewhere: take a fresh one, "
                "or merge them first. A second adapter of this kind: PeftModel.add_adapter"
            )
        check_quantised(model)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        # PEFT writes what it finds into the configuration, and the user's may serve again.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        check_task(model, config.task_type)
        if not config.from_file:
            config.modules_to_save = whole_modules(model, config) or None
        check_name(model, adapter_name, config.modules_to_save or [])
        before = Before(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = self.adapted_layers(adapter_name)
            if config.dem_weight:
                check_dem(layers)
            adapted = [m for m in model.modules() if isinstance(m, DrLoraLinear)]
            ours = [m for m in adapted if adapter_name in m.drlora_components]
            where = {m.base_layer.weight.device for m in ours}
            if len(where) > 1:
                named = ", ".join(sorted(map(str, where)))
                raise ValueError(f"the model is on {named}: scores need one device")
        except BaseException:
            before.restore()
            raise
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                train_in_float32(module.modules_to_save[adapter_name])
        if not hasattr(self, "drlora_state"):
            self.drlora_state = nn.ModuleDict()
        state = AllocatorState(layers, config, *where)
        self.drlora_state[adapter_name] = state
        if state.watch:  # PEFT calls the tuner or the model inside it, by the kind of task
            state.watch.follow(self)
            state.watch.follow(model)

    def _create_and_replace(
        self,
        peft_config,
        adapter_name,
        target,
        target_name,
        parent,
        current_key,
        parameter_name=None,
        **_,
    ) -> None:
        if isinstance(target, DrLoraLinear):
            return target.add(adapter_name, peft_config)
        if not in_4_bits(target):
            check_target(current_key, target, self.model)
        adapted = DrLoraLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted.train(target.training), target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # Components are made where the base weight is. PEFT's version also copies `weight`, which
        # a head of several layers (RoBERTa's) does not have, and fails in merge_and_unload.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        if watch := self.memory(adapter_name).watch:
            watch.stop()
        super().delete_adapter(adapter_name)
        del self.drlora_state[adapter_name]

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        here = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name, tensor in loaded.items():
            if cls.prefix in name and tensor.shape != here.get(name, tensor.shape):
                raise ValueError(
                    f"the checkpoint is of other ranks or targets: {name} is {tuple(tensor.shape)} "
                    f"there and {tuple(here[name])} here, with init_r = {config.init_r}"
                )
            if config.inference_mode and name.endswith(f".{adapter_name}.last_step"):
                warn_unfinished(config, int(tensor))
        return loaded

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return super()._remove_adapter_name_from_key(plain_name(key), adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ):
        if merge:
            self._check_merge(adapter_names)
        watches = [self.memory(name).watch for name in self.peft_config]
        left = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for watch in watches:
            if watch:
                watch.stop()
        return left

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for name in adapter_names or self.active_adapters:
            self.check_pruned(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        if adapter_names is not None:  # PEFT would go on, with the active adapter for all rows
            raise ValueError("adapter_names: one batch cannot mix adapters of this kind")
        yield

    def one_adapter(self, adapter_name: str | None = None) -> str:
        """The name given, or the one active adapter's.

        Raises ValueError if several are active, or there is none of that name.
        """
        if adapter_name is not None and adapter_name not in self.peft_config:
            raise ValueError(f"no adapter {adapter_name!r}, only {', '.join(self.peft_config)}")
        if adapter_name is None and len(self.active_adapters) != 1:
            raise ValueError(f"{len(self.active_adapters)} adapters are active: name one of them")
        return adapter_name or self.active_adapters[0]

    def adapted_layers(self, adapter_name: str | None = None) -> dict[str, RankOneComponents]:
        """The components of each adapted matrix, by its name in the model that was given."""
        name = self.one_adapter(adapter_name)
        return {
            plain_name(module_name): module.components(name)
            for module_name, module in self.model.named_modules()
            if isinstance(module, DrLoraLinear) and name in module.drlora_components
        }

    def memory(self, adapter_name: str | None = None) -> AllocatorState:
        """What is saved of the adapter's allocator: its buffers."""
        return cast(AllocatorState, self.drlora_state[self.one_adapter(adapter_name)])

    def schedule(self, adapter_name: str | None = None) -> BudgetSchedule:
        """The adapter's budget (Eq. 9). Raises ValueError while total_step is None."""
        return self.peft_config[self.one_adapter(adapter_name)].schedule()

    def dem_loss(self, adapter_name: str | None = None, by: str = "a loss of your own") -> Tensor:
        """R of Eq. 10 over the adapter's components, a scalar with gradient.

        `by` is who adds it to the loss: a step in which two do is an error.
        """
        penalty = dem_loss(self.allocator(adapter_name).layers)
        return self.memory(adapter_name).count_dem(penalty, by)

    def allocator(self, adapter_name: str | None = None) -> RankAllocator:
        """The adapter's RankAllocator, as it stands; made at the first call and after a load.

        Raises ValueError without total_step, or if the steps so far were under other settings.
        """
        name = self.one_adapter(adapter_name)
        memory = self.memory(name)
        return memory.allocator or memory.resume(self.adapted_layers(name), self.peft_config[name])

    def set_total_step(self, total_step: int, adapter_name: str | None = None) -> None:
        """Fill in T, for a trainer that knows it; the configuration that was given stays."""
        name = self.one_adapter(adapter_name)
        self.peft_config[name] = copy.copy(self.peft_config[name])
        self.peft_config[name].total_step = total_step
        self.memory(name).found_total_step = True
        self.memory(name).forget()

    def update_and_allocate(self, global_step: int, adapter_name: str | None = None) -> None:
        """Algorithm 1, lines 7-9: score, smooth and prune, after optimizer step global_step.

        Raises ValueError if steps are left out or repeated, if dem_weight is set and no gradient of
        `dem_loss` was in the step or two add one, if no gradient reaches a layer, and as
        `allocator`.
        """
        memory, allocator = self.memory(adapter_name), self.allocator(adapter_name)
        if self.peft_config[self.one_adapter(adapter_name)].dem_weight:
            memory.check_dem(allocator, global_step)
        memory.step(allocator, global_step)

    def rank_pattern(self, adapter_name: str | None = None) -> dict[str, int]:
        """Surviving components of each adapted matrix by name."""
        layers = self.adapted_layers(adapter_name)
        masks = torch.stack([layer.component_mask for layer in layers.values()])
        return dict(zip(layers, masks.sum(dim=1).tolist(), strict=True))

    def check_pruned(self, adapter_name: str | None = None) -> None:
        """Raise ValueError unless the ranks are final: pruning has ended, what is gone is zero."""
        name = self.one_adapter(adapter_name)
        config, steps = self.peft_config[name], int(self.memory(name).last_step)
        if config.init_r != config.target_r and steps < self.schedule(name).t_end:
            raise ValueError(
                f"adapter {name!r}: pruning has not ended, so its ranks are not those that were "
                f"asked for: {steps} steps of update_and_allocate, and the last components are "
                f"pruned at step {self.schedule(name).t_end} of total_step = {config.total_step}. "
                "Give the true number of optimizer steps as total_step, and call it after each"
            )
        check_settled(self.adapted_layers(name))
