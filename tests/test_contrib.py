"""What contrib/peft would put into PEFT: that it is current, self-contained, and works there."""

import ast
import importlib.util
import json
import os
import re
import shutil
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch.multiprocessing as mp
from torch.multiprocessing import ProcessExitedException

from drlora_ref.tuner import DynamicRankConfig

ROOT = Path(__file__).parents[1]
CONTRIB = ROOT / "contrib/peft"
OURS = r"drlora_ref|[Nn]otebook|DynamicRank|DynamicLoRA|inject_adapters|export_lora|Trainer"


@pytest.fixture(scope="module")
def assemble():
    spec = importlib.util.spec_from_file_location("assemble", CONTRIB / "assemble.py")
    module = sys.modules["assemble"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["assemble"]


def test_the_committed_tuner_is_what_the_packages_files_give(assemble, tmp_path):
    assemble.write(tmp_path)
    committed = {p.name: p.read_text() for p in (CONTRIB / assemble.TUNER).glob("*.py")}
    assert committed.keys() == {path.name for path in tmp_path.glob("*.py")}
    for name, text in committed.items():
        fresh = ast.parse((tmp_path / name).read_text())
        assert ast.dump(ast.parse(text)) == ast.dump(fresh), f"{name}: run contrib/peft/assemble.py"


def test_the_tuner_knows_nothing_of_this_package(assemble):
    for name, text in assemble.assemble().items():
        assert not re.search(OURS, text), name
        tops = {m.partition(".")[0] for m in re.findall(r"^(?:from|import) (\w[\w.]*)", text, re.M)}
        assert tops - sys.stdlib_module_names <= {"torch", "transformers", "peft"}


def test_every_field_of_the_configuration_is_explained(assemble):
    tree = ast.parse(assemble.assemble()["config.py"])
    (config,) = [n for n in tree.body if getattr(n, "name", "") == "DrLoraConfig"]
    explained = re.findall(r"^    (\w+) \(`", ast.get_docstring(config), re.M)
    assert explained == [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    ours = fields(DynamicRankConfig)[len(fields(peft.PeftConfig)) :]
    assert explained == [*(f.name for f in ours), "init_weights"]


def test_a_definition_that_has_moved_on_is_named(assemble, monkeypatch):
    monkeypatch.setitem(assemble.REPLACE, "class NotThere", "class There")
    with pytest.raises(LookupError, match="not found in the package any more: class NotThere"):
        assemble.assemble()


def test_a_part_of_the_package_without_a_place_is_named(assemble, monkeypatch):
    monkeypatch.setitem(assemble.FILES, "precision", [])
    with pytest.raises(LookupError, match=r"uses precision\.\w+: give it a place in FILES"):
        assemble.assemble()


def run_tests(_: int, folder: Path) -> None:
    """The contributed tests, and ours beside them, in a process that has the folder's PEFT."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("peft", "drlora_ref")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    options = f"-q -p no:nbval -p no:xdist -p no:cacheprovider -c {os.devnull} --rootdir".split()
    paths = [str(folder), str(folder / "tests"), str(ROOT / "tests/contributed_tuner.py")]
    with (folder / "log").open("w") as log, redirect_stdout(log):
        code = pytest.main([*options, *paths])
    sys.exit(int(code))


def test_it_works_in_peft_and_prunes_what_the_package_prunes(assemble, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "peft", ignore=ignored)
    assemble.put(tmp_path, source="peft")
    with suppress(ProcessExitedException):  # the log says why
        mp.start_processes(run_tests, (tmp_path,), start_method="fork")
    log = (tmp_path / "log").read_text()
    passed = re.search(r"(\d+) passed", log)
    assert passed and int(passed[1]) >= 35 and not re.search("failed|error", log), log[-3000:]


RUN_PY = """\
from peft import AdaLoraConfig, PeftConfig
        is_adalora=isinstance(peft_config, AdaLoraConfig),
"""


def test_the_comparisons_script_calls_the_allocator(assemble, tmp_path):
    (tmp_path / "src").mkdir()
    for name, line, _ in assemble.REGISTER:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "\n") + f"{line}\n")
    script = tmp_path / "method_comparison/MetaMathQA/run.py"
    script.parent.mkdir(parents=True)
    script.write_text(RUN_PY)
    assemble.put(tmp_path)
    assert "isinstance(peft_config, (AdaLoraConfig, DrLoraConfig))" in script.read_text()
    (folder,) = script.parent.glob("experiments/drlora/*")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "DRLORA"
    json.loads((folder / "training_params.json").read_text())
    with pytest.raises(LookupError, match=r"peft_types.py: .* is there \d+ times, not once|run.py"):
        script.write_text("another script")
        assemble.put(tmp_path)
