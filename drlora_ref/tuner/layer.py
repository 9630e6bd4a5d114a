"""The parts of the PEFT tuner: its layer, and its allocator's memory."""

import json
import warnings
import zlib
from dataclasses import asdict
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator, needs
from drlora_ref.importance import SCORES
from drlora_ref.layer import RankOneComponents, like_base
from drlora_ref.precision import StaysFloat32
from drlora_ref.tuner.config import DynamicRankConfig
from drlora_ref.watch import ZWatch

SHARDED = (
    "FSDP and DeepSpeed shard the components, DDP does not: a score takes the norms of whole "
    "vectors (Eq. 7), one selection goes over those of all layers, and a shard holds a part of "
    "each: use DDP"
)


def check_whole(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError if FSDP2 or ZeRO-3 has cut the components into shards, as a loop may do.

    >>> check_whole({"query": RankOneComponents(4, 4, r=2)})
    """
    for name, layer in layers.items():
        # What a DTensor has, and what DeepSpeed gives a parameter that it has cut.
        if hasattr(layer.lora_A, "device_mesh") or hasattr(layer.lora_A, "ds_id"):
            raise ValueError(f"{name} is sharded: {SHARDED}")


def check_settled(layers: dict[str, RankOneComponents]) -> None:
    """Raise ValueError if a pruned component is not zero: it counts in the output, not in the rank.

    >>> check_settled({"query": RankOneComponents(4, 4, r=2)})
    """
    for name, layer in layers.items():
        if layer.lora_c[~layer.component_mask].any():
            raise ValueError(
                f"{name}: a component that was pruned is not zero. Either pruning has not ended, "
                "or the allocator was not called after an optimizer step since: call it after "
                "every step, to the last"
            )


def warn_unfinished(config: DynamicRankConfig, steps: int) -> None:
    """Warn where an adapter of so many steps has not been pruned to its end."""
    if config.total_step and config.init_r > config.target_r and steps < config.schedule().t_end:
        warnings.warn(
            f"this adapter is unfinished: pruning was to end at step {config.schedule().t_end}, "
            f"and it has {steps}. It has more components than target_r says",
            stacklevel=2,
        )


def in_4_bits(module: nn.Module) -> bool:
    """Whether a linear layer is bitsandbytes' with 4 bits a weight, as QLoRA has them.

    >>> in_4_bits(nn.Linear(2, 2))
    False
    """
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


class DynamicRankLinear(nn.Module, BaseTunerLayer):
    """A linear layer and, for each adapter by name, its RankOneComponents.

    PEFT's counterpart of DynamicLoRALinear: that one has a single set of components, this one as
    many as adapters were added, of which the active ones count. Shapes: (..., d_in) -> (..., d_out)
    As that one, it is a linear layer to code that reads `weight`: W in evaluation, W0 in training.
    The frozen weight may be kept in 4 bits (bitsandbytes): then nothing is merged into it, since
    rounding to 4 bits would lose most of an update. Merging raises TypeError.
    """

    adapter_layer_names = ("dynamic_rank_components",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: DynamicRankConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.dynamic_rank_components = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: DynamicRankConfig) -> None:
        """Components of a new adapter; the active adapters stay what they are."""
        self.dynamic_rank_components[adapter_name] = RankOneComponents(
            self.in_features,
            self.out_features,
            config.init_r,
            config.lora_alpha,
            config.lora_dropout,
            **like_base(self.base_layer.weight),
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        added = self._added()
        result = self.base_layer(x, *args, **kwargs)
        for components in added:
            result = result + components(x).to(result.dtype)
        return result

    def _added(self) -> list[RankOneComponents]:
        """The components that the forward pass adds to the base layer's answer."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        here = self.dynamic_rank_components
        return [self.components(name) for name in self.active_adapters if name in here]

    @property
    def weight(self) -> Tensor:
        """The base weight in training, with what is added to it in evaluation: (d_out, d_in)."""
        W = self._base_weight()
        for components in [] if self.training else self._added():
            W = W + components.update().to(W.dtype)
        return W

    def _base_weight(self) -> Tensor:
        weight = self.base_layer.weight
        if not in_4_bits(self.base_layer):
            return weight
        from bitsandbytes.functional import dequantize_4bit  # it is there: it made the weight

        return dequantize_4bit(weight.data, cast(Any, weight).quant_state)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: PEFT's convert_to_lora takes ΔW apart anew. export_lora needs no such detour."""
        return True

    def components(self, adapter_name: str) -> RankOneComponents:
        """The components of one adapter. Raises KeyError if it has none here."""
        return cast(RankOneComponents, self.dynamic_rank_components[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of the surviving components of one adapter, materialised: (d_out, d_in)."""
        return self.components(adapter_name).delta_weight()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, until unmerge(). safe_merge: ValueError where not finite."""
        if in_4_bits(self.base_layer):
            raise TypeError(
                "nothing is merged into 4-bit weights, which would round it away: save the "
                "adapter, and merge it into the model in bfloat16 or float32"
            )
        weight = self.base_layer.weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.dynamic_rank_components:
                merged = weight + self.get_delta_weight(name).to(weight.dtype)
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"adapter {name!r}: the merged weight has NaN or infinity")
                weight.data = merged
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take ΔW away again, up to rounding."""
        while self.merged_adapters:
            delta = self.get_delta_weight(self.merged_adapters.pop())
            self.base_layer.weight -= delta.to(self.base_layer.weight.dtype)


class AllocatorState(StaysFloat32):
    """The memory of one adapter's RankAllocator, as buffers: saved and loaded with the adapter.

    Buffers: ema (N,), the smoothed score of every component by position; last_step and settings,
    whole numbers; and the generator of the score "random". The masks are in the components.

    The watch of a score that needs one is here from the start, since the first forward pass may
    come before the allocator is made. Nothing of it is saved: each step starts it anew.
    """

    ema: Tensor
    last_step: Tensor
    settings: Tensor
    generator: Tensor

    def __init__(self, layers: dict[str, RankOneComponents], config: DynamicRankConfig, device):
        super().__init__()
        n = sum(layer.component_mask.numel() for layer in layers.values())
        self.register_buffer("ema", torch.zeros(n, device=device))
        for name in ("last_step", "settings"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        if config.score == "random":
            start = torch.Generator().manual_seed(config.seed).get_state()
            self.register_buffer("generator", start.to(device))
        self.allocator: RankAllocator | None = None
        self.watch: ZWatch | None = None
        if "z_square" in needs(SCORES[config.score]):
            self.watch = ZWatch(list(layers.values()))
        self.found_total_step = False  # whether a trainer has filled it in
        self.dem_counted: set[str] = set()  # who added Eq. 10 to the gradients of this step
        self.register_load_state_dict_post_hook(_forget)

    def forget(self) -> None:
        """Make the allocator anew, from the buffers, when it is next asked for."""
        self.allocator = None
        if self.watch:
            self.watch.start()

    def resume(
        self, layers: dict[str, RankOneComponents], config: DynamicRankConfig
    ) -> RankAllocator:
        """An allocator that goes on where the buffers say; it is kept until forget().

        Raises ValueError without total_step, if the steps so far were under other settings, and as
        check_whole.
        """
        check_whole(layers)
        allocator = RankAllocator(
            layers, config.schedule(), config.beta, config.score, config.seed, self.watch
        )
        allocator.last_step = int(self.last_step)
        if allocator.last_step:
            settings = _checksum(allocator)
            if settings != int(self.settings):
                raise ValueError(
                    f"the adapter's {allocator.last_step} steps so far were taken with another "
                    f"schedule, beta or score than {allocator.schedule}, beta = {allocator.beta}, "
                    f"score = {allocator.score_name!r}: go on with those in its adapter_config.json"
                )
            allocator.ema = self.ema.clone()
            if hasattr(self, "generator"):
                allocator.generator.set_state(self.generator.cpu())
            allocator.counted.fill_(True)
        if self.watch and allocator.last_step >= allocator.schedule.t_end:
            self.watch.stop()
        self.allocator = allocator
        return allocator

    def count_dem(self, penalty: Tensor, by: str) -> Tensor:
        """The penalty (Eq. 10), which will be known to have counted once a gradient passes it."""

        def note(gradient: Tensor) -> None:
            self.dem_counted.add(by)

        if penalty.requires_grad:
            penalty.register_hook(note)
        return penalty

    def check_dem(self, allocator: RankAllocator, step: int) -> None:
        """Raise ValueError for a step on gradients without those of DEM, or with two adding it."""
        counted, self.dem_counted = self.dem_counted, set()
        if len(counted) > 1:
            raise ValueError(
                f"DEM is twice in the loss of step {step}: {' and '.join(sorted(counted))} add it: "
                "leave one of them out"
            )
        taken = any(layer.lora_c.grad is not None for layer in allocator.layers.values())
        if taken and not counted and not allocator.schedule.pruning_ended(step):
            raise ValueError(
                f"dem_weight is set, but step {step} was taken without DEM: its loss is not that "
                "of DynamicRankTrainer.compute_loss. A compute_loss or training_step of your own "
                "must call super()'s, or add dem_weight * model.dem_loss()"
            )

    @torch.no_grad()
    def step(self, allocator: RankAllocator, global_step: int) -> None:
        """RankAllocator.step, remembered. Raises ValueError after the last step, too."""
        if global_step > allocator.schedule.total_steps:
            raise ValueError(
                f"step {global_step} of total_step = {allocator.schedule.total_steps}: the "
                "budget was spread over fewer steps than there are; give the true number"
            )
        allocator.step(global_step)
        self.last_step.fill_(global_step)
        if global_step == 1:
            self.settings.fill_(_checksum(allocator))
        self.ema.copy_(allocator.ema)
        if hasattr(self, "generator"):
            self.generator.copy_(allocator.generator.get_state())


def _forget(state: AllocatorState, _) -> None:
    # What was loaded counts from now on, so the next step makes a new allocator from it.
    state.forget()


def _checksum(allocator: RankAllocator) -> int:
    settings = asdict(allocator.schedule), allocator.beta, allocator.score_name
    return zlib.crc32(json.dumps(settings).encode())
