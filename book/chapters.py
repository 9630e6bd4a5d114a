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
CORE = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "13", "15", "17", "18")
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
    book, number = nbformat.read(path, 4), path.name[:2]
    answers = _solutions(path)
    cells = []
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if HIDDEN & set(tags):
            cell.metadata["tags"] = [*tags, "hide-cell"]
        if cell.cell_type == "markdown" and "hide-cell" in cell.metadata.get("tags", []):
            cell.source = _closed("Show the answer", cell.source)
        if cell.cell_type == "code":
            alt = _words_for_pictures(cell.source)
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
        if cell.cell_type == "markdown":  # Jupyter's anchors keep their capitals
            cell.source = re.sub(r"\]\(#[^)]+\)", lambda link: link[0].lower(), cell.source)
            cell.source = re.sub(r"\$\$(.+?)\$\$", _numbered, cell.source, flags=re.S)
        if (
            number in MOVES
            and (parts := re.split(r"^(?=## Exercises$)", cell.source, flags=re.M))[1:]
        ):
            before, cell.source = parts
            cells += [new_markdown_cell(text) for text in (before, _move(MOVES[number])) if text]
        cells.append(cell)
        for tag in tags:
            if (exercise := tag.replace("check", "exercise")) in answers and exercise != tag:
                source = f"```python\n{answers[exercise].strip()}\n```"
                words = f"A solution of exercise {exercise.split('-')[1]}"
                cells.append(new_markdown_cell(_closed(words, source)))
    cells.insert(1, new_markdown_cell(_beside(number)))
    book.cells = cells
    return book


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


def _words_for_pictures(source: str) -> str:
    """Alternative text of what a cell draws: what its plotting functions say, and its labels."""
    try:
        tree = ast.parse(re.sub(r"^%", "# %", source, flags=re.M))
    except SyntaxError:
        return "Picture drawn by the cell above"
    said: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("plot_"):
            drawn = inspect.getdoc(getattr(plotting, node.attr, None)) or ""
            said.append(drawn.split("\n")[0].rstrip("."))
        if isinstance(node, ast.Call):
            said += [
                f"{word.arg.removesuffix('label')}: {word.value.value}".removeprefix(": ")
                for word in node.keywords
                if word.arg in ("xlabel", "ylabel", "title", "label", "suptitle")
                and isinstance(word.value, ast.Constant)
                and word.value.value
            ]
    return "; ".join(dict.fromkeys(filter(None, said))) or "Picture drawn by the cell above"
