"""The raw files of GLUE's tasks, made up from the closed vocabulary of sources/words.py."""

import random
from collections.abc import Callable
from pathlib import Path

from drlora_ref.experiments.sources import words
from drlora_ref.experiments.tasks.data import TRAIN_ROWS, VALIDATION_ROWS


def _cola(rng: random.Random, label: int) -> str:
    sentence = words.fact(rng).split()
    if not label:  # "the red box" is English, "red the box" is not
        sentence[2], sentence[3] = sentence[3], sentence[2]
    return f"gj04\t{label}\t{'' if label else '*'}\t{' '.join(sentence)} ."


def _pair(rng: random.Random, same: bool) -> str:
    first = words.fact(rng)
    return f"{first} .\t{first if same else words.other_fact(first, rng)} ."


def _mnli(rng: random.Random, label: int) -> str:
    first = words.fact(rng)
    thing = " ".join(first.split()[2:5])
    second = [first, words.fact(rng), f"no {thing} was {first.split()[1]}"][label]
    gold = ("entailment", "neutral", "contradiction")[label]
    return f"0\t1\t1n\tfiction\t( )\t( )\t(R)\t(R)\t{first} .\t{second} .\t{gold}\t{gold}"


def _qnli(rng: random.Random, label: int) -> str:
    first = words.fact(rng)
    asked = words.other_fact(first, rng) if label else first
    verdict = ("entailment", "not_entailment")[label]
    return f"0\tWhere did {asked.split()[0]} go ?\t{first} .\t{verdict}"


# Folder, header line, number of classes, and a row of the raw file for a class.
GLUE: dict[str, tuple[str, str, int, Callable[[random.Random, int], str]]] = {
    "cola": ("CoLA", "", 2, _cola),
    "sst2": ("SST-2", "sentence\tlabel", 2,
             lambda rng, y: f"a {rng.choice((words.BAD, words.GOOD)[y])} film .\t{y}"),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", 2,
             lambda rng, y: f"{y}\t1\t2\t{_pair(rng, y == 1)}"),
    "stsb": ("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
             "sentence2\tscore", 2,
             lambda rng, y: f"0\tm\tf\t2012\t0\tn\tn\t{_pair(rng, y == 1)}\t{(1.0, 4.8)[y]}"),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", 2,
            lambda rng, y: f"1\t2\t3\t{_pair(rng, y == 1)}\t{y}"),
    "mnli": ("MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
             "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
             "label1\tgold_label", 3, _mnli),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", 2, _qnli),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", 2,
            lambda rng, y: f"0\t{_pair(rng, y == 0)}\t{('entailment', 'not_entailment')[y]}"),
}  # fmt: skip


def write_glue(task: str, folder: Path) -> None:
    """The raw .tsv files of one GLUE task; the same in every process."""
    name, header, classes, row = GLUE[task]
    splits = {"train": TRAIN_ROWS}
    for dev in ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",):
        splits[dev] = VALIDATION_ROWS
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, size in splits.items():
        rng = random.Random(f"{task} {split}")
        lines = [row(rng, n % classes) for n in range(size)]
        rng.shuffle(lines)
        text = "\n".join([*([header] if header else []), *lines, ""])
        (folder / name / f"{split}.tsv").write_text(text, encoding="utf-8")
