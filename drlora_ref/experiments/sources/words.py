"""Tiny made-up data sets in the formats of the real ones, from one closed vocabulary.

They let the very same code read, train and evaluate without a network; nothing can be learned about
the method from them. Here: the vocabulary and GLUE's files. The other families write their own
beside the code that reads them.
"""

import random
from pathlib import Path

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas".split()
CITIES = "Paris Rome Oslo Berlin Madrid Vienna Lisbon Prague Dublin Athens".split()
THINGS = "box chair lamp book table bottle coat clock bag cup".split()
COLOURS = "red blue green black white yellow".split()
VERBS = "bought found lost sold painted carried".split()
GOOD, BAD = "good great fine warm lovely".split(), "bad dull poor cold awful".split()
OTHERS = """
    a an the in on at of to and or not is was has does did it he she that this there who where what
    which whose live lives lived city house friend friends film story day year today yesterday one
    two three four five six seven eight nine ten man woman people said says went go because but so
    then with by for from no yes true false . , ? ! ' s new old big small near far very more less
    his her their report reports market opened closed won late early morning evening were are be
    been will left right put take took into out under over boxes _
""".split()

TRAIN_ROWS, VALIDATION_ROWS = 64, 24


def vocabulary() -> list[str]:
    """Every word that the generated sets use, in a fixed order."""
    lists = (NAMES, CITIES, THINGS, COLOURS, VERBS, GOOD, BAD, OTHERS)
    words = [word for words in lists for word in words]
    return sorted({*words, *(word.capitalize() for word in words)})


def fact(rng: random.Random) -> str:
    """One sentence in which every content word matters."""
    return (
        f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(COLOURS)} {rng.choice(THINGS)} "
        f"in {rng.choice(CITIES)}"
    )


def other_fact(sentence: str, rng: random.Random) -> str:
    """The same sentence about somebody else."""
    first, rest = sentence.split(" ", 1)
    return f"{rng.choice([name for name in NAMES if name != first])} {rest}"


def _cola(rng: random.Random, label: int) -> str:
    words = fact(rng).split()
    if not label:  # "the red box" is English, "red the box" is not
        words[2], words[3] = words[3], words[2]
    return f"gj04\t{label}\t{'' if label else '*'}\t{' '.join(words)} ."


def _pair(rng: random.Random, same: bool) -> str:
    first = fact(rng)
    return f"{first} .\t{first if same else other_fact(first, rng)} ."


def _mnli(rng: random.Random, label: int) -> str:
    first = fact(rng)
    thing = " ".join(first.split()[2:5])
    second = [first, fact(rng), f"no {thing} was {first.split()[1]}"][label]
    gold = ("entailment", "neutral", "contradiction")[label]
    return f"0\t1\t1n\tfiction\t( )\t( )\t(R)\t(R)\t{first} .\t{second} .\t{gold}\t{gold}"


def _qnli(rng: random.Random, label: int) -> str:
    first = fact(rng)
    asked = other_fact(first, rng) if label else first
    verdict = ("entailment", "not_entailment")[label]
    return f"0\tWhere did {asked.split()[0]} go ?\t{first} .\t{verdict}"


# Folder, header line, number of classes, and a row of the raw file for a class.
GLUE = {
    "cola": ("CoLA", "", 2, _cola),
    "sst2": ("SST-2", "sentence\tlabel", 2,
             lambda rng, y: f"a {rng.choice((BAD, GOOD)[y])} film .\t{y}"),
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
