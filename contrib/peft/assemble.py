"""Puts the tuner for PEFT together, out of the package's own files: there is no second copy to keep.

    python contrib/peft/assemble.py                  writes src/peft/tuners/drlora
    python contrib/peft/assemble.py --onto CHECKOUT  puts that, tests and experiments into a checkout of
                                                     huggingface/peft, with the lines that register it

From `DrLoraConfig` and `DrLoraModel` on it follows every name, and takes the definitions that are met;
doctests go, since PEFT has none. What PEFT does otherwise is in overrides.py and in REPLACE.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "drlora_ref"
TUNER = Path("src/peft/tuners/drlora")

# What each file is made of, in the order in which its parts stand. The tuner's own imports go down.
FILES = {
    "precision": ["precision"],
    "scores": ["importance", "allocator.check_scoring"],
    "config": ["schedule", "tuner.config"],
    "layer": ["layer", "tuner.layer.in_4_bits", "tuner.layer.DynamicRankLinear"],
    "allocator": ["regularizer", "watch", "allocator", "tuner.layer"],
    "model": ["inject", "tuner.fitting", "tuner.model"],
}
ROOTS = [("tuner.config", "DynamicRankConfig"), ("tuner.model", "DynamicRankModel")]
HEADS = {
    "precision": "What is trained stays float32, in a model of half precision too.",
    "scores": "How much each rank-1 component matters, and the average of it over steps.",
    "config": "The configuration, and the budget that it describes.",
    "layer": "A linear layer whose update is a sum of rank-1 components that can be switched off.",
    "allocator": "After each optimizer step: score, smooth, and keep the best components over all layers.",
    "model": "The tuner.",
}
# Inside PEFT its names come from where they are made: peft/__init__.py is not finished yet.
PEFT_HOMES = {"PeftConfig": "peft.config", "PeftType": "peft.utils"}
LICENCE = """\
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
INIT = """\
from peft.utils import register_peft_method

from .config import DrLoraConfig
from .layer import DrLoraLinear
from .model import DrLoraModel


__all__ = ["DrLoraConfig", "DrLoraLinear", "DrLoraModel"]

register_peft_method(name="drlora", config_cls=DrLoraConfig, model_cls=DrLoraModel)
"""
# Names, then sentences about what PEFT has not. Each must be found: else the source has moved on.
REPLACE = {
    "DynamicRankConfig": "DrLoraConfig",
    "DynamicRankModel": "DrLoraModel",
    "DynamicRankLinear": "DrLoraLinear",
    "dynamic_rank_components": "drlora_components",
    "dynamic_rank_state": "drlora_state",
    'prefix = "dynamic_rank_"': 'prefix = "drlora_"',
    "self.peft_type = DYNAMIC_RANK": "self.peft_type = PeftType.DRLORA",
    # PEFT's tests want an adapter that is not the identity
    'metadata={"help": "their list"})\n': 'metadata={"help": "their list"})\n'
    '    init_weights: bool = field(default=True, metadata={"help": "False: start with a random update"})\n',
    "            **like_base(self.base_layer.weight),\n        )\n": "            **like_base(self.base_layer.weight),\n        )\n"
    "        if not config.init_weights:\n"
    "            nn.init.normal_(self.components(adapter_name).lora_c)\n",
    "the whole training (DynamicRankCallback fills it in)": "the whole training",
    " export_lora needs no such detour.": "",
    " (notebook 07 examines it)": "",
    "; notebook 03 measures all of this.": ".",
    "the model has no DynamicLoRALinear: call inject_adapters first": "the adapter has no layer",
    'its loss is not that "\n                "of DynamicRankTrainer.compute_loss. A compute_loss or '
    'training_step of your own "\n                "must call super()\'s, or add dem_weight': "add dem_weight",
}
# Lines to be added, each after a line of that text: (file of PEFT, line, new line).
REGISTER = [
    ("src/peft/utils/peft_types.py", '    DELORA = "DELORA"', '    DRLORA = "DRLORA"'),
    ("src/peft/utils/peft_types.py", "    - DELORA", "    - DRLORA"),
    (
        "src/peft/tuners/__init__.py",
        "from .delora import DeloraConfig, DeloraModel",
        "from .drlora import DrLoraConfig, DrLoraModel",
    ),
    ("src/peft/tuners/__init__.py", '    "DeloraModel",', '    "DrLoraConfig",\n    "DrLoraModel",'),
    ("src/peft/__init__.py", "    DeloraModel,", "    DrLoraConfig,\n    DrLoraModel,"),
    ("src/peft/__init__.py", '    "DeloraModel",', '    "DrLoraConfig",\n    "DrLoraModel",'),
]
# method_comparison/MetaMathQA/run.py calls update_and_allocate for AdaLoRA alone: (text, new text).
RUN = [
    ("from peft import AdaLoraConfig, PeftConfig", "from peft import AdaLoraConfig, DrLoraConfig, PeftConfig"),
    ("isinstance(peft_config, AdaLoraConfig)", "isinstance(peft_config, (AdaLoraConfig, DrLoraConfig))"),
]


@dataclass
class Definition:
    """A function, class or constant of a module's top level."""

    module: str
    name: str
    line: int
    source: str
    used: set[str]


def definitions(module: str, text: str) -> dict[str, Definition]:
    """The definitions of a module by name, each with the comment above it."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        source = "\n".join(lines[first : node.end_lineno])
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        found |= {name: Definition(module, name, node.lineno, source, used) for name in names}
    return found


def imports(text: str) -> dict[str, tuple[str, str]]:
    """What a module's names are imported from: {name here: (module, name there or "")}."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.partition(".")[0]: (a.name, "") for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    return found


def for_peft(name: str, source: str) -> str:
    """The source with PEFT's docstring, where there is one; else without the examples in its own."""
    path = HERE / f"docstrings/{name}.txt"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        return re.sub(r'""".*?"""', lambda _: f'"""\n{text}    """', source, count=1, flags=re.S)
    cut = re.sub(r'\n[ \n]*>>> .*?(?=\n[ ]*""")', "", source, flags=re.S)
    return re.sub(r'("""[^"\n]+)\n[ ]*"""', r'\1"""', cut)  # of one line is left: close it there


class Sources:
    """The package's modules, with overrides.py in front."""

    def __init__(self) -> None:
        parts = [part for parts in FILES.values() for part in parts]
        modules = [m for m in parts if (PACKAGE / f"{m.replace('.', '/')}.py").exists()]
        texts = {m: (PACKAGE / f"{m.replace('.', '/')}.py").read_text(encoding="utf-8") for m in modules}
        self.defined = {m: definitions(m, text) for m, text in texts.items()}
        self.imported = {m: imports(text) for m, text in texts.items()}
        own = (HERE / "overrides.py").read_text(encoding="utf-8")
        for name, new in definitions("", own).items():
            (module,) = [m for m, defined in self.defined.items() if name in defined]
            new.module, new.line = module, self.defined[module][name].line
            self.defined[module][name] = new

    def home(self, module: str, name: str) -> tuple[str, str] | None:
        """Where in the package a name that a module uses is defined; None if it is not the package's.

        Raises LookupError for a part of the package that FILES does not have.
        """
        if name in self.defined[module]:
            return module, name
        source, there = self.imported[module].get(name, ("", ""))
        if not source.startswith("drlora_ref."):
            return None
        source = source.removeprefix("drlora_ref.")
        if there not in self.defined.get(source, ()):
            raise LookupError(f"{module} uses {source}.{there}: give it a place in FILES")
        return source, there

    def reachable(self) -> set[tuple[str, str]]:
        """(module, name) of all that the roots need."""
        found, todo = set(), list(ROOTS)
        while todo:
            if (at := todo.pop()) not in found and at[1] != "DYNAMIC_RANK":  # PEFT has PeftType
                found.add(at)
                homes = [self.home(at[0], name) for name in self.defined[at[0]][at[1]].used]
                todo += [home for home in homes if home]
        return found

    def import_lines(self, file: str, here: list[tuple[str, str]]) -> set[str]:
        """What these definitions of one file need from other files, and from other packages."""
        lines = set()
        for module, used in {(module, used) for module, name in here for used in self.defined[module][name].used}:
            home = self.home(module, used)
            if home and home[1] != "DYNAMIC_RANK" and file_of(*home) != file:
                lines.add(f"from .{file_of(*home)} import {home[1]}")
            elif not home and used in self.imported[module]:
                where, there = self.imported[module][used]
                where = PEFT_HOMES.get(there, where)
                alias = f" as {used}" if used not in (there, where.partition(".")[0]) else ""
                lines.add(f"from {where} import {there}{alias}" if there else f"import {where}{alias}")
        return lines


def file_of(module: str, name: str) -> str:
    """The file in which a definition ends: where it is named, or else its module."""
    return next(f for whole in (f"{module}.{name}", module) for f, parts in FILES.items() if whole in parts)


def assemble() -> dict[str, str]:
    """{file name: text} of the tuner, unformatted. Raises LookupError where the sources have moved on."""
    sources, files = Sources(), {"__init__.py": LICENCE + INIT}
    wanted, missing = sources.reachable(), set(REPLACE)
    for file, parts in FILES.items():

        def place(at: tuple[str, str], parts: list[str] = parts) -> tuple[int, int]:
            alone = ".".join(at) in parts
            return parts.index(".".join(at) if alone else at[0]), sources.defined[at[0]][at[1]].line

        here = sorted((at for at in wanted if file_of(*at) == file), key=place)
        text = "\n".join(sorted(sources.import_lines(file, here))) + "\n\n"
        text += "".join(for_peft(at[1], sources.defined[at[0]][at[1]].source) + "\n\n" for at in here)
        missing -= {old for old in REPLACE if old in text}
        for old, new in REPLACE.items():
            text = text.replace(old, new)
        if "PeftType." in text:
            text = "from peft.utils import PeftType\n" + text
        files[f"{file}.py"] = f'{LICENCE}"""{HEADS[file]}"""\n\n{text}'
    if missing:
        raise LookupError(f"not found in the package any more: {', '.join(sorted(missing))}")
    return files


def write(folder: Path) -> None:
    """The tuner's files into the folder, as ruff formats them with PEFT's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in assemble().items():
        (folder / name).write_text(text, encoding="utf-8")
    ruff, given = [sys.executable, "-m", "ruff"], ["--quiet", "--config", str(HERE / "ruff.toml"), str(folder)]
    subprocess.run([*ruff, "check", "--fix", *given], check=True)
    subprocess.run([*ruff, "format", *given], check=True)


def put(checkout: Path, source: str = "src/peft") -> None:
    """The tuner, its tests and experiments into a checkout of PEFT, and the lines that register it.

    `source`: where the package is in it. Raises LookupError where a line of PEFT is not what it was.
    """
    given = {"dirs_exist_ok": True, "ignore": shutil.ignore_patterns("__pycache__")}
    shutil.copytree(HERE / TUNER, checkout / source / "tuners/drlora", **given)
    shutil.copytree(HERE / "tests", checkout / "tests", **given)
    for name, line, new in REGISTER:
        path = checkout / name.replace("src/peft", source)
        replace_once(path, f"\n{line}\n", f"\n{line}\n{new}\n")
    comparison = checkout / "method_comparison/MetaMathQA"
    if comparison.exists():
        shutil.copytree(HERE / "method_comparison/MetaMathQA", comparison, dirs_exist_ok=True)
        for old, new in RUN:
            replace_once(comparison / "run.py", old, new)


def replace_once(path: Path, old: str, new: str) -> None:
    """Put new in old's place. Raises LookupError unless old is there exactly once."""
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise LookupError(f"{path.name}: {old.strip()!r} is there {text.count(old)} times, not once")
    path.write_text(text.replace(old, new), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onto", type=Path, metavar="CHECKOUT", help="a checkout of huggingface/peft")
    given = parser.parse_args()
    write(HERE / TUNER)
    if given.onto:
        put(given.onto)
