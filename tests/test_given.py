"""What a person wrote is judged alike, and in the same words, by whichever door it comes."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
from fake_grid import write_grid, write_notebook

from drlora_ref.experiments import given
from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.given import check_kind, check_name, nearest, read_yaml
from drlora_ref.experiments.run.records import WRITTEN
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.families import FAMILIES, Family

HINT = "(YAML reads 1e-3 as a word, and 1.0e-3 as a number)"
WRONG = {
    "learning_rate: 1e-3": f"learning_rate = '1e-3': expected a number, as DEFAULT {HINT}",
    "learning_rate: 1.0e3": "learning_rate = '1.0e3': expected a number, as DEFAULT "
    "(YAML reads 1.0e3 as a word, and 1.0e+3 as a number)",
    "learning_rate: true": "learning_rate = True: expected a number, as DEFAULT",
    "learning_rate: high": "learning_rate = 'high': expected a number, as DEFAULT",
    "max_steps: 1.5": "max_steps = 1.5: expected a whole number, as DEFAULT",
    "max_steps: 1e3": "max_steps = '1e3': expected a whole number, as DEFAULT",
    "overwrite: 1": "overwrite = 1: expected true or false, as False",
    "method: 3": "method = 3: expected a word, as 'drlora'",
}
# The defaults of Settings, and those of the notebook in fake_grid.py.
DEFAULTS = {
    "run": {"learning_rate": 0.002, "max_steps": 0},
    "notebook": {"learning_rate": 0.001, "max_steps": 5},
}
DEFAULTS["grid"] = DEFAULTS["notebook"]


# A grid itself decides what it overwrites.
@pytest.mark.parametrize(
    "door, line",
    [(d, line) for d in DEFAULTS for line in WRONG if (d, line) != ("grid", "overwrite: 1")],
)
def test_a_value_of_the_wrong_kind_is_the_same_line_by_every_door(
    door, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    name, _, value = line.partition(": ")
    Path("given.yaml").write_text(line)
    words = {
        "run": ["run", "out", "-f", "given.yaml"],
        "notebook": ["notebook", "fake.ipynb", "out", "-f", "given.yaml"],
        "grid": ["grid", write_grid(f"{{notebook: fake.ipynb, vary: {{{name}: [{value}]}}}}")],
    }[door]
    assert main(words) == 1
    expected = WRONG[line].replace("DEFAULT", repr(DEFAULTS[door].get(name)))
    assert capsys.readouterr().err == f"ValueError: {expected}\n"


def test_a_whole_number_is_a_number_and_a_list_is_a_list():
    check_kind("learning_rate", 1, default=0.1)
    check_kind("seeds", [0], default=[0, 1])
    with pytest.raises(ValueError, match=r"seeds = '0': expected a list, as \[0, 1\]$"):
        check_kind("seeds", "0", default=[0, 1])
    with pytest.raises(ValueError, match=r"data_dir = 3: expected a word$"):
        check_kind("data_dir", 3, default="")


def test_the_nearest_name_is_found_in_whatever_case_and_of_whatever_kind():
    assert nearest("DELTAT", ["deltaT", "dem_weight"]) == "deltaT"
    assert nearest("zebra", ["deltaT"]) == ""
    with pytest.raises(ValueError, match=r"unknown table 12 \(nearest: 2\): use 2, 3$"):
        check_name("table", 12, (2, 3))
    with pytest.raises(ValueError, match=r"unknown task \['cola'\] "):
        check_name("task", ["cola"], {"cola": 1})


@pytest.mark.parametrize("task", FAMILIES)
def test_a_family_has_every_name_of_the_protocol_and_takes_its_options_from_the_settings(task):
    family = FAMILIES[task]
    names = [name for name in vars(Family) if not name.startswith("_")]
    assert set(names) >= {"TASKS", "OPTIONS", "metric_name", "load_task", "load_model"}
    assert all(hasattr(family, name) for name in names)
    assert task in family.TASKS
    _, _, *options = inspect.signature(family.make_inputs).parameters  # data, tokenizer
    assert tuple(options) == family.OPTIONS
    assert set(options) <= {field.name for field in fields(Settings)}


# --- files that mean something else than they seem to ------------------------------------------

NINE = "[x, x, x, x, x, x, x, x, x]"
LEVELS = [
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdef", "bcdefg", strict=True)
]
BOMB = "\n".join([f"a: &a {NINE}", *LEVELS])  # nine million words
YAML = {
    "seed: 1\nseed: 2": "line 2: 'seed' comes twice",
    "parameters: {seed: 1, seed: 1}": "line 1: 'seed' comes twice",
    "vary: {seed: [0]}\ncases: [{seed: 1, beta: 0.5, seed: 2}]": "line 2: 'seed' comes twice",
    "1: a\n0x1: b": "line 2: 1 comes twice",
    "seed: 010": "'010' is a number in octal",
    "seed: -0_17": "'-0_17' is a number in octal",
    "vary: {seed: [1, 012]}": "'012' is a number in octal",
    "epochs: 1:30": "'1:30' is a number to base 60",
    "learning_rate: 1:30.5": "'1:30.5' is a number to base 60",
    BOMB: "more than 100,000 values",
    "seed: &a [1, *a]": "an alias within itself",
    "a: &a {b: *a}": "an alias within itself",
    "seed: " + "[" * 3000 + "]" * 3000: "brackets within brackets",
    "\n".join(" " * n + "a:" for n in range(2000)): "brackets within brackets",
    "seed: " + "1" * 5000: "no number, or too many digits",
    "x: {<<: {seed: 1, seed: 2}}": "line 1: 'seed' comes twice",
    "x: {<<: [{a: 1}, {b: 1, c: 2,\n b: 3}]}": "line 2: 'b' comes twice",
    "a: &a {b: 1}\nc: {<<: *a, <<: {d: 1}}": "line 2: '<<' comes twice",
    "a: 1\nb: {{c: 1}: 2}": "unhashable key",
    "? !!set x\n: 1\n? !!set x\n: 1": "expected a mapping node",
    "learning_rate: 1.0e" + "1" * 50 + ": 3": "is not YAML",
    "seed: !!python/object/apply:os.mkdir [sprung]": "could not determine a constructor",
    "seed: 1\n---\nseed: 2": "single document",
    "[1, 2]: 3": "unhashable key",
    "- 1": "must hold lines of `name: value`",
}


UNTRUE = {  # tags before what they cannot be
    "int": ["a", "''", "_", "-", "0x_", "0b", "[1]", "{a: 1}"],
    "float": ["a", "''", "-", "[1]", "{a: 1}"],
    "bool": ["7", "''", "[1]", "maybe"],
    "timestamp": ["x", "''", "2020-13-45", "0000-01-01", "[1]"],
    "binary": ["\u00e9", "a", "[1]"],
    "null": ["[1]"],
    "set": ["[1]", "a"],
    "omap": ["{a: 1}", "a", "[1]"],
    "pairs": ["{a: 1}", "[1]"],
    "map": ["[1]", "a"],
    "seq": ["{a: 1}", "a"],
    "str": ["[1]"],
}
YAML |= {f"seed: !!{tag} {value}": "" for tag, values in UNTRUE.items() for value in values}
YAML["seed: 2020-02-31"] = "'2020-02-31' cannot be read as timestamp"
YAML.pop("seed: !!null [1]")  # YAML lets it be nothing


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:30])
def test_yaml_that_is_not_what_it_seems_is_one_short_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.yaml").write_text(text)
    with pytest.raises(ValueError) as refused:
        read_yaml("file.yaml")
    message = str(refused.value)
    assert message.startswith("file.yaml") and YAML[text] in message
    assert "\n" not in message and len(message) < 400 and not Path("sprung").exists()


def test_yaml_that_is_what_it_seems_is_read(tmp_path):
    text = """
    plain: &same {seed: 10, learning_rate: 1.0e-3, steps: 4_280, hex: 0x10, zero: 0, half: 0.5}
    again: *same
    merged: {<<: *same, seed: 3}
    quoted: ["010", '1:30', "no"]
    """
    (tmp_path / "file.yaml").write_text("\ufeff" + text)
    found = read_yaml(tmp_path / "file.yaml")
    same = dict(seed=10, learning_rate=1e-3, steps=4280, hex=16, zero=0, half=0.5)
    assert found["plain"] == found["again"] == same and found["merged"] == same | {"seed": 3}
    assert found["quoted"] == ["010", "1:30", "no"]


LATIN, WIDE = "seed: 1\ntask: café\n".encode("latin-1"), "seed: 1\n".encode("utf-16")


@pytest.mark.parametrize(
    "content, line", [(LATIN, 2), (WIDE, 1), (b"\xff", 1), (b"a\n" * 9 + b"\xc3", 10)]
)
def test_another_encoding_names_file_and_line(content, line, tmp_path):
    (tmp_path / "file.yaml").write_bytes(content)
    for read in (given.read_text, given.read_lines, given.read_json, read_yaml):
        with pytest.raises(ValueError, match=rf"file\.yaml, line {line}: byte 0x.. is not UTF-8"):
            read(tmp_path / "file.yaml")


def test_only_a_line_feed_ends_a_line(tmp_path):
    file = tmp_path / "lines"
    for inside in "\u2028 \u2029 \u0085 \x0b \x0c \x1c \x1e \r".split(" "):
        file.write_bytes(f"one{inside}line\r\nanother\n".encode())
        assert given.read_lines(file) == [f"one{inside}line", "another", ""]
    file.write_bytes(b"one\rtwo\r")
    with pytest.raises(ValueError, match="lines: its lines end in CR alone"):
        given.read_lines(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        '["\\ud800"]',
        '{"q": 1, "q": 3}',
        '[{"a": {"b": 1, "b": 1}}]',
    ],
)
def test_what_is_no_json_is_one_short_line(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"file\.json: ") as refused:
        given.read_json(tmp_path / "file.json")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


TINY = ["-p", "data_dir", "generated", "-p", "model_name", "tiny-roberta"]
HOME = {
    "run": ["run", "~nobody-at-all/x"],
    "file": ["run", "out", "-f", "~nobody-at-all/x.yaml"],
    "data": ["run", "out", *TINY, "-p", "data_dir", "~nobody-at-all/x"],
    "model": ["run", "out", *TINY, "-p", "model_name", "~nobody-at-all/x"],
    "map": ["run", "out", *TINY, "-p", "method", "lora", "-p", "rank_map", "~nobody-at-all/x"],
    "grid": ["grid", "~nobody-at-all/x.yaml"],
    "out": ["grid", "grid.yaml", "--out", "~nobody-at-all/x"],
    "notebook": ["notebook", "~nobody-at-all/x.ipynb", "out"],
    "notebook out": ["notebook", "fake.ipynb", "~nobody-at-all/x"],
}  # fmt: skip


NO_PATHS = {
    "~nobody-at-all": "there is no such home folder",
    "caf\udce9": "'caf\\udce9/x{}': the name is not UTF-8",  # é of Latin-1, as Python has it
}


@pytest.mark.parametrize("name", NO_PATHS)
@pytest.mark.parametrize("door", HOME)
def test_what_can_be_no_path_is_one_line_by_every_door(door, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    write_grid()
    assert main([word.replace("~nobody-at-all", name) for word in HOME[door]]) == 1
    error = capsys.readouterr().err
    ends = [NO_PATHS[name].format(end) for end in ("", ".yaml", ".ipynb")]
    assert any(end in error for end in ends) and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"fake.ipynb", "grid.yaml", "out"}


def occupied(name: str) -> str:
    """Something of that kind in the current folder, which is no place for an output."""
    Path("file").write_text("mine")
    Path("link").symlink_to("file")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("loop").symlink_to("loop")
    return {"below": "file/a/b"}.get(name, name)


@pytest.mark.parametrize("name", ["file", "below", "link", "dangling", "loop"])
@pytest.mark.parametrize("door", ["run", "notebook", "grid"])
def test_an_output_folder_that_is_none_is_one_line_by_every_door(
    door, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    out = occupied(name)
    words = {
        "run": ["run", out, *TINY],
        "notebook": ["notebook", "fake.ipynb", out],
        "grid": ["grid", write_grid(), "--out", out],
    }[door]
    another = "--out" if door == "grid" else "output_dir"
    assert main(words) == 1
    assert capsys.readouterr().err == (
        f"NotADirectoryError: {out} is not a folder: take another {another}\n"
    )
    assert Path("file").read_text() == "mine" and not Path("dangling").exists()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("door", ["run", "notebook"])
def test_a_folder_in_the_place_of_a_file_is_told_before_any_training(
    door, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    Path("out", name).mkdir(parents=True)
    words = {"run": ["run", "out", *TINY], "notebook": ["notebook", "fake.ipynb", "out"]}[door]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told == f"IsADirectoryError: out/{name} is a folder: take another output_dir\n"
    assert [path.name for path in Path("out").iterdir()] == [name]


def test_an_empty_name_is_no_output_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_notebook()
    for words in (["run", "", *TINY], ["notebook", "fake.ipynb", ""]):
        assert main(words) == 1
        assert "output_dir is empty: expected a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fake.ipynb"]


def test_the_tilde_is_home_by_every_door(tmp_path, monkeypatch, capsys):
    from drlora_ref.experiments.tasks.glue_generated import write_glue

    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "glue").mkdir(parents=True)
    elsewhere.mkdir()
    write_glue("cola", home / "glue")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    words = {"task": "cola", "data_dir": "~/glue", "model_name": "tiny-roberta", "max_steps": 2}
    Path(home, "run.yaml").write_text("\n".join(f"{k}: {v}" for k, v in words.items()))
    assert main(["run", "~/out", "-f", "~/run.yaml"]) == 0
    record = json.loads((home / "out" / "record.json").read_text())
    assert record["parameters"]["data_dir"] == "~/glue" and not list(elsewhere.iterdir())
    Path(home, "grid.yaml").write_text(f"parameters: {json.dumps(words)}")
    assert main(["grid", "~/grid.yaml", "--out", "~/grid", "--dry-run"]) == 0
    assert "run: to do" in capsys.readouterr().out


LONG = "x" * 10**6
BOUNDLESS = [
    ["run", "out", "-p", LONG, "1"],
    ["run", "out", "-p", "task", LONG],
    ["run", "out", "-p", "seed", "1" * 5000],
    ["run", "out", "-p", "seed", "(" * 100_000],
    ["run", "out", "-p", "learning_rate", "9" * 400],
    ["run", "out", "-p", "seed", "[" + "[0] * 9," * 9999 + "]"],
    ["run", "out", "-p", "seed", "{'a':" * 80 + "1" + "}" * 80],
    ["run", LONG],
    ["run", "out", *TINY, "-p", "data_dir", LONG],
    ["run", "out", *TINY, "-p", "model_name", LONG],
    ["run", "out", "-p", "rank_map", LONG],
    ["grid", LONG],
    ["notebook", LONG, "out"],
]


@pytest.mark.parametrize("words", BOUNDLESS, ids=range(len(BOUNDLESS)))
def test_no_message_is_longer_than_a_screen(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 2000


USAGE = [[], ["rnu", "out"], ["run"], ["run", "out", "-p", "seed"], ["run", "out", "-p", "--", "1"],
         ["run", "out", "-p", "seed", "--"], ["run", "-x"], ["run", "out", "more"],
         ["grid", "g.yaml", "--workers", "two"], ["grid", "g.yaml", "--cluster", "cloud"],
         ["notebook", "n.ipynb"], ["gpu", "chekc"], ["run", "out", "-p", "x" * 10**6]]  # fmt: skip


@pytest.mark.parametrize("words", USAGE, ids=range(len(USAGE)))
def test_a_command_that_is_none_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and len(error) < 2000
    assert "--help says more" in error


@pytest.mark.parametrize("value", ["-1e-3", "-1E400", "-.5", "-5", "-inf", "-NaN", "-1_0.0"])
@pytest.mark.parametrize("name", ["learning_rate", "dem_weight"])
def test_a_value_may_begin_with_a_minus(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "out", "-p", name, value]) == 1
    assert capsys.readouterr().err.startswith(f"ValueError: {name} = ")
