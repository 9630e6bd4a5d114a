"""Every parameter of a run, with its unit, in one place."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from drlora_ref.experiments.given import check_kind, check_name
from drlora_ref.experiments.methods import check_method
from drlora_ref.experiments.tasks.families import FAMILIES

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # our words, and accelerate's


@dataclass(frozen=True)
class Settings:
    """All parameters of a run: what its record holds, and what notebooks and grids may set.

    Where Table 8 and Appendix E give a value for CoLA, it is the default; the rest is the authors'
    code's (lora_alpha, lora_dropout) or ours. Raises ValueError for a value of
    the wrong kind or out of range, naming the parameter.
    """

    task: str = "cola"  # a name in FAMILIES
    data_dir: str = ""  # a folder in the original format; "": a variable, else the hub
    model_name: str = "roberta-base"  # or a folder, another name on the hub, minilm-l6
    method: str = "drlora"  # a name in methods.METHODS
    seed: int = 0  # of the head, the adapters, the order of the data and dropout
    init_r: int = 3  # b(0), components per matrix at the start: drlora and adalora
    target_r: int = 2  # b(T), components per matrix at the end, on average; lora: its rank
    bottleneck: int = 8  # hidden units of an adapter: h-adapter and p-adapter
    learning_rate: float = 2e-3  # of AdamW, at its highest
    batch_size: int = 16  # examples, on all devices together
    epochs: int = 45  # passes over the training set
    max_steps: int = 0  # optimizer steps in all, T; 0: the epochs decide
    max_length: int = 128  # tokens; what is longer is cut (SQuAD: read in windows)
    train_size: int = 0  # training examples, drawn at random; 0: all
    dem_weight: float = 0.15  # η, the weight of Eq. 10 as printed
    deltaT: int = 10  # optimizer steps between two pruning events
    beta: float = 0.9  # memory of the smoothed score, Eq. 8
    score: str = "frobenius_share"  # Eq. 7; or frobenius_norm, abs_c, random
    curve: str = "paper"  # Eq. 9; or adalora
    lora_alpha: float = 8.0  # the scaling is lora_alpha / init_r (drlora) or / target_r (lora)
    lora_dropout: float = 0.1  # share of a layer's input that its adapter does not see
    weight_decay: float = 0.0  # of AdamW
    warmup: float = 0.06  # share of all steps in which the learning rate rises
    max_grad_norm: float = 1.0  # longer gradients are cut to this length
    grad_accumulation: int = 1  # batches per optimizer step
    eval_batch_size: int = 64  # examples, in evaluation
    precision: str = "auto"  # fp32, bf16, or auto: bf16 on a GPU
    stride: int = 128  # tokens that two windows of one text share: SQuAD
    summary_length: int = 64  # tokens of a summary, at most: XSum
    num_beams: int = 3  # beams of the search for a summary: XSum
    checkpoint_every: int = 500  # optimizer steps; one is also written after each evaluation
    output_dir: str = "runs/mine"  # checkpoint and record go here
    overwrite: bool = False  # True: may replace a record that is there

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            check_kind(field.name, value, field.default)
            if isinstance(field.default, float):  # so that 1 and 1.0 are the same run
                object.__setattr__(self, field.name, float(value))
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("dem_weight", "weight_decay", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup}: must be at least 0 and less than 1")
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"precision = {self.precision!r}: must be auto, fp32 or bf16")
        check_name("task", self.task, FAMILIES)
        check_method(self.method)


# Where a run is kept, and how often it is saved, does not change what it is.
PLACES = ("output_dir", "overwrite")
NOT_IN_KEY = ("data_dir", "model_name", *PLACES, "checkpoint_every")


def run_key(settings: Settings, fingerprint: str, model_sha256: str) -> str:
    """What makes a run that run: its parameters and the hashes of data and model, in 12 digits.

    >>> run_key(Settings(seed=1), "data", "model") == run_key(Settings(seed=2), "data", "model")
    False
    >>> moved = Settings(seed=1, output_dir="elsewhere", data_dir="there")
    >>> run_key(Settings(seed=1), "data", "model") == run_key(moved, "data", "model")
    True
    """
    given = {k: v for k, v in asdict(settings).items() if k not in NOT_IN_KEY}
    text = json.dumps([given, fingerprint, model_sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
