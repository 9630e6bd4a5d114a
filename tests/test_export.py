"""A stock LoRA adapter out of a trained model: the same logits, and nobody need import us."""

import copy
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
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
from drlora_ref.tuner import DynamicRankConfig
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
    first, second, *_ = model.base_model.layers().values()
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
    torch.save(base_model().state_dict(), tmp_path / "base.pt")
    base_model().config.save_pretrained(tmp_path)
    torch.save({"ids": token_ids(16), "logits": logits(trained)}, tmp_path / "expected.pt")
    code = """
import sys, torch
from peft import PeftModel
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
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    own, padded, imported = done.stdout.splitlines()
    for line in (own, padded):
        _, kind, difference = line.split()
        assert kind == "LoraModel" and float(difference) < 1e-5
    assert imported == "[]"
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


@pytest.mark.parametrize("metric", [{"accuracy": "0.93"}, 0.93, "0.93"])
def test_a_metric_that_is_no_number_with_a_name_is_refused(metric, trained, tmp_path):
    with pytest.raises(TypeError, match=r"as \{'accuracy': 0.93\}"):
        export_lora(trained, tmp_path / "out", metric=metric)
    assert not (tmp_path / "out").exists()


def test_what_else_was_trained_is_not_dropped_in_silence(tmp_path):
    model = ours()
    model.roberta.embeddings.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"LayerNorm\.weight was trained too, and a LoRA adapter"):
        export_lora(model, tmp_path / "out")


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
