"""Prune once: plain LoRA, cut to its budget at one step by its singular values. A control.

If one cut of what LoRA has learnt serves as well as many cuts by a smoothed score, the schedule of
the dynamic method is not what helps. With tfinal = 0 the cut is the last act, and nothing is
trained after it (as in PARA, arXiv 2604.27796).
"""

from dataclasses import asdict
from typing import cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from drlora_ref.allocator import Diverged, check_next_step, select_components
from drlora_ref.schedule import BudgetSchedule


def balanced_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(√S Vᵀ, U √S, S) of the singular value decomposition of each lora_B lora_A = U S Vᵀ.

        lora_B = Q_B R_B,  lora_Aᵀ = Q_A R_A    so    lora_B lora_A = Q_B (R_B R_Aᵀ) Q_Aᵀ

    The matrix in the brackets is r × r, and its singular values are those of the product, which
    is never built. The first k rows and columns are the best approximation of rank k.

    Shapes: (..., r, d_in), (..., d_out, r) -> (..., r, d_in), (..., d_out, r), (..., r) descending

    >>> A, B = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> balanced_svd(A, B)[2]  # B A = [[0, 2], [3, 0]]
    tensor([3., 2.])
    """
    r = lora_A.shape[-2]
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    Q_A, R_A = torch.linalg.qr(lora_A.mT.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = S.sqrt()
    A, B = root.unsqueeze(-1) * (Vh @ Q_A.mT), (Q_B @ U) * root.unsqueeze(-2)
    short = r - S.shape[-1]  # a matrix narrower than r has fewer singular values
    wide = F.pad(A, (0, 0, 0, short)), F.pad(B, (0, short)), F.pad(S, (0, short))
    return wide[0].to(lora_A), wide[1].to(lora_B), wide[2].to(lora_A)


class OneCut:
    """Cuts PEFT's LoRA to its budget once, at the schedule's t_end; an allocator as all others.

    Of the singular values of scaling · B A, of all matrices together, the largest target_r times
    the number of matrices survive; of equal ones the earlier position wins. Each adapter is
    replaced, in place, by its best approximation of the rank it keeps. What was cut is zero on both
    sides, and so has no gradient; zeros are written again after every later step, since AdamW's
    average of past gradients would move it.

    Choice: AdamW's averages are those of the factors before the cut. They fade, the first within
    some 10 steps, the second within some 1000.
    Read with care: tinit, deltaT and curve have no meaning here. The scaling is lora_alpha / init_r
    before and after.
    """

    def __init__(self, model: PeftModel, schedule: BudgetSchedule):
        self.schedule, self.last_step = schedule, 0
        self.layers: dict[str, LoraLayer] = {
            name: module
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer)
        }
        self.mask = torch.ones(len(self.layers), schedule.init_r, dtype=torch.bool)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """(lora_A (r, d_in), lora_B (d_out, r)) of each layer."""
        pairs = [(m.lora_A["default"], m.lora_B["default"]) for m in self.layers.values()]
        return [(cast(Tensor, A.weight), cast(Tensor, B.weight)) for A, B in pairs]

    @torch.no_grad()
    def step(self, global_step: int) -> None:
        """After optimizer step number global_step: nothing, the cut, or the zeros again.

        Raises ValueError if steps are left out or repeated: the cut would be missed; and Diverged
        if there is nothing to cut, since a factor or a singular value is not finite.
        """
        check_next_step(global_step, self.last_step)
        self.last_step = global_step
        if global_step == self.schedule.t_end:
            self._cut()
        if global_step >= self.schedule.t_end:
            self._zero()

    def _cut(self) -> None:
        factors = self._factors()
        values = torch.zeros_like(self.mask, dtype=torch.float32)
        by_shape: dict[tuple, list[int]] = {}
        for i, (A, B) in enumerate(factors):
            by_shape.setdefault((A.shape, B.shape), []).append(i)
        for members in by_shape.values():
            As, Bs = (
                torch.stack(part) for part in zip(*(factors[i] for i in members), strict=True)
            )
            if not (As.isfinite().all() and Bs.isfinite().all()):  # no SVD takes them
                raise Diverged("the adapters hold NaN or infinity: training diverged")
            As, Bs, S = balanced_svd(As, Bs)
            for i, A, B, own in zip(members, As, Bs, S, strict=True):
                factors[i][0].copy_(A)
                factors[i][1].copy_(B)
                values[i] = own.cpu()
        scalings = [layer.scaling["default"] for layer in self.layers.values()]
        values *= torch.tensor(scalings).unsqueeze(1)
        keep = self.schedule.keep_count(self.schedule.t_end, values.numel())
        mask = select_components(values.flatten(), keep).view_as(self.mask)
        self.mask = mask.to(factors[0][0].device)  # where every later step reads it

    def _zero(self) -> None:
        As, Bs = zip(*self._factors(), strict=True)
        masks = self.mask.to(As[0].device)
        torch._foreach_mul_(list(As), list(masks.unsqueeze(2)))  # (r, 1) rows
        torch._foreach_mul_(list(Bs), list(masks))  # (r,) columns

    def rank_pattern(self) -> dict[str, int]:
        """Surviving components of each layer by name."""
        return dict(zip(self.layers, self.mask.sum(dim=1).tolist(), strict=True))

    def count_parameters(self) -> int:
        """d_in + d_out for each surviving component."""
        sizes = [A.shape[1] + B.shape[0] for A, B in self._factors()]
        return sum(r * size for r, size in zip(self.mask.sum(dim=1).tolist(), sizes, strict=True))

    def state_dict(self) -> dict:
        """All that decides the next step, and what it belongs to."""
        return {
            "mask": self.mask.clone(),
            "last_step": self.last_step,
            "schedule": asdict(self.schedule),
            "layers": list(self.layers),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where state_dict() was taken.

        Raises ValueError if the state belongs to other layers or another schedule.
        """
        here = {"schedule": asdict(self.schedule), "layers": list(self.layers)}
        for name, value in here.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved state is of another {name}: {state[name]}, here {value}"
                )
        self.mask = state["mask"].to(self._factors()[0][0].device)
        self.last_step = state["last_step"]
