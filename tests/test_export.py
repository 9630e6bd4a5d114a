"""A stock LoRA adapter out of a trained model: the same logits, and nobody need import us."""

import ast
import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_BART, needs_minilm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trainer_script import adapted, arguments, base_model, rows, token_ids, trainer
from transformers import AutoModelForSequenceClassification

from drlora_ref import (
    RankOneComponents,
    dynamic_layers,
    inject_adapters,
    mark_only_adapters_trainable,
    merge_adapters,
)
from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.plotting import plot_rank_heatmap
from drlora_ref.tuner import DynamicRankConfig, export
from drlora_ref.tuner.export import export_lora, fold
from drlora_ref.tuner.trainer import DynamicRankTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "rank_map.png"}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(16)).logits


def loaded(folder, base=None):
    model = PeftModel.from_pretrained(base or base_model(), folder)
    assert type(model.base_model).__name__ == "LoraModel"
    return model


def assert_same_logits(one, other) -> None:
    torch.testing.assert_close(logits(one), logits(other), atol=1e-5, rtol=0)


@pytest.fixture
def trained(tmp_path):
    """Every c away from zero, the head as well trained as random numbers are, ranks 0 to 3."""
    run = trainer(tmp_path / "run", adapted(dem_weight=0.0), learning_rate=0.05)
    run.train()
    model = run.model.eval()
    first, second, *_ = model.base_model.adapted_layers().values()
    first.component_mask.fill_(False)
    first.lora_c.data.zero_()
    second.component_mask.fill_(True)
    nn.init.normal_(second.lora_c)
    return model


def ours():
    """A model of inject_adapters with ranks 1, 2 and 3."""
    model = mark_only_adapters_trainable(inject_adapters(base_model(), r=3))
    for i, layer in enumerate(dynamic_layers(model).values()):
        nn.init.normal_(layer.lora_c)
        layer.component_mask[: i % 3] = False
        layer.lora_c.data *= layer.component_mask
    nn.init.normal_(model.classifier.dense.weight)
    return model


def test_folded_matrices_multiply_to_the_update():
    layer = RankOneComponents(7, 9, r=5, dtype=torch.float64)
    nn.init.normal_(layer.lora_c)
    layer.component_mask[[1, 3]] = False
    A, B = fold(layer)
    assert A.shape == (3, 7) and B.shape == (9, 3)
    torch.testing.assert_close(B @ A, layer.delta_weight())
    A, B = fold(layer, pad_to=8)
    assert A.shape == (8, 7) and not A[3:].any() and not B[:, 3:].any()
    torch.testing.assert_close(B @ A, layer.delta_weight())


def test_stock_peft_in_another_process_gives_the_same_logits(trained, tmp_path):
    """Head included, one matrix of rank 0 among them; the other process never imports us."""
    export_lora(trained, tmp_path / "own")
    export_lora(trained, tmp_path / "padded", uniform=True)
    trained.save_pretrained(tmp_path / "not exported")
    torch.save(base_model().state_dict(), tmp_path / "base.pt")
    base_model().config.save_pretrained(tmp_path)
    torch.save({"ids": token_ids(16), "logits": logits(trained)}, tmp_path / "expected.pt")
    code = """
import sys, torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

expected = torch.load("expected.pt")
for folder in ("own", "padded"):
    base = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained("."))
    base.load_state_dict(torch.load("base.pt"))
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        difference = (model(input_ids=expected["ids"]).logits - expected["logits"]).abs().max()
    print(folder, type(model.base_model).__name__, float(difference))
print([name for name in sys.modules if name.startswith("drlora_ref")])
try:
    PeftConfig.from_pretrained("not exported")
except KeyError as error:  # PEFT's own, which names the package that is missing
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    own, padded, imported, refused = done.stdout.splitlines()
    for line in (own, padded):
        _, kind, difference = line.split()
        assert kind == "LoraModel" and float(difference) < 1e-5
    assert imported == "[]" and refused == "'drlora_ref.DYNAMIC_RANK'"
    assert not torch.allclose(logits(base_model()), logits(trained), atol=1e-2)


def test_only_surviving_components_are_written(trained, tmp_path):
    ranks = export_lora(trained, tmp_path / "out")
    assert ranks == trained.rank_pattern() and min(ranks.values()) == 0
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        A = tensors.get(f"base_model.model.{name}.lora_A.weight")
        assert (A is None) if rank == 0 else len(A) == rank
    assert not [name for name in tensors if "dynamic_rank" in name or "lora_c" in name]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["lora_alpha"] == settings["r"] == 3
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert settings["target_modules"] == sorted(n for n, rank in ranks.items() if rank)


def test_uniform_pads_every_matrix_to_the_largest_rank(trained, tmp_path):
    export_lora(trained, tmp_path / "out", uniform=True)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["r"] == 3 and not settings["rank_pattern"] and not settings["alpha_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {3}
    assert_same_logits(loaded(tmp_path / "out"), trained)


def test_the_page_long_loops_model_is_exported_alike(tmp_path):
    model = ours()
    ranks = export_lora(model, tmp_path / "out")
    assert set(ranks.values()) == {1, 2, 3}
    other = loaded(tmp_path / "out")
    assert_same_logits(other, model)
    assert_same_logits(other.merge_and_unload(), merge_adapters(model))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"  # what PEFT's AutoPeftModel goes by


def test_one_adapter_of_several_is_exported(trained, tmp_path):
    expected = copy.deepcopy(trained)
    trained.add_adapter("other", DynamicRankConfig(init_r=2, target_r=2, task_type="SEQ_CLS"))
    trained.set_adapter("other")
    export_lora(trained, tmp_path / "out", adapter_name="default")
    assert_same_logits(loaded(tmp_path / "out"), expected)


class Nested(nn.Module):
    """The name of one matrix is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(6, 6)
        self.encoder = nn.ModuleDict({"query": nn.Linear(6, 6), "queryX": nn.Linear(6, 6)})

    def forward(self, x):
        return self.encoder["queryX"](self.encoder["query"](self.query(x)))


@pytest.mark.parametrize("emptied", ["encoder.query", "query"])
def test_a_name_that_ends_another_is_not_adapted_by_mistake(emptied, tmp_path):
    model = inject_adapters(Nested(), ["query", "queryX"], r=2, lora_dropout=0.0)
    for i, (name, layer) in enumerate(dynamic_layers(model).items()):
        nn.init.normal_(layer.lora_c)
        layer.component_mask[: i % 2] = False
        if name == emptied:
            layer.component_mask.fill_(False)
        layer.lora_c.data *= layer.component_mask
    export_lora(model, tmp_path / "out")
    x = torch.randn(3, 6)
    other = loaded(tmp_path / "out", Nested())
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=0)
    assert type(other.get_submodule(f"base_model.model.{emptied}")) is nn.Linear
    assert "base = ...  # the Nested that was adapted" in (tmp_path / "out/README.md").read_text()


def test_ranks_belong_to_whole_names_not_to_ends(tmp_path):
    """rank_pattern's keys are regular expressions that PEFT would also find at a name's end."""
    model = inject_adapters(Nested(), ["query", "queryX"], r=3)
    for layer, rank in zip(dynamic_layers(model).values(), (1, 3, 2), strict=True):
        layer.component_mask[rank:] = False
    assert export_lora(model, tmp_path / "out") == {
        "query": 1,
        "encoder.query": 3,
        "encoder.queryX": 2,
    }
    modules = dict(loaded(tmp_path / "out", Nested()).base_model.model.named_modules())
    for name, rank in {"query": 1, "encoder.query": 3, "encoder.queryX": 2}.items():
        assert modules[name].r["default"] == rank, (
            "PEFT reads the keys of rank_pattern otherwise than as regular expressions of a name"
        )
        assert modules[name].scaling["default"] == 1


def test_the_card_names_model_task_metric_and_shows_the_ranks(trained, tmp_path):
    facts = dict(base_model="FacebookAI/roberta-base", task="CoLA", metric={"Matthews": 0.61234})
    export_lora(trained, tmp_path / "out", **facts)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "FacebookAI/roberta-base"
    for fact in ("| task | CoLA |", "| Matthews | 0.6123 |", "| rank | 0 to 3 |"):
        assert fact in card.text
    assert "(rank_map.png)" in card.text
    assert (tmp_path / "out" / "rank_map.png").read_bytes().startswith(b"\x89PNG")
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    assert "RobertaForSequenceClassification.from_pretrained" in code and "num_labels=2" in code
    compile(code, "card", "exec")


def test_a_local_base_model_leaves_no_path_in_the_card(trained, tmp_path):
    folder = tmp_path / "my-encoder"
    folder.mkdir()
    export_lora(trained, tmp_path / "out", base_model=str(folder))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "my-encoder (a local folder)" in text and str(tmp_path) not in text
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(folder)  # PEFT's own file says what PEFT's own file says


def test_a_bar_in_a_name_does_not_break_the_cards_table(trained, tmp_path):
    export_lora(trained, tmp_path / "out", task="a|b", metric={"x|y": 1})
    text = (tmp_path / "out" / "README.md").read_text()
    assert r"| task | a\|b |" in text and r"| x\|y | 1 |" in text


SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=32)  # fmt: skip
T5 = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
          decoder_start_token_id=0)  # fmt: skip


@pytest.mark.parametrize(
    "kind, sizes, end, task, targets, matrices",
    [
        ("Llama", SMALL, "ForCausalLM", "CAUSAL_LM", "all-linear", 7),
        ("Roberta", SMALL | {"max_position_embeddings": 70}, "ForQuestionAnswering",
         "QUESTION_ANS", None, 6),
        ("Bart", TINY_BART, "ForConditionalGeneration", "SEQ_2_SEQ_LM", "all-linear", 16),
        ("T5", T5, "ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "v"], 6),
    ],
)  # fmt: skip
def test_other_kinds_of_models_go_through_tuner_export_and_picture(
    kind, sizes, end, task, targets, matrices, tmp_path
):
    def base():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**sizes)
        return getattr(transformers, kind + end)(config)

    config = DynamicRankConfig(init_r=3, target_r=2, total_step=12, deltaT=1, task_type=task,
                               target_modules=targets)  # fmt: skip
    model, ids = get_peft_model(base(), config), token_ids(4)
    labels = {"labels": ids} if task != "QUESTION_ANS" else dict.fromkeys(
        ("start_positions", "end_positions"), torch.arange(4))  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 13):
        model(input_ids=ids, **labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_and_allocate(step)
    ranks = export_lora(model.eval(), tmp_path)
    assert len(ranks) == matrices and sum(ranks.values()) == 2 * matrices
    stock = loaded(tmp_path, base()).eval()
    with torch.no_grad():
        one, other = (m(input_ids=ids, **labels) for m in (model, stock))
    torch.testing.assert_close(one.loss, other.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=0)
    texts = plot_rank_heatmap(ranks).texts
    assert len([text for text in texts if text.get_text() != "nan"]) == matrices  # none is hidden


def test_it_is_pushed_by_pefts_own_method(trained, tmp_path, monkeypatch):
    export_lora(trained, tmp_path / "out")
    pushed = set()

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id, url="made-up")

        def create_commit(self, repo_id, operations, **kwargs):
            pushed.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no search for a card
    loaded(tmp_path / "out").push_to_hub("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= pushed
    pushed.clear()
    trained.push_to_hub("me/adapter")  # the dynamic-rank adapter itself, too
    assert {"adapter_config.json", "adapter_model.safetensors"} <= pushed


def test_nothing_is_pickled(trained, tmp_path):
    export_lora(trained, tmp_path / "out")
    trained.save_pretrained(tmp_path / "adapter")
    names = {p.suffix for folder in ("out", "adapter") for p in (tmp_path / folder).iterdir()}
    assert names == {".json", ".safetensors", ".md", ".png"}


# --- what is refused ---------------------------------------------------------------------------


def test_a_model_that_lost_everything_has_no_lora_form(tmp_path):
    model = ours()
    for layer in dynamic_layers(model).values():
        layer.component_mask.fill_(False)
        layer.lora_c.data.zero_()
    with pytest.raises(ValueError, match="no component survives in any of 12 matrices: a LoRA of"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_pruning_has_not_ended_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pruning has not ended"):
        export_lora(adapted(total_step=100), tmp_path / "out")
    revived = ours()
    for layer in dynamic_layers(revived).values():
        nn.init.ones_(layer.lora_c)
    with pytest.raises(ValueError, match="a component that was pruned is not zero"):
        export_lora(revived, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_a_model_without_components_is_refused(kind, tmp_path):
    model = base_model()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="has no dynamic-rank"):
        export_lora(model, tmp_path / "out")


def test_an_adapter_that_is_there_is_not_overwritten_unasked(trained, tmp_path):
    export_lora(trained, tmp_path / "out", task="first")
    with pytest.raises(FileExistsError, match=r"out has .* already: name another, or overwrite"):
        export_lora(trained, tmp_path / "out", task="second")
    assert "first" in (tmp_path / "out" / "README.md").read_text()
    export_lora(trained, tmp_path / "out", task="second", overwrite=True)
    assert "second" in (tmp_path / "out" / "README.md").read_text()


def test_a_readme_of_somebody_else_is_not_overwritten_unasked(trained, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has README\.md already"):
        export_lora(trained, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"README\.md is a file: name a folder"):
        export_lora(trained, tmp_path / "README.md")


@pytest.mark.parametrize("metric", [
    {"accuracy": "0.93"}, 0.93, "0.93", {"accuracy": None}, {"a": np.array([1.0, 2.0])},
    {"a": torch.ones(2)}, {"a": np.array("x")}, ["accuracy"],
])  # fmt: skip
def test_a_metric_that_is_no_number_with_a_name_is_refused(metric, trained, tmp_path):
    with pytest.raises(TypeError, match=r"as \{'accuracy': 0.93\}"):
        export_lora(trained, tmp_path / "out", metric=metric)
    assert not (tmp_path / "out").exists()


EXTRAS = {
    "a bias": "roberta.encoder.layer.0.attention.self.query.bias",
    "a frozen weight": "roberta.encoder.layer.1.output.dense.weight",
    "a norm": "roberta.embeddings.LayerNorm.weight",
    "embeddings": "roberta.embeddings.word_embeddings.weight",
    "added tokens": "roberta.embeddings.token_type_embeddings.weight",
    "positions": "roberta.embeddings.position_embeddings.weight",
}


@pytest.mark.parametrize("door", ["core", "peft"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_else_was_trained_is_not_dropped_in_silence(extra, door, tmp_path):
    """PEFT's door says how it can be kept."""
    model = ours() if door == "core" else adapted(init_r=2, target_r=2, dem_weight=0.0)
    word = EXTRAS[extra].removeprefix("roberta.")
    before, _, last = word.rpartition(".")
    found = [
        p
        for n, p in model.named_parameters()
        if before in n and n.endswith(last) and "lora" not in n
    ]
    assert len(found) == 1
    found[0].requires_grad_(True)
    way = "freeze it" if door == "core" else "name its module in modules_to_save"
    message = (
        rf"{re.escape(before)}.*{last} was trained too, and a LoRA adapter cannot hold it: {way}"
    )
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found[0].requires_grad_(False)
    export_lora(model, tmp_path / "out")


@pytest.mark.parametrize("whole", [
    ["LayerNorm"], ["word_embeddings"], ["intermediate"], ["classifier.dense"],
    ["roberta.embeddings"],
])  # fmt: skip
def test_what_is_trained_whole_is_exported(whole, tmp_path):
    model = adapted(init_r=2, target_r=2, dem_weight=0.0, modules_to_save=whole)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    export_lora(model, tmp_path / "out")
    assert_same_logits(loaded(tmp_path / "out"), model)
    assert not torch.allclose(logits(base_model()), logits(model), atol=1e-2)


@pytest.mark.parametrize("whole, inner", [
    (["embeddings"], "roberta.embeddings.word_embeddings"), (["dense"], "classifier.dense"),
    (["roberta.embeddings", "LayerNorm"], "roberta.embeddings.LayerNorm"),
])  # fmt: skip
def test_what_would_be_saved_twice_over_is_refused_by_name(whole, inner):
    """PEFT would wrap it inside what it wraps already, and could not load what is saved of it."""
    with pytest.raises(ValueError, match=rf"modules_to_save: {re.escape(inner)} has a name that"):
        adapted(modules_to_save=whole)


class Normed(nn.Module):
    """A batch norm keeps statistics, which a forward pass in training moves, frozen or not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.classifier = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x):
        return self.classifier(self.norm(self.query(x)))


@pytest.mark.parametrize("door", ["core", "peft"])
def test_statistics_that_training_moved_are_exported(door, tmp_path):
    if door == "core":
        model = mark_only_adapters_trainable(inject_adapters(Normed(), ["query"], r=2))
    else:
        given = dict(target_modules=["query"], modules_to_save=["classifier"])
        model = get_peft_model(Normed(), DynamicRankConfig(init_r=2, target_r=2, **given))
    for layer in dynamic_layers(model).values():
        nn.init.normal_(layer.lora_c)
    for _ in range(5):
        model.train()(torch.randn(32, 6) * 3 + 1)
    export_lora(model.eval(), tmp_path / "out")
    x = torch.randn(4, 6)
    torch.testing.assert_close(
        loaded(tmp_path / "out", Normed()).eval()(x), model(x), atol=1e-5, rtol=0
    )
    assert not torch.allclose(Normed().eval()(x), model(x), atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_c", "dense.weight"])
@pytest.mark.parametrize("door", ["core", "peft"])
def test_numbers_that_are_not_finite_never_pass(door, where, bad, tmp_path):
    model = ours() if door == "core" else adapted(init_r=2, target_r=2, dem_weight=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith(where) and parameter.requires_grad:
            parameter.data.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=r"has NaN or infinite numbers: training diverged"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_component_that_was_pruned_is_refused_too(tmp_path):
    model = ours()
    layer = next(layer for layer in dynamic_layers(model).values() if layer.rank < 3)
    layer.lora_c.data[~layer.component_mask] = float("nan")
    with pytest.raises(ValueError, match="a component that was pruned is not zero"):
        export_lora(model, tmp_path / "out")


@pytest.mark.parametrize("wrap", ["compiled", "in parallel", "a compiled part", "a compiled head"])
@pytest.mark.parametrize("door", ["core", "peft"])
def test_a_wrapped_model_is_exported_under_its_own_names(door, wrap, tmp_path):
    model = ours() if door == "core" else adapted(init_r=2, target_r=2, dem_weight=0.0)
    for layer in dynamic_layers(model).values():
        nn.init.normal_(layer.lora_c)
        layer.lora_c.data *= layer.component_mask
    expected = copy.deepcopy(model)
    inside = model if door == "core" else model.get_base_model()
    compiled = functools.partial(torch.compile, backend="eager")
    if wrap == "a compiled part":
        inside.roberta.encoder.layer[1] = compiled(inside.roberta.encoder.layer[1])
    elif wrap == "a compiled head":
        inside.classifier = compiled(inside.classifier)
    else:
        model = compiled(model) if wrap == "compiled" else nn.DataParallel(model)
    ranks = export_lora(model, tmp_path / "out")
    assert next(iter(ranks)) == "roberta.encoder.layer.0.attention.self.query"
    assert_same_logits(loaded(tmp_path / "out"), expected)


# --- the set of files ----------------------------------------------------------------------------


def other(model):
    """The same model, trained on: other components, ranks and head."""
    model = copy.deepcopy(model)
    for layer in dynamic_layers(model).values():
        layer.component_mask.fill_(True)
        nn.init.normal_(layer.lora_c)
    nn.init.normal_(model.classifier.out_proj.weight)
    return model


class Killed(BaseException):
    """As SIGKILL: no handler of a mere Exception sees it."""


@pytest.fixture
def no_picture(monkeypatch):
    """An export without its rank map takes a third of the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch())


def files_of(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name in FILES}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a file of the user's"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_point_leaves_the_old_set_or_the_new_one_and_never_some_of_each(
    exchange, beside, tmp_path, monkeypatch, no_picture
):
    """Where folders cannot change places it may leave none at all, and PEFT says so."""
    model = other(ours())
    export_lora(ours(), tmp_path / "old")
    export_lora(model, tmp_path / "new")
    old, new = files_of(tmp_path / "old"), files_of(tmp_path / "new")
    assert old["adapter_config.json"] != new["adapter_config.json"]
    seen, calls = [], []

    def until(last, function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == last:
                raise Killed
            return function(*args, **kwargs)

        return call

    swap = export._exchange if exchange else lambda one, other: False
    for last in range(1, 30):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(last))
        if beside:
            (folder / "notes.txt").write_text("mine")
        calls.clear()
        with monkeypatch.context() as patch:
            for place, name in ((os, "replace"), (os, "rename"), (Path, "unlink")):
                patch.setattr(place, name, until(last, getattr(place, name)))
            patch.setattr(export, "save_file", until(last, export.save_file))
            patch.setattr(export, "_exchange", until(last, swap))
            patch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: None)
            try:
                export_lora(model, folder, overwrite=True)
            except Killed:
                pass
        there = files_of(folder)
        whole = {"old": there == old, "new": there == new}
        seen.append(next((name for name, found in whole.items() if found), "none"))
        assert seen[-1] != "none" or "adapter_config.json" not in there
        assert not beside or (folder / "notes.txt").read_text() == "mine"
        if seen[-1] == "new":
            break
        export_lora(model, folder, overwrite=True)  # nothing stops the next one
        assert files_of(folder) == new
    assert seen[-1] == "new" and seen[0] == "old"
    assert "none" not in seen or beside or not exchange


@pytest.mark.parametrize("exchange", [True, False])
def test_an_interrupted_first_export_leaves_nothing_that_stops_the_next(
    exchange, tmp_path, monkeypatch, no_picture
):
    model, steps = ours(), []

    def at_the(number, function):
        def call(*args, **kwargs):
            steps.append(1)
            if len(steps) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for number in range(1, 6):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(export, "save_file", at_the(number, export.save_file))
            patch.setattr(os, "replace", at_the(number, os.replace))
            if not exchange:
                patch.setattr(export, "_exchange", lambda one, other: False)
            steps.clear()
            try:
                export_lora(model, folder)
                continue  # it was through before
            except Killed:
                assert not (folder / "adapter_config.json").exists()
        export_lora(model, folder)  # without overwrite
        assert {path.name for path in folder.iterdir()} == FILES


def test_an_export_keeps_the_folders_mode_and_the_links_to_it(tmp_path):
    folder, link = tmp_path / "out", tmp_path / "link"
    folder.mkdir(mode=0o750)
    link.symlink_to(folder)
    export_lora(ours(), link)
    assert link.is_symlink() and folder.stat().st_mode & 0o777 == 0o750
    assert_same_logits(loaded(link), ours())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def test_an_export_into_the_working_directory_leaves_it_in_place(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    export_lora(ours(), ".")
    export_lora(other(ours()), ".", overwrite=True)
    assert {path.name for path in Path.cwd().iterdir()} == FILES
    assert_same_logits(loaded("."), other(ours()))


def test_where_nothing_can_be_written_beside_the_folder_it_is_written_within(tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    export_lora(ours(), tmp_path / "out")
    export_lora(other(ours()), tmp_path / "out", overwrite=True)
    assert_same_logits(loaded(tmp_path / "out"), other(ours()))
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# --- the card is data ----------------------------------------------------------------------------

NAMES = [
    'a"); import os; os.system("true")  #', "'); x = ('", "a\nb", "a\r\n---\n# page\n---\n",
    "a\u2028b\x85c", "<script>alert(1)</script>", "<!-- a -->", "[a](javascript:b)", "![a](b)",
    "a`b```c", "```\nb\n```", "x | y", "*b* _c_ ~~d~~", "{front} {0} %s", "&lt;b&gt; $x$",
    "a\x1b[31m\x00\u202e", "\\", "\\\"", "@all", "https://a.b", "- a", "# a", "=" * 9,
    " ",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_in_the_card_are_data_and_neither_code_nor_page(name, tmp_path, no_picture):
    export_lora(ours(), tmp_path / "out", base_model=name, task=name, metric={name: 1.0})
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 30  # no name makes a line
    code = re.search(r"^```python\n(.*?)^```$", text, re.S | re.M)[1]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert name in strings and len(strings) == 3  # num_labels and the folder are the others
    assert len(re.findall(r"^```", text, re.M)) == 2
    page = text.replace(code, "").split("---", 2)[2]
    assert not re.search(r"(?<!\\)<", page)
    assert len(re.findall(r"(?<!\\)\]\(", page)) == 2  # the paper, and the picture
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and card.data.library_name == "peft"
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == name


NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), np.array([0.5]),
           torch.tensor(0.5), torch.tensor([0.5], dtype=torch.bfloat16), 0.5]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_a_metric_may_be_a_number_of_numpys_or_torchs(value, tmp_path):
    export_lora(ours(), tmp_path / "out", metric={"accuracy": value, "n": np.int64(3)})
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 0.5 |" in text and "| n | 3 |" in text


def test_a_merged_model_has_nothing_to_export(trained, tmp_path):
    trained.merge_and_unload()
    with pytest.raises(TypeError, match=r"no components .any more.: export it before"):
        export_lora(trained, tmp_path / "out")


def test_an_export_that_fails_leaves_what_was_there(trained, tmp_path, monkeypatch):
    export_lora(trained, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("drlora_ref.tuner.export.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        export_lora(trained, tmp_path / "out", task="second", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "run"}


# --- a real pretrained encoder, once -------------------------------------------------------------


@needs_minilm
def test_a_real_encoder_goes_all_the_way(tmp_path):
    """MiniLM: all-linear, Trainer, checkpoint, resume, merge, export, stock PEFT."""

    def base():
        torch.manual_seed(0)
        path = resolve_model("minilm-l6").path
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)

    def run(folder, **given):
        config = DynamicRankConfig(
            init_r=3, target_r=2, deltaT=2, dem_weight=0.1, task_type="SEQ_CLS",
            target_modules="all-linear", modules_to_save=["pooler"],
        )  # fmt: skip
        model = get_peft_model(base(), config)
        made = DynamicRankTrainer(model, arguments(folder, **given), train_dataset=rows())
        return made

    whole = run(tmp_path / "run", save_strategy="steps", save_steps=8)
    whole.train()
    model = whole.model.eval()
    assert sum(model.rank_pattern().values()) == 36 * 2
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert torch.equal(logits(resumed.model), logits(model))
    export_lora(model, tmp_path / "out")
    other = loaded(tmp_path / "out", base())
    assert_same_logits(other, model)
    assert_same_logits(other.merge_and_unload(), model.merge_and_unload())
