"""The parts of the PEFT tuner: its configuration, its layer, and its allocator's memory."""

import json
import zlib
from dataclasses import asdict, dataclass, field

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator, check_scoring
from drlora_ref.layer import RankOneComponents, like_base
from drlora_ref.schedule import BudgetSchedule


class _MethodName(str):
    """A string that answers where PEFT asks a member of PeftType for its value or name.

    It equals and hashes as the plain string that stands in a saved adapter_config.json. Where this
    package was not imported, PEFT's error is a KeyError with this name: so it names the package.
    """

    value = name = property(str.__str__)


DYNAMIC_RANK = _MethodName("drlora_ref.DYNAMIC_RANK")


@dataclass
class DynamicRankConfig(PeftConfig):
    """What get_peft_model needs for dynamic-rank DoRA. Names are PEFT's, as in its AdaLoRA.

    total_step is T, the number of optimizer steps of the whole training: DynamicRankCallback fills
    it in, a loop of your own must. tinit and tfinal are steps too; by default 15 % and 50 % of T,
    as in the paper. target_modules: names or ends of names, a regular expression, or "all-linear";
    by default the six matrices of every layer for RoBERTa, BERT, MPNet and BART, else what PEFT
    takes for LoRA. dem_weight is the η of Eq. 10 as printed (the authors' code halves the term).
    score is a name in drlora_ref.SCORES, seed is that of the score "random".

    Raises ValueError for a value out of range, naming what would be right.

    >>> DynamicRankConfig(init_r=3, target_r=2, total_step=100).schedule().t_end
    50
    """

    init_r: int = field(default=12, metadata={"help": "components of each matrix at the start"})
    target_r: int = field(default=8, metadata={"help": "components at the end, on average"})
    total_step: int | None = field(default=None, metadata={"help": "optimizer steps in all"})
    tinit: int | None = field(default=None, metadata={"help": "steps before pruning"})
    tfinal: int | None = field(default=None, metadata={"help": "steps after pruning"})
    deltaT: int = field(default=10, metadata={"help": "steps between two prunings"})
    curve: str = field(default="paper", metadata={"help": "of the budget: paper or adalora"})
    beta: float = field(default=0.9, metadata={"help": "memory of the score (Eq. 8)"})
    score: str = field(default="frobenius_share", metadata={"help": "a name in SCORES (Eq. 7)"})
    seed: int = field(default=0, metadata={"help": "of the score 'random'"})
    dem_weight: float = field(default=0.0, metadata={"help": "weight of DEM in the loss (Eq. 10)"})
    lora_alpha: float = field(default=8, metadata={"help": "scaling = lora_alpha / init_r"})
    lora_dropout: float = field(default=0.1, metadata={"help": "on the input of the components"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "not to adapt"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "trained whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "their list"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = DYNAMIC_RANK
        for name in ("target_modules", "exclude_modules"):  # PEFT wants sets, JSON gives lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.total_step is not None:
            self.schedule()
        else:  # whatever can be checked without it
            BudgetSchedule(self.init_r, self.target_r, 10**9, deltaT=self.deltaT, curve=self.curve)
        check_scoring(self.score, self.beta)
        if self.dem_weight < 0:
            raise ValueError(f"dem_weight = {self.dem_weight}: must be 0 (no DEM) or more")

    def schedule(self) -> BudgetSchedule:
        """Eq. 9 with these numbers. Raises ValueError while total_step is None."""
        if self.total_step is None:
            raise ValueError(
                "total_step is missing: give DynamicRankConfig the number of optimizer steps of "
                "the whole training (DynamicRankCallback fills it in)"
            )
        steps = dict(total_steps=self.total_step, tinit=self.tinit, tfinal=self.tfinal)
        return BudgetSchedule(
            self.init_r, self.target_r, deltaT=self.deltaT, curve=self.curve, **steps
        )


class DynamicRankLinear(nn.Module, BaseTunerLayer):
    """A linear layer and, for each adapter by name, its RankOneComponents.

    PEFT's counterpart of DynamicLoRALinear: that one has a single set of components, this one as
    many as adapters were added, of which the active ones count. Shapes: (..., d_in) -> (..., d_out)

    Raises TypeError for a base layer that is no nn.Linear, or whose weight is quantised.
    """

    adapter_layer_names = ("dynamic_rank_components",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: DynamicRankConfig):
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"only nn.Linear can be adapted, not {type(base_layer).__name__}")
        if not base_layer.weight.is_floating_point():
            raise TypeError(
                f"{type(base_layer).__name__} with a weight of {base_layer.weight.dtype}: "
                "quantised layers cannot be adapted, load the model in float32 or bfloat16"
            )
        self.base_layer = base_layer
        self.out_features, self.in_features = base_layer.weight.shape
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
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.dynamic_rank_components:
                result = result + self.dynamic_rank_components[name](x).to(result.dtype)
        return result

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of the surviving components of one adapter, materialised: (d_out, d_in)."""
        return self.dynamic_rank_components[adapter_name].delta_weight()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the base weight, until unmerge(). safe_merge: ValueError where not finite."""
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


class AllocatorState(nn.Module):
    """The memory of one adapter's RankAllocator, as buffers: saved and loaded with the adapter.

    Buffers: ema (N,), the smoothed score of every component by position; last_step and settings,
    whole numbers; and the generator of the score "random". The masks are in the components.
    """

    def __init__(self, layers: dict[str, RankOneComponents], config: DynamicRankConfig, device):
        super().__init__()
        n = sum(layer.component_mask.numel() for layer in layers.values())
        self.register_buffer("ema", torch.zeros(n, device=device))
        for name in ("last_step", "settings"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        if config.score == "random":
            self.register_buffer("generator", torch.get_rng_state().to(device))
        self.allocator: RankAllocator | None = None
        # What has been loaded is the truth: an allocator of before is made anew at the next step.
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    def forget(self) -> None:
        """Make the allocator anew, from the buffers, when it is next asked for."""
        self.allocator = None

    def resume(self, layers: dict[str, RankOneComponents], config: DynamicRankConfig) -> None:
        """Make the allocator go on where the buffers say.

        Raises ValueError without total_step, or if the steps so far were under other settings.
        """
        allocator = RankAllocator(layers, config.schedule(), config.beta, config.score, config.seed)
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
        self.allocator = allocator

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """RankAllocator.step, remembered."""
        self.allocator.step(global_step)
        self.last_step.fill_(global_step)
        if global_step == 1:
            self.settings.fill_(_checksum(self.allocator))
        self.ema.copy_(self.allocator.ema)
        if hasattr(self, "generator"):
            self.generator.copy_(self.allocator.generator.get_state())


def _checksum(allocator: RankAllocator) -> int:
    settings = asdict(allocator.schedule), allocator.beta, allocator.score_name
    return zlib.crc32(json.dumps(settings).encode())
