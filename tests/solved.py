"""Notebooks with their exercises solved.

    python tests/solved.py solved_notebooks

writes a copy of each notebook of NBVAL into the folder, for nbval, and prints where. After its last
cell come, for each exercise, the answer, its check, and an assert that the check was content: one
kernel shows that the outputs are still those of the committed copy, and that the answers solve the
exercises.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPARED = "nbval-check-output"  # nbval --nbval-lax compares the outputs of these cells only
# Those that nbval runs. In the equations' notebooks all outputs are compared; in those that train,
# where another machine may round otherwise, only what is tagged.
STRICT = ("00", "01", "02", "03", "04", "05", "06", "07")
NBVAL = (*STRICT, "08", "13", "17", "21", "22")
# The path; the rest are side paths.
CORE = (*STRICT, "08", "09", "13", "15", "17", "18")
# Those that other tests run, with other parameters.
OTHERS = {"09": "test_real_run", "10": "test_runs", "11": "test_runs", "12": "test_runs",
          "19": "test_decoder"}  # fmt: skip

# How notebooks import `observed`, and what then takes its place in the tests.
OBSERVED = re.compile(r"^from drlora_ref.observing import .*\bobserved\b.*\n", re.M)
ASSERTED = r"""\g<0>
def observed(claim, holds):
    assert holds, claim
    print(f"seen: {claim}")

"""


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def solutions(path: Path) -> dict[str, str]:
    """{tag: source} of the answers to a notebook."""
    text = (ROOT / "notebooks" / "solutions" / f"{path.stem}.py").read_text()
    parts = re.split(r"^# %% (exercise-\d+)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def read_strictly(path: Path) -> nbformat.NotebookNode:
    """The notebook, in which a claim that is not seen is an error: its parameters are its own."""
    book = nbformat.read(path, 4)
    for cell in book.cells:
        cell.source = OBSERVED.sub(ASSERTED, cell.source + "\n").rstrip()
    return book


def as_it_is(path: Path) -> nbformat.NotebookNode:
    """The notebook."""
    return nbformat.read(path, 4)


def solved(path: Path) -> nbformat.NotebookNode:
    """The notebook with answers and checks after its last cell."""
    book = read_strictly(path)
    if path.name.startswith(STRICT):
        for cell in book.cells:
            if not any(tag.startswith("nbval-") for tag in tags(cell)):
                cell.metadata["tags"] = [*tags(cell), COMPARED]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    for tag, answer in solutions(path).items():
        check = tag.replace("exercise", "check")
        (begin,), (end,) = ([i for i, c in enumerate(code) if t in tags(c)] for t in (tag, check))
        between = [cell.source for cell in code[begin + 1 : end]]  # what the check needs
        said = f'assert "Exercise {tag[-1]}: correct" in said.stdout'
        sources = answer, *between, f"%%capture said\n{code[end].source}", said
        book.cells += map(new_code_cell, sources)
    return book


def write_in_place(path: Path, folder: Path, strictly: bool = True) -> Path:
    """A copy of the notebook in the folder, with its answers in the place of its stubs.

    Not strictly: what it claims to have seen need not be seen.
    """
    book, answers = (read_strictly if strictly else as_it_is)(path), solutions(path)
    for cell in book.cells:
        for tag in set(tags(cell)) & set(answers):
            cell.source = answers[tag]
    nbformat.write(book, folder / path.name)
    return folder / path.name


def printed(executed: nbformat.NotebookNode) -> str:
    """What the cells of an executed copy have printed."""
    return "".join(o.get("text", "") for cell in executed.cells for o in cell.get("outputs", []))


def are_solved(path: Path, text: str) -> bool:
    """Whether the checks of a copy that has printed this found every exercise correct."""
    return all(f"Exercise {i + 1}: correct" in text for i in range(len(solutions(path))))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for path in NOTEBOOKS:
        if path.name.startswith(NBVAL):
            nbformat.write(solved(path), folder / path.name)
            print(folder / path.name)
