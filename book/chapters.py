"""Notebooks as chapters: answers closed, solutions in boxes, pictures with words, a way around."""

import ast
import inspect
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

from drlora_ref import plotting

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The path: a notebook off it says so in its first cell.
CORE = [
    path.stem.partition("_")[0]
    for path in NOTEBOOKS
    if "**Side path:**" not in nbformat.read(path, 4).cells[0].source
]
# The files of the paper that a chapter builds, and what may be moved by hand beside it.
FILES = {
    "02": ["layer", "inject"], "03": ["importance"], "04": ["importance"], "05": ["schedule"],
    "06": ["allocator"], "07": ["regularizer"], "08": ["planted"], "09": ["train"],
    "17": ["importance"],
}  # fmt: skip
MOVES = {"04": "smoothing", "05": "budget", "08": "ranks", "17": "ranks"}
HIDDEN = {"reveal", "answer"}  # tags that mean the same as hide-cell


def title_and_question(path: Path) -> tuple[str, str]:
    """("04 · Smoothed scores", "how long should a score remember?") of a notebook."""
    opening = nbformat.read(path, 4).cells[0].source
    question = re.search(r"\*\*One question:\*\* (.+?)(?:\n\n|\Z)", opening, re.S)
    title = opening.splitlines()[0].lstrip("# ")
    return title, " ".join(question[1].split()) if question else ""


def chapter(path: Path) -> nbformat.NotebookNode:
    """The notebook as the book shows it."""
    book, number = nbformat.read(path, 4), path.stem.partition("_")[0]
    answers, cells, section = _solutions(path), [], ""
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if HIDDEN & set(tags):
            cell.metadata["tags"] = list(dict.fromkeys([*tags, "hide-cell"]))
        if cell.cell_type == "code":
            alt = cell.metadata.get("alt") or _words_for_pictures(cell.source, section)
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
        else:
            section = ([section, *re.findall(r"^##? (.+)$", cell.source, flags=re.M)])[-1]
            cell.source = _for_myst(cell)
        if number in MOVES and "## Exercises\n" in cell.source:
            before, heading, after = cell.source.partition("## Exercises\n")
            cells += [new_markdown_cell(text) for text in (before, _move(MOVES[number])) if text]
            cell.source = heading + after
        cells.append(cell)
        for tag in {tag.replace("check", "exercise") for tag in tags if tag.startswith("check-")}:
            code = f"```python\n{answers[tag].strip()}\n```"
            words = f"A solution of exercise {tag.removeprefix('exercise-')}"
            cells.append(new_markdown_cell(_closed(words, code)))
    book.cells = [cells[0], new_markdown_cell(_beside(number)), *cells[1:]]
    return book


def _for_myst(cell: nbformat.NotebookNode) -> str:
    """The text of a Markdown cell, where Jupyter and Sphinx do not read the same."""
    # Jupyter's anchors keep their capitals.
    text = re.sub(r"\]\((\w+\.ipynb)?#[^)]+\)", lambda link: link[0].lower(), cell.source)
    text = re.sub(r"\$\$(.+?)\$\$", _numbered, text, flags=re.S)
    hidden = "hide-cell" in cell.metadata.get("tags", [])
    return _closed("Show the answer", text) if hidden else text


def _numbered(formula: re.Match) -> str:
    """Sphinx puts a formula of several lines into an environment that takes no number."""
    if "\\tag" in formula[1] and r"\\" in formula[1]:
        return f"\\begin{{equation}}\n{formula[1].strip()}\n\\end{{equation}}"
    return formula[0]


def _solutions(path: Path) -> dict[str, str]:
    text = (path.parent / "solutions" / f"{path.stem}.py").read_text()
    parts = re.split(r"^# %% (exercise-\d+)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _closed(summary: str, content: str) -> str:
    return f'<details class="answer"><summary>{summary}</summary>\n\n{content}\n\n</details>'


def _beside(number: str) -> str:
    on_the_way = "On the path" if number in CORE else "A side path: the rest stands without it"
    files = [f"[{name}.py](../paper/{name}.md)" for name in FILES.get(number, [])]
    words = [on_the_way]
    if files:
        words.append(f"the package's own text, annotated: {', '.join(files)}")
    if number in MOVES:
        words.append("[move it by hand](#move-it-by-hand)")
    return ":::{container} beside\n" + " · ".join(words) + "\n:::"


def _move(name: str) -> str:
    html = (ROOT / "book" / "_source" / "moving" / f"{name}.html").read_text()
    return f"## Move it by hand\n\n```{{raw}} html\n{html}\n```"


NAMED = {"xlabel": "across: ", "ylabel": "up: ", "title": "", "label": "", "suptitle": ""}


def _words_for_pictures(source: str, section: str) -> str:
    """Alternative text of what a cell draws: its section, plotting functions, and labels."""
    said: list[str] = []
    for node in ast.walk(ast.parse(re.sub(r"^%.*", "pass", source, flags=re.M))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("plot_"):
            drawn = inspect.getdoc(getattr(plotting, node.attr, None)) or ""
            said.append(drawn.split("\n")[0].rstrip(".").replace("`", ""))
        if isinstance(node, ast.Call):
            given = [(word.arg, word.value) for word in node.keywords]
            if isinstance(node.func, ast.Attribute) and node.func.attr.startswith("set_"):
                given += [(node.func.attr.removeprefix("set_"), value) for value in node.args[:1]]
            said += [
                NAMED[name] + value.value
                for name, value in given
                if name in NAMED and isinstance(value, ast.Constant) and value.value
            ]
    return "; ".join([f"Figure in the section {section}", *dict.fromkeys(filter(None, said))])
