"""What a GPU machine without a network needs, as files of at most 48 MiB: model, data, wheels.

    python -m drlora_ref.experiments gpu pack .gpu --data-dir ../glue       # `make gpu-pack`

Takes mpnet-base from its packages (or the folder that --model names), the data folder if one is
given, and wheels of what the experiments use, in the versions that are installed here, for Python
3.12 on x86-64 Linux; torch and what comes with it must be there already. There, in the folder of
this project, `. .gpu/unpack.sh` checks every byte, unpacks into $HOME/drlora-gpu, and sets what the
command reads.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from drlora_ref.experiments.given import place
from drlora_ref.experiments.run.records import make_folder
from drlora_ref.experiments.sources.models import FILES, resolve_model

PIECE = 48 * 2**20
TAGS = ["any", *(f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17)),
        "manylinux2014_x86_64", "manylinux1_x86_64"]  # fmt: skip
UNPACK = """\
# Read by `. {name}/unpack.sh` in the folder of the project, on the machine with the GPU.
GPU_HOME=${{GPU_HOME:-$HOME/drlora-gpu}}
(cd {name} && sha256sum --quiet -c SHA256SUMS) && mkdir -p "$GPU_HOME" \\
  && cat {name}/part-* | tar -xf - -C "$GPU_HOME" \\
  && python3 -m pip install -q --no-index --no-deps --no-compile --upgrade \\
       --target "$GPU_HOME/site" "$GPU_HOME"/whl/*.whl \\
  && export PYTHONPATH="$GPU_HOME/site:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \\
  && export GLUE_DIR="$GPU_HOME/data" \\
  && echo "now: python3 -m drlora_ref.experiments gpu --minutes 30 --model $GPU_HOME/model"
"""


def pack(
    out: str, model_name: str = "mpnet-base", data_dir: str = "", python: str = "3.12"
) -> Path:
    """Write the pieces, their hashes and unpack.sh into `out`; returns the folder.

    Raises as resolve_model does; FileNotFoundError for a data folder that is not there, OSError
    where pip cannot download a wheel.
    """
    folder, source = place(out), resolve_model(model_name or "mpnet-base")
    if data_dir and not place(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir = {data_dir!r}: no such folder")
    make_folder(folder, "folder")
    for old in (*folder.glob("part-*"), *folder.glob("SHA256SUMS")):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        whole, wheels = Path(temporary, "whole.tar"), Path(temporary, "whl")
        wheels.mkdir()
        download(wheels, python)
        with tarfile.open(whole, "w") as archive:
            model = Path(source.path)
            for path in sorted({p for pattern in FILES for p in model.glob(pattern)}):
                archive.add(path.resolve(), arcname=f"model/{path.name}")
            archive.add(wheels, arcname="whl")
            if data_dir:
                archive.add(place(data_dir), arcname="data")
        _cut(whole, folder)
    (folder / "unpack.sh").write_text(UNPACK.format(name=folder.name))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{len(list(folder.glob('part-*')))} pieces in {out}, {size:.0f} MiB: {source.source}")
    return folder


def needed(package: str, extra: str = "") -> set[str]:
    """Names of all packages that are installed here for this one and its extra, itself left out."""
    seen: set[tuple[str, str]] = set()
    waiting = [(package, extra)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen or not _installed(name):
            continue
        seen.add((name, wanted))
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                own = ("", *requirement.extras)
                waiting += [(canonicalize_name(requirement.name), extra) for extra in own]
    return {name for name, _ in seen} - {package}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
        return True
    except metadata.PackageNotFoundError:
        return False


def download(wheels: Path, python: str) -> None:
    """Wheels for another machine, from the registry that pip uses here, in the versions of here."""
    names = needed("drlora-ref", "experiments") - needed("torch") - {"torch"}
    exact = sorted(f"{name}=={metadata.version(name)}" for name in names)
    platform = [word for tag in TAGS for word in ("--platform", tag)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    command += [*target, *platform, *exact]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise OSError(f"pip download failed: {(lines or ['no reason given'])[-1]}")


def _cut(whole: Path, folder: Path) -> None:
    sums = []
    with open(whole, "rb") as file:
        for number in range(1000):
            content = file.read(PIECE)
            if not content:
                break
            name = f"part-{number:03}"
            (folder / name).write_bytes(content)
            sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))
