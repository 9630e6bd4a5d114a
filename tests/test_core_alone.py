"""What each part of the package needs: the paper's files torch alone, the others their extra."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drlora_ref"
PAPER = [
    "layer",
    "importance",
    "schedule",
    "regularizer",
    "allocator",
    "train",
    "inject",
    "planted",
]

# Adapters go into a small network, the loop of Algorithm 1 trains it, and ranks are planted and
# found: in a process that has no other package than torch.
CORE_ALONE = f"""
import importlib
import sys
from types import SimpleNamespace

for absent in (
    "accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "pandas", "peft",
    "safetensors", "scipy", "sklearn", "tokenizers", "torchmetrics", "tqdm", "transformers", "yaml",
):
    sys.modules[absent] = None  # an import of it raises ModuleNotFoundError

import torch
from torch import nn

import drlora_ref
for name in {PAPER}:
    importlib.import_module("drlora_ref." + name)
from drlora_ref.planted import recover
from drlora_ref.train import train


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.classifier = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x, labels):
        out = self.classifier(torch.tanh(self.query(x) + self.key(x)))
        return SimpleNamespace(loss=(out - labels).square().mean())


def collate(rows):
    return {{name: torch.stack([row[name] for row in rows]) for name in rows[0]}}


torch.manual_seed(0)
model = drlora_ref.inject_adapters(Network(), ["query", "key"], r=3)
drlora_ref.mark_only_adapters_trainable(model)
schedule = drlora_ref.BudgetSchedule(init_r=3, target_r=2, total_steps=8)
rows = [{{"x": x, "labels": x[:1]}} for x in torch.randn(12, 4)]
record = train(
    model, rows, collate, lambda model: {{"metric": 0.0, "collapsed": False}}, schedule,
    drlora_ref.RankAllocator(model, schedule), dem_weight=0.1, batch_size=4,
)
assert record["status"] == "completed" and sum(record["rank_pattern"].values()) == 4, record
drlora_ref.merge_adapters(model)

assert sum(recover([0, 2], dim=8, init_r=4, target_r=1, total_steps=20).ranks) == 2
assert "drlora_ref.plotting" not in sys.modules
"""


def test_the_papers_files_work_where_there_is_torch_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Where a package is imported under another name than it is installed by.
INSTALLED_AS = {"IPython": "ipython", "sklearn": "scikit-learn", "yaml": "pyyaml",
                "bs4": "beautifulsoup4", "PIL": "pillow"}  # fmt: skip
BOOK = [path for path in sorted((ROOT / "book").glob("*.py")) if path.name != "test_book.py"]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def named(requirements: list[str]) -> set[str]:
    """The packages of a list in pyproject.toml, with those of the extras that it refers to."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups()
        found |= {name.lower().replace("-", "_")}
        for extra in extras.split(",") if name == "drlora-ref" else ():
            found |= named(PROJECT["optional-dependencies"][extra])
    return found


def imported(files: list[Path]) -> set[str]:
    """The third-party packages that files import anywhere, by the name to install them by."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    ours = {path.stem for folder in ("tests", "book") for path in (ROOT / folder).iterdir()}
    ours |= {"drlora_ref"}
    found -= sys.stdlib_module_names | ours | {"bitsandbytes"}  # where it made the user's weights
    return {INSTALLED_AS.get(name, name).replace("-", "_") for name in found}


@pytest.mark.parametrize(
    "extra, files",
    [
        (None, [PACKAGE / "__init__.py", *(PACKAGE / f"{name}.py" for name in PAPER)]),
        ("peft", sorted((PACKAGE / "tuner").rglob("*.py"))),
        ("experiments", sorted((PACKAGE / "experiments").rglob("*.py"))),
        ("test", [*sorted((ROOT / "tests").glob("*.py")), ROOT / "book" / "test_book.py"]),
        ("book", BOOK),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_extra_names_every_package_that_its_files_import(extra, files):
    assert files
    given = named(PROJECT["dependencies"])
    if extra:
        given |= named(PROJECT["optional-dependencies"][extra])
    assert not imported(files) - given


def test_all_is_every_extra_but_the_large_models():
    extras = dict(PROJECT["optional-dependencies"])
    large = named(extras.pop("mpnet")) | named(extras.pop("smollm2")) - {"transformers"}
    assert named(extras["all"]) == set().union(*map(named, extras.values()))
    assert not named(extras["all"]) & large
