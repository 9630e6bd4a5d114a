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

"""The configuration, and the budget that it describes."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from .scores import check_scoring


# The share of the prunable budget that is gone after k of P pruning steps, times P³ (so: an int).
CURVES = {
    "paper": lambda k, P: k**3,  # slow first, fast last
    "adalora": lambda k, P: P**3 - (P - k) ** 3,  # fast first, slow last
}


@dataclass(frozen=True)
class BudgetSchedule:
    """The budget b(t): components per layer, on average over layers, after step t (Eq. 9).

        b(t) = b(0)                             for t ≤ tinit             warm-up: all train
             = b(0) - (b(0) - b(T)) p³          for tinit ≤ t ≤ T - tfinal
             = b(T)                             for t ≥ T - tfinal        the mask is fixed
        p    = (t - tinit) / (T - tinit - tfinal)

    with b(0) = init_r, b(T) = target_r, T = total_steps. A step is one *optimizer* step, counted
    from 1 to T; gradient accumulation counts once.

    Choice: the curve of the authors' code, which prunes the share ((b(0) - b(T)) / b(0)) p³ of all
    components: slow first, fast last. AdaLoRA's published curve is the opposite, fast first:
    b(T) + (b(0) - b(T)) (1-p)³; `curve="adalora"` gives that one.
    Choice: tinit = 15 % and tfinal = 50 % of T (the paper's Appendix E), rounded down. The authors'
    code truncates t - 0.15·T towards zero. Where 0.15·T is no whole number it prunes after step
    ⌊0.15·T⌋, as we do, and once more a step later; its further events come a step after ours.

    Read with care: `deltaT` is not part of the curve. The curve says how many may stay at step t;
    components are only taken away at every deltaT-th step, and at the last one.

    Raises ValueError for a value out of range or no whole number, naming what would be right.
    """

    init_r: int
    target_r: int
    total_steps: int
    tinit: int | Any = None  # None may be given; __post_init__ puts an int in its place
    tfinal: int | Any = None
    deltaT: int = 10
    curve: str = "paper"

    def __post_init__(self) -> None:
        T = self._make_whole("total_steps")
        for name, default in (("tinit", 15 * T // 100), ("tfinal", T // 2)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)  # the dataclass is frozen from here on
        for name in ("init_r", "target_r", "deltaT"):
            self._make_whole(name)
        for name in ("tinit", "tfinal"):
            self._make_whole(name, least=0)
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r = {self.target_r} is above init_r = {self.init_r}: components are only "
                f"taken away, so start with init_r ≥ {self.target_r} (the paper: 1.5 × target_r)"
            )
        if self.tinit + self.tfinal >= T:
            raise ValueError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal} leaves no step to prune in: "
                f"it must be less than total_steps = {T}"
            )
        if not isinstance(self.curve, str) or self.curve not in CURVES:
            raise ValueError(f"curve = {self.curve!r}: must be one of {', '.join(CURVES)}")

    def _make_whole(self, name: str, least: int = 1) -> int:
        """Replace a number such as 100.0 by its int; raises ValueError for any other value."""
        value = getattr(self, name)
        whole = isinstance(value, Integral) or (isinstance(value, Real) and value % 1 == 0)
        if not whole or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")
        object.__setattr__(self, name, int(value))
        return int(value)

    @property
    def t_end(self) -> int:
        """The last step at which components are taken away: T - tfinal."""
        return self.total_steps - self.tfinal

    def _progress(self, step: int) -> tuple[int, int]:
        """(k, P): pruning steps done and in all, so that p = k / P."""
        return min(max(step - self.tinit, 0), self.t_end - self.tinit), self.t_end - self.tinit

    def budget(self, step: int) -> float:
        """b(t) of Eq. 9, a real number: for plots and logs."""
        k, P = self._progress(step)
        return self.init_r - (self.init_r - self.target_r) * CURVES[self.curve](k, P) / P**3

    def keep_count(self, step: int, n_components: int) -> int:
        """How many of n_components may stay at this step, over all layers together.

        In whole numbers: floats miss the exact end by one every so often. At t_end exactly
        n · b(T) / b(0) stay; the number taken away is rounded down on the way there.
        """
        k, P = self._progress(step)
        gone = n_components * (self.init_r - self.target_r) * CURVES[self.curve](k, P)
        return n_components - gone // (self.init_r * P**3)

    def prunes_at(self, step: int) -> bool:
        """True every deltaT steps from tinit to t_end, and always at t_end."""
        if not self.tinit <= step <= self.t_end:
            return False
        return (step - self.tinit) % self.deltaT == 0 or step == self.t_end

    def pruning_ended(self, step: int) -> bool:
        """True once the mask is fixed: after t_end, not yet at it."""
        return step > self.t_end

    def settled(self, step: int) -> bool:
        """Whether what is measured after this step counts: pruning has ended, or nothing follows.

        The two differ with tfinal = 0 alone: then the last step is t_end, and what is measured
        after it is measured after the last cut.
        """
        return self.pruning_ended(step) or step == self.total_steps


@dataclass
class DrLoraConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`DrLoraModel`], dynamic-rank DoRA.

    Every adapted matrix starts with `init_r` rank-1 components. While training, the weakest of all matrices together
    are set to zero, until `target_r` are left in a matrix on average: some matrices keep many, some few. Call
    `model.base_model.update_and_allocate(step)` after each optimizer step and before `zero_grad()`, as with AdaLoRA.

    Args:
        init_r (`int`):
            The number of rank-1 components of each matrix at the start. No matrix can end with more.
        target_r (`int`):
            The number of components of a matrix at the end, on average over all matrices.
        total_step (`int`):
            The number of optimizer steps of the whole training. It must be given before training starts.
        tinit (`int`):
            The number of steps before the first component is pruned. Defaults to 15 % of `total_step`.
        tfinal (`int`):
            The number of steps after the last component was pruned, in which the ranks stay. Defaults to 50 % of
            `total_step`.
        deltaT (`int`):
            The number of steps between two prunings.
        curve (`str`):
            How the number of components falls: 'paper' (slowly at first) or 'adalora' (slowly at the end).
        beta (`float`):
            How much of the moving average of a component's score is kept from step to step, from 0 to below 1.
        score (`str`):
            What a component is judged by. 'frobenius_share' (the paper's): the norm of the component, divided by the
            norm of its matrix's whole update. 'frobenius_norm': the norm alone. 'output_norm': how much it changes the
            matrix's outputs. 'loss_sensitivity': how much it changes the loss, by its gradient. 'abs_c': the size of
            its scalar. 'random': nothing, as a control.
        seed (`int`):
            The seed of the score 'random'.
        dem_weight (`float`):
            The weight of the paper's regularizer, the variance of the elements within each vector. If it is not 0, add
            `dem_weight * model.dem_loss()` to the loss until pruning has ended; a step without it raises an error.
        lora_alpha (`float`):
            The update is multiplied by `lora_alpha / init_r`, which stays the same while components are pruned.
        lora_dropout (`float`):
            The dropout probability on the input of the components.
        target_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to apply the adapter to. When passing a string, a regex match will be performed.
            When passing a list of strings, either an exact match will be performed or it is checked if the name of the
            module ends with any of the passed strings. If this is 'all-linear', then all linear modules are chosen,
            excluding the output layer. If this is not specified, modules will be chosen according to the model
            architecture.
        exclude_modules (`Optional[Union[List[str], str]]`):
            The names of the modules to not apply the adapter to, matched in the same way.
        modules_to_save (`Optional[List[str]]`):
            List of modules apart from adapter layers to be set as trainable and saved in the final checkpoint.
        layers_to_transform (`Optional[Union[List[int], int]]`):
            The layer indices to transform. If this is specified, only the layers at these indices are adapted.
        layers_pattern (`Optional[Union[List[str], str]]`):
            The layer pattern name, used only if `layers_to_transform` is different from `None`. This should target the
            `nn.ModuleList` of the model, which is often called 'layers' or 'h'.
        init_weights (`bool`):
            Whether the adapter starts as the identity. `False` draws the scalars of the components at random, which is
            of use for tests alone.
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
    init_weights: bool = field(default=True, metadata={"help": "False: start with a random update"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.DRLORA
        for name, value in vars(self).items():
            if hasattr(value, "item"):  # a number of numpy's or torch's, which JSON does not have
                setattr(self, name, value.item())
        for name in ("target_modules", "exclude_modules"):  # PEFT wants sets, JSON gives lists
            value = getattr(self, name)
            if not isinstance(value, str | None):
                setattr(self, name, set(value))
        if (names := self.modules_to_save) is not None:  # PEFT puts more into this list
            self.modules_to_save = [names] if isinstance(names, str) else list(names)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty: name linear layers, or leave it out")
        self.from_file = False  # whether the head, too, is known from a saved adapter
        self._check_kinds()
        steps = 10**9 if self.total_step is None else self.total_step  # else: what can be checked
        BudgetSchedule(self.init_r, self.target_r, steps, self.tinit, self.tfinal, self.deltaT, self.curve)
        check_scoring(self.score, self.beta)

    def _check_kinds(self) -> None:
        for name in ("init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT", "seed"):
            value = getattr(self, name)
            optional = name in ("total_step", "tinit", "tfinal")
            if type(value) is not int and not (value is None and optional):
                raise ValueError(f"{name} = {value!r}: must be a whole number")
        for name, least in (("lora_alpha", "above 0"), ("dem_weight", "0 (no DEM) or more")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name == "lora_alpha"):
                raise ValueError(f"{name} = {value!r}: must be {least}")
        if not (isinstance(self.lora_dropout, int | float) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout = {self.lora_dropout!r}: must be at least 0, below 1")
        if not isinstance(self.score, str):
            raise ValueError(f"score = {self.score!r}: must be a name, since it is saved")

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        config = super().from_pretrained(*args, **kwargs)
        config.from_file = True
        return config

    def schedule(self) -> BudgetSchedule:
        """Eq. 9 with these numbers. Raises ValueError while total_step is None."""
        if self.total_step is None:
            raise ValueError(
                "total_step is missing: give DrLoraConfig the number of optimizer steps of the whole training"
            )
        steps = self.total_step, self.tinit, self.tfinal, self.deltaT
        return BudgetSchedule(self.init_r, self.target_r, *steps, self.curve)
