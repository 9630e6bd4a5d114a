"""What is trained, and what decides about it, is float32, whatever the model around it is cast to.

Half precision is for frozen weights. AdamW divides by √v + 1e-8, and in float16 1e-8 is 0: its
first step gives NaN. bfloat16 has 8 bits of mantissa, so that a weight of 1 does not feel a step of
0.001, and no more does the average of Eq. 8. float64 stays float64.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

HALF = {torch.float16, torch.bfloat16}


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of one in half precision.

    >>> [at_least_float32(torch.ones(1).to(t)).dtype for t in (torch.bfloat16, torch.float64)]
    [torch.float32, torch.float64]
    """
    return tensor.float() if tensor.dtype in HALF else tensor


class StaysFloat32(nn.Module):
    """A module whose own parameters and buffers move with the model but stay float32 (or float64).

    >>> class Scores(StaysFloat32):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("ema", torch.zeros(2))
    >>> nn.Sequential(Scores(), nn.Linear(2, 2)).half()[0].ema.dtype
    torch.float32
    """

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

    >>> head = train_in_float32(nn.Linear(2, 2).bfloat16())
    >>> head.weight.dtype, head(torch.ones(1, 2, dtype=torch.bfloat16)).dtype
    (torch.float32, torch.bfloat16)
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
