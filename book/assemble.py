"""Writes the pages of the book into book/_source: from notebooks, package, records and pages here.

    python book/assemble.py

Sphinx then makes book/_build of them (`make book`). Nothing is executed: what the book shows is
what the repository holds.
"""

import ast
import json
import shutil
from pathlib import Path

import matplotlib
import nbformat
from chapters import CORE, NOTEBOOKS, chapter, title_and_question
from code_pages import PAPER, ROOMS, annotated, reference
from moving import write as write_moving
from PIL import Image, ImageSequence

from drlora_ref.experiments.results.claims import WHOSE, Claim, claims
from drlora_ref.experiments.run.records import read_events, read_record

BOOK = Path(__file__).parent
ROOT, SOURCE = BOOK.parent, BOOK / "_source"
FILM = ROOT / "results" / "film"


def main() -> None:
    """Write all pages anew."""
    matplotlib.use("Agg")
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir()
    shutil.copytree(ROOT / "results", SOURCE / "results", ignore=shutil.ignore_patterns("*.npz"))
    shutil.copytree(ROOT / "notebooks" / "solutions", SOURCE / "notebooks" / "solutions")
    write_moving(SOURCE / "moving")
    for path in NOTEBOOKS:
        nbformat.write(_with_files(chapter(path), path), _place(f"notebooks/{path.name}"))
    for name in PAPER:
        _place(f"paper/{name}.md").write_text(annotated(name))
    for room in ROOMS:
        _place(f"api/{room}.md").write_text(reference(room))
    _place("results.md").write_text(_results())
    _place("print.md").write_text(_print())
    _place("claims.md").write_text(_claims())
    _place("index.md").write_text(_index())


def _place(name: str) -> Path:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _with_files(book: nbformat.NotebookNode, path: Path) -> nbformat.NotebookNode:
    """The files that belong to a chapter come right after it in the table of contents."""
    own = [name for name, (_, notebook) in PAPER.items() if notebook == path.stem]
    if own:
        listed = "\n".join(f"/paper/{name}" for name in own)
        book.cells.append(
            nbformat.v4.new_markdown_cell(f"```{{toctree}}\n:hidden:\n\n{listed}\n```")
        )
    return book


def _index() -> str:
    side = [path for path in NOTEBOOKS if path.stem.partition("_")[0] not in CORE]
    core = [path for path in NOTEBOOKS if path.stem.partition("_")[0] in CORE]
    text = (BOOK / "index.md").read_text()
    parts = {
        "FILM": _film(),
        "PATH": _map(core),
        "SIDE": _map(side),
        "CORE_PAGES": "\n".join(f"notebooks/{path.stem}" for path in core),
        "SIDE_PAGES": "\n".join(f"notebooks/{path.stem}" for path in side),
        "PAPER": "\n".join(f"- [{n}.py](paper/{n}.md): {eq}" for n, (eq, _) in PAPER.items()),
        "API_PAGES": "\n".join(f"api/{room}" for room in ROOMS),
    }
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _map(paths: list[Path]) -> str:
    """Chapters as stations of a path: number, title, question."""
    stations = []
    for path in paths:
        title, question = title_and_question(path)
        number, _, name = title.partition(" · ")
        stations.append(
            f'<li><a href="notebooks/{path.stem}.html"><span class="number">{number}</span>'
            f'<span class="name">{name}</span><span class="question">{question}</span></a></li>'
        )
    return '```{raw} html\n<ol class="path">\n' + "\n".join(stations) + "\n</ol>\n```"


def _film() -> str:
    """The film as a player of single frames, with the still for who has no scripts."""
    frames = SOURCE / "static" / "film"
    frames.mkdir(parents=True)
    record, events = read_record(FILM), read_events(FILM)
    assert events is not None
    words = []
    with Image.open(FILM / "film.gif") as gif:
        shown = zip(ImageSequence.Iterator(gif), events.steps, events.masks, strict=True)
        for i, (picture, step, mask) in enumerate(shown):
            picture = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
            picture.save(frames / f"frame_{i:02d}.png", optimize=True)
            words.append(
                f"After step {step} of {record['total_steps']}: {int(mask.sum())} of {len(mask)} "
                "components stay, sorted by score on the left, by matrix on the right"
            )
    shutil.copy(FILM / "film.png", frames / "still.png")
    p = record["parameters"]
    ranks = record["rank_pattern"].values()
    return f"""```{{raw}} html
<figure class="film">
<img src="_static/film/still.png" data-frames="_static/film/frame_*.png" width="800" height="500" alt="{words[-1]}">
<form hidden aria-label="the film"><button type="button" data-do="play">Play</button>
<button type="button" data-do="back">Back</button>
<input type="range" min="0" max="{len(words) - 1}" value="{len(words) - 1}" aria-label="frame of the film">
<button type="button" data-do="on">Next</button></form>
<script type="application/json">{json.dumps(words)}</script>
<figcaption>One run of the method: {p["model_name"]}, an encoder of six layers, learns to tell grammatical sentences from
ungrammatical ones (task {p["task"]}, {record["steps"]} steps). Every matrix starts with b(0) = {p["init_r"]} components and keeps
b(T) = {p["target_r"]} on average; seed {p["seed"]}. The ranks end between {min(ranks)} and {max(ranks)};
{record["metric_name"].capitalize()} correlation {record["last"]:.3f}, where 0 is chance and 1 no error. Wq, Wk, Wv are the query,
key and value of attention, Wo is its output, Wf1 and Wf2 are the two feed-forward matrices. A single seed: it shows how the
method works, not how well.</figcaption>
</figure>
```"""


OF_NOTEBOOKS = {"speed": "22", "decoder": "19"}  # which make these records themselves


def _results() -> str:
    """Every record in results/: the runs in a table, the studies by their files."""
    rows = []
    for path in sorted((ROOT / "results").rglob("record.json")):
        record, place = read_record(path), path.parent.relative_to(ROOT)
        p, last = record["parameters"], record["last"]
        rows.append(
            f"| [{place.parts[1]}]({path.relative_to(ROOT)}) | {p['task']} | {p['model_name']} | "
            f"{p['method']} | {record['seed']} | {p['learning_rate']:g} | {p['batch_size']} | "
            f"{record['steps']} | "
            f"{'' if last is None else f'{last:.3f}'} {record['metric_name']} | {record['status']} |"
        )
    studies = [
        f"- [{path.name}](results/{path.name}): {_what(path)}"
        for path in sorted((ROOT / "results").glob("*.json"))
    ]
    text = (BOOK / "results.md").read_text()
    return text.replace("@RUNS@", "\n".join(rows)).replace("@STUDIES@", "\n".join(studies))


def _what(study: Path) -> str:
    """What a study is, by the first line of the script that makes it; else which notebook does."""
    script = study.with_suffix(".py")
    if not script.exists():
        return f"of notebook {OF_NOTEBOOKS[study.stem]}"
    first, *_ = (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()
    return f"{first[0].lower()}{first[1:].partition(': writes')[0].rstrip('.')} (`results/{script.name}`)"


def _print() -> str:
    return (
        "# All chapters on one page\n\nTo be printed, or saved as PDF: how "
        r"$W = W_0 + \sum_i c_i b_i a_i^\top$"  # with a formula MathJax is loaded
        " gets its ranks, from the first chapter to the last. Answers are open here.\n"
    )


def _claims() -> str:
    """The claim ledger: whose claim, where it stands, and by what evidence."""
    text = (BOOK / "claims.md").read_text()
    for whose in WHOSE:
        rows = [_row(claim) for claim in claims() if claim.whose == whose]
        text = text.replace(f"@{whose.upper()}@", "\n".join(rows))
    return text


def _row(claim: Claim) -> str:
    note = f": {claim.note}" if claim.note else ""
    seen = ", ".join(map(_evidence, claim.evidence))
    return f"| {claim.claim} | {claim.source} | **{claim.status}**{note} | {seen} |"


def _evidence(item: str) -> str:
    """A link to the notebook, the record or, of a folder, the page of all records; a test is named."""
    kind, _, number = item.partition(" ")
    if kind == "notebook":
        (path,) = (path for path in NOTEBOOKS if path.stem.startswith(f"{number}_"))
        return f"[{number}](notebooks/{path.name})"
    if not item.startswith("results/"):
        return f"`{item}`"
    return f"[{Path(item).name}]({'results.md' if (ROOT / item).is_dir() else item})"


if __name__ == "__main__":
    main()
