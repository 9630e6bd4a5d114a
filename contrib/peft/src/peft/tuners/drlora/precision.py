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

"""What is trained stays float32, in a model of half precision too."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


HALF = {torch.float16, torch.bfloat16}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of one in half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor


class StaysFloat32(nn.Module):
    """A module whose own parameters and buffers move with the model but stay float32 (or float64)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch casts and moves through this method: half(), to(), cuda() and the like.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in HALF else result

        if recurse:  # a child decides for itself: the frozen base layer is cast
            for child in self.children():
                child._apply(fn)
        return super()._apply(moved, recurse=False)


def train_in_float32(module: nn.Module) -> nn.Module:
    """Let a module that is trained whole, such as a head, be float32 in a model of any type.

    In place; returns the module. Inputs are taken up to float32 and outputs go back to the inputs'
    type, so that the model around it sees no difference. A model.half() later on is undone when the
    module is next called.
    """
    if not hasattr(module, "dtype_around"):  # not twice
        _take_up(module, (), {})
        module.register_forward_pre_hook(_take_up, with_kwargs=True)
        module.register_forward_hook(_give_back)
    return module


def _take_up(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    if halves := [t.dtype for t in module.parameters() if t.dtype in HALF]:
        module.float()
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    given: list[Any] = [t.dtype for t in inputs if t.is_floating_point()]
    # An embedding has no input of floating point: its outputs go by the type that it had itself.
    vars(module)["dtype_around"] = (given or halves or [vars(module).get("dtype_around")])[0]
    return tree_map_only(Tensor, at_least_float32, (args, kwargs))


def _give_back(module: nn.Module, args: tuple, output: Any) -> Any:
    around = vars(module)["dtype_around"]
    if around not in HALF:
        return output
    return tree_map_only(Tensor, lambda t: t.to(around) if t.is_floating_point() else t, output)
