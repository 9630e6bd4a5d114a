"""Every parameter of a run, with its unit, in one place; and every check that needs no data."""

import hashlib
import inspect
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from fractions import Fraction

from drlora_ref.experiments.given import check_kind, check_name, shown
from drlora_ref.experiments.methods import METHODS, check_method
from drlora_ref.experiments.tasks.families import FAMILIES
from drlora_ref.importance import SCORES
from drlora_ref.regularizer import PENALTIES
from drlora_ref.schedule import BudgetSchedule
from drlora_ref.train import count_steps

SCORINGS = ("official", "authors")
ATTENTIONS = ("auto", "eager", "sdpa")
PRECISIONS = {"auto": "", "fp32": "no", "bf16": "bf16"}  # our words, and accelerate's


@dataclass(frozen=True)
class Settings:
    """All parameters of a run: what its record holds, and what notebooks and grids may set.

    Where Table 8 and Appendix E give a value for CoLA, it is the default; the rest is the authors'
    code's (lora_alpha, lora_dropout) or ours. Raises ValueError, naming the parameter, for a value
    of the wrong kind, out of range, or impossible beside the others: what is planned can be run.

    Read with care: with one lora_alpha the methods do not have one scale. At 6 components cut to 2,
    drlora's update is a third as strong as lora's. Compare them where each has its own best rate.
    """

    task: str = "cola"  # a name in FAMILIES
    data_dir: str = ""  # a folder in the original format; "": a variable, else the hub
    model_name: str = "roberta-base"  # or a folder, another name on the hub, minilm-l6
    method: str = "drlora"  # a name in METHODS
    seed: int = 0  # of the head, the adapters, the order of the data and dropout
    init_r: int = 3  # b(0), components per matrix at the start, where a method prunes
    target_r: int = 2  # b(T), components per matrix at the end, on average; lora: its rank
    rank_map: str = ""  # lora: a record, a folder of them, or a file with a rank for each matrix
    permute_map: int = 0  # seed by which matrices of one shape swap their ranks; 0: they do not
    bottleneck: int = 8  # hidden units of an adapter: h-adapter and p-adapter
    learning_rate: float = 2e-3  # of AdamW, at its highest
    batch_size: int = 16  # examples, on all devices together
    epochs: int = 45  # passes over the training set
    max_steps: int = 0  # optimizer steps in all, T; 0: the epochs decide
    max_length: int = 128  # tokens; what is longer is cut (SQuAD: read in windows)
    group_by_length: bool = False  # True: a batch has rows of about one length, so less padding
    train_size: int = 0  # training examples, drawn at random; 0: all
    holdout: int = 0  # training examples never trained on, the same for every seed: a second test
    dem_weight: float = 0.15  # η, the weight of Eq. 10 as printed, or of another penalty
    penalty: str = "dem"  # Eq. 10; or one of its rivals: l1, l2, spectral
    tinit: float = 0.15  # share of all steps before the first pruning event
    tfinal: float = 0.5  # share of all steps after the last one; 0: it is the last act
    deltaT: int = 10  # optimizer steps between two pruning events
    beta: float = 0.9  # memory of the smoothed score, Eq. 8
    score: str = "frobenius_share"  # or frobenius_norm, output_norm, loss_sensitivity, random, ...
    uniform: bool = False  # True: every matrix keeps as many, its own best: a control of drlora
    curve: str = "paper"  # Eq. 9; or adalora
    lora_alpha: float = 8.0  # scaling: lora_alpha / init_r (drlora, prune-once), / target_r (lora)
    lora_dropout: float = 0.1  # share of a layer's input that its adapter does not see
    weight_decay: float = 0.0  # of AdamW
    warmup: float = 0.06  # share of all steps in which the learning rate rises
    max_grad_norm: float = 1.0  # longer gradients are cut to this length
    grad_accumulation: int = 1  # batches per optimizer step
    eval_batch_size: int = 64  # examples, in evaluation
    precision: str = "auto"  # fp32, bf16, or auto: bf16 on a GPU
    capture: bool = False  # True: a GPU replays the step as a graph, one for each length
    attention: str = "auto"  # eager, sdpa, or auto: as transformers chooses for the model
    fused_adamw: bool = False  # True: AdamW in one kernel; replicas' always is
    frozen_bf16: bool = False  # True: frozen matrices are kept in bfloat16; needs precision bf16
    compile_encoder: bool = False  # True: torch.compile of the pretrained part
    stride: int = 128  # tokens that two windows of one text share: SQuAD
    summary_length: int = 64  # tokens of a summary, at most: XSum
    num_beams: int = 3  # beams of the search for a summary: XSum
    scoring: str = "official"  # of SQuAD and XSum; or authors: as the paper's code counts
    film_events: int = 0  # pruning events kept with all scores and masks (events.npz); 0: none
    checkpoint_every: int = 500  # optimizer steps; one is also written after each evaluation
    output_dir: str = "runs/mine"  # checkpoint and record go here
    overwrite: bool = False  # True: may replace a record that is there

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check_kind(field.name, value, field.default)
            # In the key a whole number is the same as a float, and -0.0 as 0.0. A whole number that
            # is too large for a float is out of range.
            if type(field.default) is float and abs(value) <= HUGE:
                object.__setattr__(self, field.name, value + 0.0)
        check_name("task", self.task, FAMILIES)
        check_method(self.method)
        check_name("precision", self.precision, PRECISIONS)
        check_name("scoring", self.scoring, SCORINGS)
        check_name("attention", self.attention, ATTENTIONS)
        if self.frozen_bf16 and self.precision == "fp32":
            raise ValueError("frozen_bf16 = True: needs precision bf16, not fp32")
        check_name("score", self.score, SCORES)
        check_name("penalty", self.penalty, PENALTIES)
        for names, (least, most), words in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if not least <= value <= most:  # nor is NaN
                    raise ValueError(f"{name} = {shown(value)}: must be {words}")
        if self.rank_map and "rank_map" not in METHODS[self.method].own:
            raise ValueError(
                f"rank_map = {shown(self.rank_map)}: only lora takes one, not {self.method}"
            )
        if self.film_events and "score" not in METHODS[self.method].own:
            raise ValueError(
                f"film_events = {self.film_events}: only drlora has scores, not {self.method}"
            )
        if self.film_events and self.uniform:
            raise ValueError(
                f"film_events = {self.film_events}: a film shows one queue of all components, and "
                "uniform pruning goes by each matrix's own"
            )
        if self.uniform and "uniform" not in METHODS[self.method].own:
            raise ValueError(f"uniform = True: only drlora takes it, not {self.method}")
        if self.permute_map and not self.rank_map:
            raise ValueError(f"permute_map = {self.permute_map}: there is no rank_map to permute")
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal}: shares of all steps, must be less "
                "than 1 together, or no step is left to prune in"
            )
        # The steps are known once the data are; every other number of Eq. 9 can be checked now.
        METHODS[self.method].check(self.schedule(self.max_steps or 10**9))

    def total_steps(self, examples: int) -> int:
        """T on this many training examples. Raises ValueError as count_steps does."""
        return count_steps(
            examples, self.batch_size, self.epochs, self.grad_accumulation, self.max_steps
        )

    def schedule(self, total_steps: int) -> BudgetSchedule:
        """Eq. 9 over so many steps; raises ValueError for numbers that do not go together.

        Methods that do not prune go through it too, with nothing to take away, so that every
        method's best score is taken over the same steps.
        """
        first_r = self.init_r if METHODS[self.method].prunes else self.target_r
        return BudgetSchedule(
            first_r,
            self.target_r,
            total_steps,
            tinit=steps_of(self.tinit, total_steps),
            tfinal=steps_of(self.tfinal, total_steps),
            deltaT=self.deltaT,
            curve=self.curve,
        )


def steps_of(share: float, total_steps: int) -> int:
    """So many steps of all, rounded down; of the decimal number as it is written.

    >>> steps_of(0.29, 100), int(0.29 * 100)  # as a float, 0.29 is a little less
    (29, 28)
    """
    return int(Fraction(str(share)) * total_steps)


MOST = 2**63 - 1  # that a tensor's size can be
HUGE = 1e37  # float32 ends at 3e38, and AdamW takes ten times the learning rate
# (parameters, the least and the greatest value of each, the same in words)
RANGES: list[tuple[str, tuple[float, float], str]] = [
    ("seed", (0, 2**32 - 1), "0 or more, and less than 2**32"),
    (
        "max_steps train_size holdout permute_map stride film_events checkpoint_every",
        (0, MOST),
        "0 or more, and less than 2**63",
    ),
    (
        "init_r target_r bottleneck batch_size epochs max_length deltaT grad_accumulation "
        "eval_batch_size summary_length num_beams",
        (1, MOST),
        "at least 1, and less than 2**63",
    ),
    ("dem_weight weight_decay", (0, HUGE), "a number, 0 or more, at most 1e37"),
    ("learning_rate lora_alpha max_grad_norm", (5e-324, HUGE), "a number above 0, at most 1e37"),
    (
        "beta lora_dropout warmup tinit tfinal",
        (0, math.nextafter(1, 0)),
        "at least 0 and less than 1",
    ),
]

# Where a run is kept, and how often it is saved, does not change what it is.
PLACES = ("output_dir", "overwrite")
NOT_IN_KEY = ("data_dir", "model_name", "rank_map", *PLACES, "checkpoint_every")
# Newer parameters, left out of a key at their defaults: so earlier runs keep the keys they have.
NEWER = (
    "holdout",
    "tinit",
    "tfinal",
    "permute_map",
    "uniform",
    "group_by_length",
    "scoring",
    "penalty",
    "film_events",
    "capture",
    "attention",
    "fused_adamw",
    "frozen_bf16",
    "compile_encoder",
)


def run_key(
    settings: Settings, fingerprint: str, model_sha256: str, rank_map_sha256: str = ""
) -> str:
    """What makes a run that run: its parameters and the hashes of its inputs, in 12 digits.

    The inputs are data, model and, where there is one, the rank map.

    >>> run_key(Settings(seed=1), "data", "model") == run_key(Settings(seed=2), "data", "model")
    False
    >>> moved = Settings(seed=1, output_dir="elsewhere", data_dir="there")
    >>> run_key(Settings(seed=1), "data", "model") == run_key(moved, "data", "model")
    True
    """
    given = {k: v for k, v in asdict(settings).items() if k not in NOT_IN_KEY}
    given = {k: v for k, v in given.items() if k not in NEWER or v != getattr(Settings, k)}
    hashes = [fingerprint, model_sha256, *([rank_map_sha256] if rank_map_sha256 else [])]
    text = json.dumps([given, *hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe() -> str:
    """Every parameter with its default and its comment, one a line: what `run --help` shows.

    >>> print(describe().splitlines()[4].strip())
    seed = 0                       of the head, the adapters, the order of the data and dropout
    """
    line = re.compile(r"    (\w+): \w+ = (.+?)  # (.+)")
    found = line.findall(inspect.getsource(Settings))
    return "\n".join(f"  {f'{name} = {default}':30} {comment}" for name, default, comment in found)
