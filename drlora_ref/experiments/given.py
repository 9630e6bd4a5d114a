"""What a person wrote, in a file or on the command line: paths, YAML, JSON, names nearly right.

Every message names what was given, what was expected, and what comes nearest to it. None is longer
than a screen, however much was given.
"""

import ast
import difflib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word",
         list: "a list"}  # fmt: skip
LONGEST = 1500  # characters of a message
MOST_VALUES = 100_000  # in a YAML file; what an alias repeats counts each time

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 100, 100, 40


def shown(value: object) -> str:
    """repr of a value, cut to what fits into a message.

    >>> shown("cola"), len(shown("x" * 10**6)), shown([[0, 1]] * 10**6)
    ("'cola'", 100, '[[0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], ...]')
    """
    try:
        return _short.repr(value)
    except ValueError:  # Python does not write so many digits
        return "a number of thousands of digits"


def screen(message: object) -> str:
    """A message, of one that is longer than a screen the beginning and the end.

    >>> screen("short"), len(screen("x" * 10**6)) < 2 * LONGEST
    ('short', True)
    """
    text = str(message)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 200]} ... ({len(text):,} characters) ... {text[-200:]}"


def nearest(name: object, known: Iterable[object]) -> str:
    """The one of `known` that is spelt most like `name`, in whatever case; "" if none is like it.

    >>> nearest("COLLA", ["cola", "sst2"])
    'cola'
    """
    spelt = {str(word).lower(): str(word) for word in known}
    near = difflib.get_close_matches(str(name).lower()[:100], spelt, n=1)
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
            raise ValueError(f"{problem} {shown(name)} (nearest: {near}): use {all_of_them}")


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
        word, number = ("1.0e3", "1.0e+3") if "." in value else ("1e-3", "1.0e-3")
        hint = f" (YAML reads {word} as a word, and {number} as a number)"
    if kind is str and given is bool:
        hint = " (YAML reads yes, no, on and off as true and false: put them in quotes)"
    raise ValueError(f"{name} = {shown(value)}: expected {expected}{example}{hint}")


def literal(text: str) -> object:
    """The value that a word on the command line, or in a notebook's cell, stands for.

    >>> literal("1e-3"), literal("true"), literal("cola"), literal("'cola'"), literal("")
    (0.001, True, 'cola', 'cola', '')
    """
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # brackets without end
        return text


def place(path: str | Path) -> Path:
    """A path that a person wrote: ~ is the home folder, wherever a path may be given.

    >>> place("~/glue") == Path.home() / "glue", place("runs/~") == Path("runs/~")
    (True, True)
    >>> place("~nobody-at-all/glue")
    Traceback (most recent call last):
    ValueError: ~nobody-at-all/glue: there is no such home folder
    """
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))}: there is no such path")
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a record could not name it
        raise ValueError(f"{shown(str(path))}: the name is not UTF-8, take another") from None
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{screen(path)}: there is no such home folder") from None


def read_text(file: str | Path) -> str:
    """The text of a file in UTF-8, every character as it stands there but for a leading BOM.

    Raises ValueError, which names file and line, for one in another encoding.
    """
    content = Path(file).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file "
            "as UTF-8"
        ) from None


def read_lines(file: str | Path) -> list[str]:
    """The lines of read_text, without what ends them: LF, or CR and LF.

    Nothing else ends a line: U+2028, U+0085 or a lone CR may be part of a text. Raises ValueError
    for a file in which a lone CR is all that could end one.
    """
    text = read_text(file)
    if "\r" in text and "\n" not in text:
        raise ValueError(f"{file}: its lines end in CR alone: end them in LF")
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(text: str, where: str) -> Any:
    """What a JSON text holds; `where` it stands is what a ValueError begins with.

    Of a name that comes twice json would take the last value, without a word: it is refused.
    """
    try:
        found = json.loads(text, object_pairs_hook=_each_once)
        if "\\ud" in text.lower():  # half of a character in two halves is JSON, but no text
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except _Twice as error:
        raise ValueError(f"{where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: brackets within brackets, too many for a JSON file") from None
    except ValueError as error:
        reason = f"{type(error).__name__}: {screen(error)}"
        raise ValueError(f"{where}: not JSON ({reason})") from None


class _Twice(Exception):
    """A name that comes twice in an object of JSON."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(n for n, _ in pairs).items() if times > 1)
        raise _Twice(f"{shown(twice)} comes twice")
    return found


def read_json(file: str | Path) -> Any:
    """What a JSON file holds. Raises ValueError, which names the file, as read_text does."""
    return parse_json(read_text(file), str(file))


class Refused(yaml.constructor.ConstructorError):
    """YAML, but of a kind that means something else than it seems to."""

    def __init__(self, problem: str, node: yaml.Node):
        super().__init__(None, None, problem, node.start_mark)


class StrictLoader(yaml.SafeLoader):
    """YAML in which nothing is said twice, and every number is the one that it looks like.

    YAML 1.1, which PyYAML reads, takes 010 for 8 and 1:30 for 90. Of a name that comes twice it
    takes the last value, in silence. And a few lines of aliases may stand for a billion values.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """The values below the topmost node; raises Refused where they are too many."""
        self._count(node, {})
        return super().construct_document(node)

    def _count(self, node: yaml.Node, counts: dict[int, int]) -> int:
        """How many values a node stands for, those of its aliases included."""
        if id(node) not in counts:
            counts[id(node)] = MOST_VALUES + 1  # until it is known: no node may hold itself
            below = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                self._check_names(node)
                below = [one for pair in below for one in pair]
            counts[id(node)] = 1 + sum(self._count(one, counts) for one in below)
        if counts[id(node)] > MOST_VALUES:
            raise Refused(f"more than {MOST_VALUES:,} values, or an alias within itself", node)
        return counts[id(node)]

    def _check_names(self, node: yaml.MappingNode) -> None:
        """Raise Refused for a name that comes twice: in what is merged (<<), nobody else looks."""
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"
                name = key.value if merge else self.construct_object(key)
                if isinstance(name, Hashable) and name in names:
                    raise Refused(f"{shown(name)} comes twice", key)
                names |= {name} if isinstance(name, Hashable) else set()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As SafeLoader's; raises Refused for a tag, as !!int, before what is none."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # PyYAML's constructors fail in as many ways as there are tags
            kind = node.tag.rpartition(":")[2]
            given = shown(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise Refused(f"{given} cannot be read as {kind} (YAML's !!{kind})", node) from None

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """The number that it looks like; raises Refused for one in octal or base 60."""
        octal = re.fullmatch(r"[-+]?0[0-7_]+", node.value)
        if octal or ":" in node.value:
            raise Refused(
                f"{shown(node.value)} is a number {'in octal' if octal else 'to base 60'} for "
                "YAML: write it in decimals, or put it in quotes if it is a word",
                node,
            )
        is_float = node.tag == "tag:yaml.org,2002:float"
        try:
            return (self.construct_yaml_float if is_float else self.construct_yaml_int)(node)
        except ValueError:
            raise Refused(f"{shown(node.value)}: no number, or too many digits", node) from None


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.construct_number)


def read_yaml(file: str | Path) -> dict:
    """The names and values in a YAML file, as StrictLoader reads it.

    Raises FileNotFoundError, and ValueError for a file that holds anything else.

    >>> read_yaml("none.yaml")
    Traceback (most recent call last):
    FileNotFoundError: none.yaml: no such file
    """
    if not place(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        found = yaml.load(read_text(place(file)), StrictLoader)
    except Refused as error:
        raise ValueError(f"{file}, line {error.problem_mark.line + 1}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(screen(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{file} is not YAML: brackets within brackets, too many") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold lines of `name: value`")
    return found
