"""The configuration of the PEFT tuner, and the name under which PEFT finds it."""

import math
from dataclasses import dataclass, field
from typing import cast

from peft import PeftConfig, PeftType

from drlora_ref.allocator import check_scoring
from drlora_ref.schedule import BudgetSchedule


class _MethodName(str):
    """A string that answers where PEFT asks a member of PeftType for its value or name.

    It equals and hashes as the plain string that stands in a saved adapter_config.json. Where this
    package was not imported, PEFT's error is a KeyError with this name: so it names the package.
    """

    value = name = property(str.__str__)


# To a type checker it is what it stands in for.
DYNAMIC_RANK = cast(PeftType, _MethodName("drlora_ref.DYNAMIC_RANK"))


@dataclass
class DynamicRankConfig(PeftConfig):
    """What get_peft_model needs for dynamic-rank DoRA. Names are PEFT's, as in its AdaLoRA.

    total_step is T, the number of optimizer steps of the whole training: DynamicRankCallback fills
    it in, a loop of your own must. tinit and tfinal are steps too; by default 15 % and 50 % of T,
    as in the paper. target_modules: names or ends of names, a regular expression, or "all-linear";
    by default the six matrices of every layer for RoBERTa, BERT, MPNet and BART, and the seven of
    Llama's kin (inject.BASE_MODELS), else what PEFT takes for LoRA. modules_to_save are trained
    whole; the head (inject.head_modules) is among them by itself where task_type is SEQ_CLS,
    TOKEN_CLS or QUESTION_ANS, in a multiple-choice model, and wherever from_pretrained had no
    weights for a module. dem_weight is the η of Eq. 10 as printed (the authors' code halves the
    term). score is a name in drlora_ref.SCORES, seed is that of the score "random".

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
        BudgetSchedule(
            self.init_r, self.target_r, steps, self.tinit, self.tfinal, self.deltaT, self.curve
        )
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
                "total_step is missing: give DynamicRankConfig the number of optimizer steps of "
                "the whole training (DynamicRankCallback fills it in)"
            )
        steps = self.total_step, self.tinit, self.tfinal, self.deltaT
        return BudgetSchedule(self.init_r, self.target_r, *steps, self.curve)
