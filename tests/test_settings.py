"""The parameters of a run: what cannot be is refused before anything is looked up."""

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny
from torch import nn

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.methods import METHODS, Method, Prepared
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.settings import RANGES, Settings, describe, run_key
from drlora_ref.inject import mark_only_adapters_trainable

NAMES = [field.name for field in dataclasses.fields(Settings)]
IMPOSSIBLE = [
    ("score", "frobenious", "unknown score 'frobenious' (nearest: "),
    ("penalty", "spectrall", "unknown penalty 'spectrall' (nearest: spectral)"),
    ("curve", "papre", "curve = 'papre': must be one of"),
    ("task", "colla", "unknown task 'colla' (nearest: cola)"),
    ("method", "drlroa", "unknown method 'drlroa' (nearest: drlora)"),
    ("precision", "fp8", "unknown precision 'fp8'"),
    ("beta", 1.5, "beta = 1.5: must be at least 0 and less than 1"),
    ("lora_dropout", 2.0, "lora_dropout = 2.0: must be at least 0 and less than 1"),
    ("lora_dropout", -3, "lora_dropout = -3.0: must be at least 0"),
    ("warmup", 1.0, "warmup = 1.0: must be at least 0 and less than 1"),
    ("max_length", -3, "max_length = -3: must be at least 1"),
    ("seed", -1, "seed = -1: must be 0 or more"),
    ("batch_size", 0, "batch_size = 0: must be at least 1"),
    ("bottleneck", 0, "bottleneck = 0: must be at least 1"),
    ("lora_alpha", 0, "lora_alpha = 0.0: must be a number above 0"),
    ("max_grad_norm", math.inf, "max_grad_norm = inf: must be a number above 0"),
    ("learning_rate", math.nan, "learning_rate = nan: must be a number above 0"),
    ("dem_weight", -0.1, "dem_weight = -0.1: must be a number, 0 or more"),
    ("max_steps", 2**63, f"max_steps = {2**63}: must be"),
    ("target_r", 4, "target_r = 4 is above init_r = 3"),
    ("deltaT", 0, "deltaT = 0: must be at least 1"),
    ("learning_rate", "1e-3", "learning_rate = '1e-3': expected a number, as 0.002 (YAML reads"),
    ("epochs", 1.5, "epochs = 1.5: expected a whole number, as 45"),
    ("overwrite", 1, "overwrite = 1: expected true or false, as False"),
]
each_impossible = pytest.mark.parametrize(
    "name, value, message", IMPOSSIBLE, ids=[f"{name}={value}" for name, value, _ in IMPOSSIBLE]
)


@each_impossible
def test_a_value_that_cannot_be_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError) as refused:
        Settings(**{name: value})
    assert message in str(refused.value)


# Those that a notebook's own check of kinds lets through, or says in the same words.
@pytest.mark.parametrize("name, value, message", IMPOSSIBLE[::4])
def test_every_door_refuses_it_in_the_same_words_before_any_work(
    name, value, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    notebook = Path(__file__).parents[1] / "notebooks" / "10_roberta_glue.ipynb"
    grid = {"notebook": str(notebook), "parameters": {name: value, "data_dir": "generated"}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    Path("run.yaml").write_text(yaml.safe_dump({name: value, "data_dir": "generated"}))
    for words in (["run", "out", "-f", "run.yaml"], ["grid", "grid.yaml"]):
        assert main(words) == 1
        error = capsys.readouterr().err.strip()
        # The notebook's own default is the example that it gives.
        message = message.replace(", as 0.002", "") if "grid" in words else message
        assert message in error.replace(", as 0.01", "") and "\n" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"grid.yaml", "run.yaml"}


NUMBERS = [f for f in dataclasses.fields(Settings) if type(f.default) in (int, float)]
NO_NUMBERS = [True, None, "1", [1], {1: 2}, 1j, b"1"]
OUT_OF_RANGE = [math.nan, math.inf, -math.inf, -1, -(2**63), 10**400, -(10**400), 10**5000]
WHOLE = [2**63, 2**64, 0.5, 1.0, 1e300]  # what no whole number can be
REAL = [1e38, 3.5e38, 1e300, 2**127]  # what no other number can be


@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_a_number_that_is_none(method):
    for field in NUMBERS:
        of_its_kind = REAL if type(field.default) is float else WHOLE
        for value in [*NO_NUMBERS, *OUT_OF_RANGE, *of_its_kind]:
            with pytest.raises(ValueError, match=rf"^{field.name} = ") as refused:
                Settings(method=method, **{field.name: value})
            assert len(str(refused.value)) < 400


# AdamW takes ten times the learning rate, a scaling is a quotient: none of it leaves float32.
EXTREME = {"learning_rate": 1e37, "lora_alpha": 1e37, "weight_decay": 1e37, "dem_weight": 1e37,
           "max_grad_norm": 1e-300}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_and_the_least_numbers_end_in_a_record(method, tmp_path):
    for name, value in EXTREME.items():
        given = {"method": method, "max_steps": 4, name: value}
        record = one_run.run(tiny(tmp_path / name, **given))
        assert record["status"] in ("completed", "collapsed", "diverged")


def test_minus_zero_is_zero_in_the_key():
    assert run_key(Settings(dem_weight=-0.0), "", "") == run_key(Settings(dem_weight=0), "", "")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(init_r=33), "rank 33: .* can have 32 at most"),
        (dict(method="lora", target_r=2**62), "rank 4611686018427387904"),
        (dict(method="adalora", init_r=2**40), "rank 1099511627776"),
        (dict(method="p-adapter", bottleneck=2**62), "bottleneck = 4611686018427387904"),
        (dict(method="h-adapter", bottleneck=33), "bottleneck = 33: must be at most 32"),
        (dict(max_length=1), "max_length = 1: must be 3 or more, since 2 tokens are special"),
        (dict(max_length=2), "max_length = 2: must be 3 or more"),
        (dict(task="mrpc", max_length=5), "max_length = 5: must be 6 or more, since 4 tokens"),
        (
            dict(task="xsum", model_name="tiny-bart", summary_length=2),
            "summary_length = 2: must be 3",
        ),
    ],
)
def test_what_no_model_of_this_size_can_have_is_refused_before_training(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        one_run.set_up(tiny(tmp_path, **given))


def test_every_number_has_a_range():
    numbers = {f.name for f in dataclasses.fields(Settings) if type(f.default) in (int, float)}
    assert numbers == {name for names, _, _ in RANGES for name in names.split()}


def test_whole_numbers_will_do_where_real_ones_are_meant():
    assert Settings(lora_alpha=8) == Settings(lora_alpha=8.0)


def test_what_a_method_cannot_do_is_refused_where_it_is_planned():
    with pytest.raises(ValueError, match="adalora: init_r must be above target_r = 2"):
        Settings(method="adalora", init_r=2)
    Settings(method="lora", init_r=1)  # lora has no init_r, so it cannot be wrong


def test_help_lists_every_parameter_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        (line,) = [x for x in shown.splitlines() if x.strip().startswith(f"{field.name} = ")]
        assert len(line.split("  ")[-1]) > 5
    assert len(describe().splitlines()) == len(NAMES)


def test_a_method_with_a_parameter_of_its_own_needs_its_function_and_a_field(tmp_path, monkeypatch):
    """Added on the fly: no other list names methods or their parameters."""

    def scaled_head(model: nn.Module, schedule, *, head_scale: float = 1.0) -> Prepared:
        for name, parameter in mark_only_adapters_trainable(model).named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.data *= head_scale
        return Prepared(model)

    monkeypatch.setitem(METHODS, "scaled-head", Method(scaled_head))
    own = dataclasses.field(default=1.0)
    More = dataclasses.make_dataclass(
        "More", [("head_scale", float, own)], bases=(Settings,), frozen=True
    )
    given = dict(task="cola", data_dir="generated", model_name="tiny-roberta", max_steps=4)
    losses = []
    for head_scale in (0.0, 5.0):
        settings = More(
            **given,
            method="scaled-head",
            head_scale=head_scale,
            output_dir=f"{tmp_path}/{head_scale}",
        )
        record = one_run.run(settings)
        assert record["parameters"]["head_scale"] == head_scale
        losses.append(record["loss_curve"][0])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) != losses[1]
    with pytest.raises(ValueError, match="expected a number, as 1"):
        More(**given, method="scaled-head", head_scale="high")
