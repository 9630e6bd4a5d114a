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

"""A linear layer whose update is a sum of rank-1 components that can be switched off."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from .config import DrLoraConfig
from .precision import StaysFloat32, at_least_float32


class RankOneComponents(StaysFloat32):
    """r rank-1 matrices that add up to the update of one weight (Eq. 6's sum).

        ΔW = scaling · Σᵢ cᵢ bᵢaᵢᵀ,   aᵢ = lora_A[i], bᵢ = lora_B[:, i], cᵢ = lora_c[i]
           = scaling · lora_B diag(lora_c) lora_A

    LoRA (Eq. 5) is the case c = 1. The scalar c is what makes a component a unit that can be
    pruned: cᵢ = 0 removes it, and leaves aᵢ and bᵢ where they are, so that it may come back.

    Shapes: x (..., d_in) -> x ΔWᵀ (..., d_out), without building ΔW; lora_A (r, d_in), lora_B
    (d_out, r), lora_c (r,), component_mask (r,) of bool: the components that survive, as the
    allocator decided. `dtype` and `device` are torch's.

    Choice: both matrices start Kaiming-uniform (a = 0) and c at zero, as in the authors' code;
    LoRA starts with lora_B = 0. So ΔW = 0, and at the first step only c receives a gradient.
    Choice: scaling = lora_alpha / r with the *initial* r, and stays so while r shrinks (authors').

    Read with care: the forward pass multiplies by c, not by the mask. Between two pruning events
    a component that was set to zero trains on, moves away from zero and counts in the output
    ("revival"); `rank` and `delta_weight` go by the mask. The two views agree right after an
    event, and always once pruning has ended.

    The components stay float32 when the model around them is cast to half precision.

    Raises ValueError for r < 1, lora_alpha ≤ 0 or a dropout outside [0, 1).
    """

    component_mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        lora_alpha: float = 8,
        lora_dropout: float = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if r < 1:
            raise ValueError(f"r = {r}: a layer needs at least one component")
        if not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha = {lora_alpha}: must be above 0")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout = {lora_dropout}: must be at least 0 and less than 1")
        self.scaling = lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        like: dict[str, Any] = dict(device=device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, d_in, **like))
        self.lora_B = nn.Parameter(torch.empty(d_out, r, **like))
        self.lora_c = nn.Parameter(torch.zeros(r, **like))
        self.register_buffer("component_mask", torch.ones(r, dtype=torch.bool, device=device))
        nn.init.kaiming_uniform_(self.lora_A)  # bound √(6 / d_in)
        nn.init.kaiming_uniform_(self.lora_B)  # bound √(6 / r): the fan-in of lora_B is r
        self.watch: Callable[[Tensor], None] | None = None  # is shown z while training: ZWatch

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        if self.watch and self.training and self.lora_c.requires_grad:
            self.watch(z)
        return F.linear(z * (self.scaling * self.lora_c), self.lora_B)  # (..., d_out)

    @property
    def rank(self) -> int:
        """How many components survive."""
        return int(self.component_mask.sum())

    def update(self) -> Tensor:
        """ΔW as the forward pass has it, materialised and with gradient: (d_out, d_in)."""
        return (self.lora_B * (self.scaling * self.lora_c)) @ self.lora_A

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW of the surviving components, materialised: (d_out, d_in)."""
        c = self.scaling * self.lora_c * self.component_mask
        return (self.lora_B * c) @ self.lora_A

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.lora_c.numel()}, scaling={self.scaling:.3g}"


def like_base(weight: Tensor) -> dict[str, Any]:
    """{"device": ..., "dtype": ...} of the components of a frozen weight.

    Half-precision base weights are frozen and may stay so; what is trained needs float32.
    """
    return {
        "device": weight.device,
        "dtype": torch.promote_types(weight.dtype, torch.float32),
    }


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DDP and DataParallel."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
    inside = model._modules.get("module" if isinstance(model, wrappers) else "_orig_mod")
    return model if inside is None else bare(inside)


def plain_name(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def dynamic_layers(
    model: nn.Module | dict[str, RankOneComponents],
) -> dict[str, RankOneComponents]:
    """The adapted layers by name, in the order of `model.named_modules()`.

    That order defines a component's position, which breaks ties; it is the same in every process.
    The names are those of the plain model, whether or not torch.compile or DDP has wrapped it.
    A dictionary of such layers is returned as it is: whoever needs a model's layers takes either.
    """
    if isinstance(model, dict):
        return model
    layers = bare(model).named_modules()
    return {plain_name(n): m for n, m in layers if isinstance(m, RankOneComponents)}


def stack_by_shape(layers: list[RankOneComponents]) -> list[tuple[list[int], tuple[Tensor, ...]]]:
    """Group layers of one shape, so that one call serves all of them.

    A base-size encoder has 72 adapted matrices but only three shapes. Returns, for every shape,
    the indices into `layers` and (lora_A, lora_B, lora_c) with one more leading dimension:
    (layers, r, d_in), (layers, d_out, r), (layers, r). Gradients flow through the stack.
    """
    groups: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault((layer.lora_A.shape, layer.lora_B.shape), []).append(i)

    def stack(members: list[int], name: str) -> Tensor:
        return at_least_float32(torch.stack([getattr(layers[i], name) for i in members]))

    names = ("lora_A", "lora_B", "lora_c")
    return [(members, tuple(stack(members, n) for n in names)) for members in groups.values()]


def in_4_bits(module: nn.Module) -> bool:
    """Whether a linear layer is bitsandbytes' with 4 bits a weight, as QLoRA has them."""
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


class DrLoraLinear(nn.Module, BaseTunerLayer):
    """
    A linear layer and, for each adapter by name, its `RankOneComponents`.

    Shapes: (..., d_in) -> (..., d_out). Code that reads `weight` gets the base weight in training, and the base weight
    with what is added to it in evaluation.
    """

    adapter_layer_names = ("drlora_components",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: DrLoraConfig):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.drlora_components = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: DrLoraConfig) -> None:
        """Components of a new adapter; the active adapters stay what they are."""
        self.drlora_components[adapter_name] = RankOneComponents(
            self.in_features,
            self.out_features,
            config.init_r,
            config.lora_alpha,
            config.lora_dropout,
            **like_base(self.base_layer.weight),
        )
        if not config.init_weights:
            nn.init.normal_(self.components(adapter_name).lora_c)
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
        here = self.drlora_components
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
        """True: PEFT's convert_to_lora takes ΔW apart anew."""
        return True

    def components(self, adapter_name: str) -> RankOneComponents:
        """The components of one adapter. Raises KeyError if it has none here."""
        return cast(RankOneComponents, self.drlora_components[adapter_name])

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
            if name in self.drlora_components:
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
