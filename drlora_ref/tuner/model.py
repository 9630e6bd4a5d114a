"""Dynamic-rank DoRA as a tuner of PEFT: `import drlora_ref.tuner`, then get_peft_model.

The equations are the package's own (layer, importance, schedule, regularizer, allocator); this
file only puts them where PEFT looks for a method. It is not NVIDIA's weight-decomposed DoRA, which
in PEFT is LoraConfig(use_dora=True).

PEFT (0.21) has no door for methods that it does not know: `register_peft_method` asks for a member
of its enumeration PeftType. So the method is entered into PEFT's three tables under a name that
behaves like such a member. PEFT changes between versions; this file refuses those it was not
tested with.
"""

import copy
from contextlib import contextmanager
from typing import cast

import peft
import torch
from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.inject import BASE_MODELS, check_target
from drlora_ref.layer import RankOneComponents, bare, dynamic_layers, plain_name
from drlora_ref.precision import train_in_float32
from drlora_ref.regularizer import check_dem, dem_loss
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.tuner.config import DYNAMIC_RANK, DynamicRankConfig
from drlora_ref.tuner.fitting import (
    Before,
    check_name,
    check_quantised,
    check_task,
    whole_modules,
)
from drlora_ref.tuner.layer import (
    AllocatorState,
    DynamicRankLinear,
    check_settled,
    in_4_bits,
    warn_unfinished,
)

TESTED = "0.21."
if not peft.__version__.startswith(TESTED):
    raise ImportError(
        f"drlora_ref.tuner reaches into PEFT and is tested with {TESTED}*; this is PEFT "
        f"{peft.__version__}: pip install 'peft>=0.21,<0.22'"
    )


class DynamicRankModel(BaseTuner):
    """A model whose linear layers have components, and an allocator for each adapter.

    What a training loop needs beyond PEFT's own methods (all can be called on the PeftModel):
    `dem_loss()` goes into the loss until pruning ends, times dem_weight; `update_and_allocate(t)`
    is called after the t-th optimizer step and before zero_grad(), t = 1, 2, ..., T. Both concern
    the one active adapter, as do `schedule()` and `rank_pattern()`. Each raises ValueError if
    several are active.

    Raises ValueError for a model that has adapters already, and as check_quantised, check_task,
    whole_modules, check_name, check_target and check_dem do. A model that is refused is as it was
    before.

    Read with care: merging goes by the mask and so do the ranks, the forward pass goes by c; the
    two agree once pruning has ended. Merging before that raises ValueError.
    """

    prefix = "dynamic_rank_"
    tuner_layer_cls = DynamicRankLinear
    target_module_mapping: dict = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | {
        kind: list(known.matrices) for kind, known in BASE_MODELS.items()
    }
    uses_shared_state = True  # AllocatorState is here: a model without this wrapper cannot train
    peft_config: dict[str, DynamicRankConfig]  # type: ignore[assignment]  # the base has any kind

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, *args, **kwargs):
        if bare(model) is not model:
            raise ValueError(
                f"the model is wrapped in {type(model).__name__}: adapt it first, and wrap what "
                "get_peft_model returns"
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
            adapted = [m for m in model.modules() if isinstance(m, DynamicRankLinear)]
            ours = [m for m in adapted if adapter_name in m.dynamic_rank_components]
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
        if not hasattr(self, "dynamic_rank_state"):
            self.dynamic_rank_state = nn.ModuleDict()
        state = AllocatorState(layers, config, *where)
        self.dynamic_rank_state[adapter_name] = state
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
        if isinstance(target, DynamicRankLinear):
            return target.add(adapter_name, peft_config)
        if not in_4_bits(target):
            check_target(current_key, target, self.model)
        adapted = DynamicRankLinear(target, adapter_name, peft_config)
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
        del self.dynamic_rank_state[adapter_name]

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

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
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
            if isinstance(module, DynamicRankLinear) and name in module.dynamic_rank_components
        }

    def memory(self, adapter_name: str | None = None) -> AllocatorState:
        """What is saved of the adapter's allocator: its buffers."""
        return cast(AllocatorState, self.dynamic_rank_state[self.one_adapter(adapter_name)])

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


def find_tuner(model) -> DynamicRankModel:
    """The tuner inside a PeftModel. Raises TypeError for any other model."""
    model = bare(model)
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, DynamicRankModel):
        raise TypeError(
            f"{type(model).__name__} has no dynamic-rank adapter: call "
            "get_peft_model(model, DynamicRankConfig(...)) before the Trainer is made"
        )
    return tuner


# Under this name PEFT finds the method: in get_peft_model, and in a saved adapter_config.json.
PEFT_TYPE_TO_CONFIG_MAPPING[DYNAMIC_RANK] = DynamicRankConfig
PEFT_TYPE_TO_TUNER_MAPPING[DYNAMIC_RANK] = DynamicRankModel
PEFT_TYPE_TO_PREFIX_MAPPING[DYNAMIC_RANK] = DynamicRankModel.prefix
