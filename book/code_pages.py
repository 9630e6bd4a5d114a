"""The package as pages: the paper's eight files annotated, and a reference for all of it."""

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drlora_ref"
PAPER = {
    "layer": ("Eq. 5-6", "02_the_layer"),
    "importance": ("Eq. 7-8", "03_importance_scores"),
    "schedule": ("Eq. 9", "05_budget_schedule"),
    "regularizer": ("Eq. 10", "07_dem_regulariser"),
    "allocator": ("Algorithm 1", "06_pruning_and_revival"),
    "train": ("Algorithm 1", "09_a_real_run"),
    "inject": ("which matrices", "02_the_layer"),
    "planted": ("known answers", "08_planted_ranks"),
}
# The reference's pages: a title, and the folders or files that it covers.
ROOMS = {
    "paper": ("The paper's eight files", [f"{name}.py" for name in PAPER]),
    "around": (
        "Around them",
        ["watch.py", "precision.py", "events.py", "observing.py", "plotting.py"],
    ),
    "tuner": ("PEFT, Trainer and export", ["tuner"]),
    "sources": ("Experiments: sources", ["experiments/given.py", "experiments/sources"]),
    "tasks": ("Experiments: tasks", ["experiments/tasks"]),
    "methods": ("Experiments: methods", ["experiments/methods"]),
    "run": ("Experiments: one run", ["experiments/run"]),
    "replicas": ("Experiments: replicas", ["experiments/replicas"]),
    "results": ("Experiments: results", ["experiments/results"]),
    "grids": ("Experiments: grids", ["experiments/grids", "experiments/__main__.py"]),
    "gpu": ("Experiments: an hour on a GPU", ["experiments/gpu"]),
}
Definition = ast.FunctionDef | ast.ClassDef


def as_markdown(doc: str) -> str:
    """A docstring as Markdown: indented blocks and doctests as they stand, the rest as text.

    >>> as_markdown("A share.\\n\\n    s = a / b\\n\\n>>> 1 + 1\\n2")
    'A share.\\n\\n```text\\ns = a / b\\n```\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.split("\n")
        if block.startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
        elif all(line.startswith("    ") for line in lines):
            blocks.append(f"```text\n{inspect.cleandoc(block)}\n```")
        else:
            blocks.append("\n".join(_text(line.strip()) for line in lines))
    return re.sub(r"\n```\n\n```text\n", "\n\n", "\n\n".join(blocks))


def _text(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    plain = [re.sub(r"([<$*_\[\]|~#])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = plain
    return "".join(parts)


def annotated(name: str) -> str:
    """The page of one of the paper's files: what is said, and below it the code that does it."""
    text = (PACKAGE / f"{name}.py").read_text()
    tree, lines = ast.parse(text), text.split("\n")
    equation, notebook = PAPER[name]
    page = [
        f"# {name}.py: {equation}",
        f":::{{container}} beside\nBuilt by hand in the chapter [](../notebooks/{notebook}.ipynb)"
        f" · [reference](../api/paper.md)\n:::",
        as_markdown(ast.get_docstring(tree) or ""),
    ]
    start = tree.body[0].end_lineno or 0
    for node in tree.body:
        if isinstance(node, Definition):
            page += [_code(lines[start : _first_line(node) - 1]), *_explained(node, lines)]
            start = node.end_lineno or 0
    return "\n\n".join(filter(None, [*page, _code(lines[start:])])) + "\n"


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _explained(node: Definition, lines: list[str], owner: str = "") -> list[str]:
    """Heading, what the docstring says, code; of a class its methods after it."""
    parts = [f"{'###' if owner else '##'} `{owner}{node.name}`"]
    if doc := ast.get_docstring(node):
        parts.append(as_markdown(doc))
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    methods = methods if isinstance(node, ast.ClassDef) else []
    end = _first_line(methods[0]) - 1 if methods else node.end_lineno or 0
    said = node.body[0] if ast.get_docstring(node) else None
    body = [
        line
        for number, line in enumerate(lines[_first_line(node) - 1 : end], _first_line(node))
        if not (said and said.lineno <= number <= (said.end_lineno or 0))
    ]
    parts.append(_code(body))
    for method in methods:
        parts += _explained(method, lines, f"{node.name}.")
    return parts


def _code(lines: list[str]) -> str:
    text = "\n".join(lines).strip("\n")
    return f"```python\n{text}\n```" if text.strip() else ""


def reference(room: str) -> str:
    """The page of the reference for a room: every public name, from the docstrings."""
    title, places = ROOMS[room]
    page = [f"# {title}"]
    for place in places:
        path = PACKAGE / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            page += _module(file)
    return "\n\n".join(page) + "\n"


def _module(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    page = [f"## `{name}`", as_markdown(ast.get_docstring(tree) or "")]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            page.append(_entry(node, name))
    return page


def _entry(node: Definition, module: str) -> str:
    """A directive of Sphinx's Python domain: a name that the search and the index know."""
    if isinstance(node, ast.FunctionDef):
        return _directive("function", f"{node.name}{_signature(node)}", module, node, "")
    inner = [
        _directive(
            "property" if _is_property(m) else "method",
            f"{node.name}.{m.name}{'' if _is_property(m) else _signature(m, bound=True)}",
            module,
            m,
            "",
        )
        for m in node.body
        if isinstance(m, ast.FunctionDef) and not m.name.startswith("_") and ast.get_docstring(m)
    ]
    made = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
    signature = _signature(made[0], bound=True) if made else ""
    return _directive("class", f"{node.name}{signature}", module, node, "\n\n".join(inner))


def _directive(kind: str, head: str, module: str, node: Definition, inner: str) -> str:
    doc = as_markdown(ast.get_docstring(node) or "")
    colons = ":::::" if kind == "class" else "::::"
    return f"{colons}{{py:{kind}}} {head}\n:module: {module}\n\n{doc}\n\n{inner}\n{colons}"


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def _signature(node: ast.FunctionDef, bound: bool = False) -> str:
    arguments = ast.unparse(node.args)
    if bound:
        arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
