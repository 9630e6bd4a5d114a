"""AdaLoRA (2303.10512) as PEFT has it, behind the same few methods as our own RankAllocator."""

from dataclasses import asdict

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from drlora_ref.allocator import Diverged, check_next_step
from drlora_ref.schedule import BudgetSchedule

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's: sensitivity, its average, its uncertainty


def check_prunes(schedule: BudgetSchedule) -> None:
    """Raise ValueError for a schedule that prunes nothing: PEFT's AdaLoRA fails on it."""
    if schedule.target_r == schedule.init_r:
        raise ValueError(f"adalora: init_r must be above target_r = {schedule.target_r}")


class AdaLoRAAllocator:
    """Makes PEFT's AdaLoRA prune, and tells what is left.

    PEFT prunes only when it is called after every step; without a call it trains init_r components
    to the end, in silence. `step(t)` is that call, for t = 1, 2, ..., T completed optimizer steps.
    Then tinit, tfinal and T mean what they mean in BudgetSchedule: PEFT prunes after tinit wherever
    deltaT divides t (we count deltaT from tinit), in any case at t_end = T - tfinal, and from then
    on writes the zeros of the final mask again after every step.

    Read with care: PEFT's scores are weights times gradients, so `step` belongs after
    optimizer.step() and *before* zero_grad(). The curve is AdaLoRA's own, whatever schedule.curve
    says. And PEFT drops every score up to the k-th smallest: ties cost more than the budget says.

    Raises ValueError if steps are left out; Diverged, at a pruning step of the schedule, if a score
    is NaN or infinite, and at t_end if other than target_r components per layer are left: ties, or
    a PEFT configuration with another total_step than the schedule's.
    """

    def __init__(self, model: PeftModel, schedule: BudgetSchedule):
        self.tuner, self.schedule, self.last_step = model.base_model, schedule, 0
        self.config = self.tuner.peft_config["default"]
        self.layers: dict[str, nn.Module] = {
            name: module
            for name, module in self.tuner.model.named_modules()
            if isinstance(module, AdaLoraLayer)
        }
        self.config.rank_pattern = {  # in PEFT's form; PEFT has none before the first event
            f"{name}.lora_E.default": [True] * schedule.init_r for name in self.layers
        }

    def step(self, global_step: int) -> None:
        """Score, smooth and, where due, prune: after optimizer step number global_step."""
        check_next_step(global_step, self.last_step)
        self.tuner.update_and_allocate(global_step)
        self.last_step = global_step
        left, due = self.surviving(), self.schedule.target_r * len(self.layers)
        ipt, unc = (getattr(self.tuner.rankallocator, name) for name in SCORES[1:])
        scores = [average * unc[name] for name, average in ipt.items()]
        if self.schedule.prunes_at(global_step) and not all(s.isfinite().all() for s in scores):
            raise Diverged("AdaLoRA's scores are NaN or infinite: training diverged")
        if global_step == self.schedule.t_end and left != due:
            raise Diverged(
                f"AdaLoRA ends with {left} components, the budget is {due}: scores were tied (a "
                "collapsed run?), or PEFT's total_step, tinit, tfinal are not the schedule's"
            )

    def penalty(self) -> Tensor:
        """AdaLoRA's orthogonality term, weighted: a scalar with gradient, to be added to the loss.

            weight · mean over all matrices of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F

        Read with care: PEFT adds it to every loss, in evaluation too, but only in its models for
        a named task type; a plain PeftModel calls past it, and leaves it out in silence.
        """
        both = [(m.lora_A["default"], m.lora_B["default"].T) for m in self.layers.values()]
        grams = torch.stack([M @ M.T for matrices in both for M in matrices])  # (2 layers, r, r)
        gaps = grams - torch.eye(self.schedule.init_r, device=grams.device)
        return self.config.orth_reg_weight * torch.linalg.matrix_norm(gaps).mean()

    def rank_pattern(self) -> dict[str, int]:
        """Surviving components of each layer by name."""
        masks = self.config.rank_pattern
        return {name.split(".lora_E")[0]: sum(mask) for name, mask in masks.items()}

    def surviving(self) -> int:
        """Surviving components in all."""
        return sum(self.rank_pattern().values())

    def count_parameters(self) -> int:
        """d_in + d_out for each surviving component. E is not counted: it folds into lora_B."""
        ranks = self.rank_pattern()
        return sum(
            ranks[name] * (layer.in_features + layer.out_features)
            for name, layer in self.layers.items()
        )

    def state_dict(self) -> dict:
        """All that decides the next step, and the schedule it belongs to."""
        return {
            **{name: dict(getattr(self.tuner.rankallocator, name)) for name in SCORES},
            "rank_pattern": dict(self.config.rank_pattern),
            "last_step": self.last_step,
            "schedule": asdict(self.schedule),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on exactly where state_dict() was taken.

        Raises ValueError if the state belongs to other layers or another schedule.
        """
        here = {"schedule": asdict(self.schedule), "rank_pattern": list(self.config.rank_pattern)}
        for name, value in here.items():
            there = state[name] if name == "schedule" else list(state[name])
            if there != value:
                what = "schedule" if name == "schedule" else "set of layers"
                raise ValueError(f"the saved state is of another {what}: {there}, here {value}")
        devices = {name: p.device for name, p in self.tuner.model.named_parameters()}
        for name in SCORES:
            moved = {n: tensor.to(devices[n]) for n, tensor in state[name].items()}
            setattr(self.tuner.rankallocator, name, moved)
        self.config.rank_pattern = dict(state["rank_pattern"])
        self.last_step = state["last_step"]
