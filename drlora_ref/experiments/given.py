"""What a person wrote, in a file or on the command line: YAML, words, names that are nearly right.

Every message names what was given, what was expected, and what comes nearest to it.
"""

import ast
import difflib
from collections.abc import Iterable
from pathlib import Path

import yaml

KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word",
         list: "a list"}  # fmt: skip


def nearest(name: object, known: Iterable[object]) -> str:
    """The one of `known` that is spelt most like `name`, in whatever case; "" if none is like it.

    >>> nearest("COLLA", ["cola", "sst2"])
    'cola'
    """
    spelt = {str(word).lower(): str(word) for word in known}
    near = difflib.get_close_matches(str(name).lower(), spelt, n=1)
    return spelt[near[0]] if near else ""


def check_name(kind: str, name: object, known: Iterable[object]) -> None:
    """Raise ValueError, with the nearest name and all of them, if `name` is none of `known`.

    >>> check_name("task", "colla", ["cola", "sst2"])
    Traceback (most recent call last):
    ValueError: unknown task 'colla' (nearest: cola): use cola, sst2
    """
    check_known(f"unknown {kind}", [name], known)


def check_known(problem: str, names: Iterable[object], known: Iterable[object]) -> None:
    """check_name for several names; `problem` is what the message says before the unknown one.

    >>> check_known("a run has no parameter", ["task", "sed"], ["seed", "task"])
    Traceback (most recent call last):
    ValueError: a run has no parameter 'sed' (nearest: seed): use seed, task
    """
    known = list(known)
    for name in names:
        if name not in known:
            near, all_of_them = nearest(name, known) or "none", ", ".join(map(str, known))
            raise ValueError(f"{problem} {name!r} (nearest: {near}): use {all_of_them}")


def check_kind(name: str, value: object, default: object) -> None:
    """Raise ValueError unless a parameter's value is of the same kind as its default.

    A whole number will do where any number is expected; true and false are no numbers.

    >>> check_kind("lora_alpha", 8, default=8.0)
    >>> check_kind("seed", 0.5, default=0)
    Traceback (most recent call last):
    ValueError: seed = 0.5: expected a whole number, as 0
    """
    kind, given = type(default), type(value)
    if given is kind or (kind is float and given is int):
        return
    expected = KINDS.get(kind, kind.__name__)
    example = "" if default == "" else f", as {default!r}"
    hint = ""
    if kind is float and isinstance(value, str) and isinstance(literal(value), float):
        hint = " (YAML reads 1e-3 as a word, and 1.0e-3 as a number)"
    raise ValueError(f"{name} = {value!r}: expected {expected}{example}{hint}")


def literal(text: str) -> object:
    """The value that a word on the command line, or in a notebook's cell, stands for.

    >>> literal("1e-3"), literal("true"), literal("cola"), literal("'cola'"), literal("")
    (0.001, True, 'cola', 'cola', '')
    """
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def read_yaml(file: str | Path) -> dict:
    """The names and values in a YAML file.

    Raises FileNotFoundError, and ValueError for a file that holds anything else.

    >>> read_yaml("none.yaml")
    Traceback (most recent call last):
    FileNotFoundError: none.yaml: no such file
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold lines of `name: value`")
    return found
