"""Three tasks of everyday knowledge: BoolQ (arXiv 1905.10044), HellaSwag (1905.07830), WinoGrande
(1907.10641). The paper has none of them; the other DoRA, the weight-decomposed one, was shown on
such tasks. There large models write the answer; here, as in GLUE, an encoder gets a new head.
"""

import json
import random
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_ref.experiments.given import check_name, place, shown
from drlora_ref.experiments.sources import words
from drlora_ref.experiments.sources.hub import fetch_from_hub
from drlora_ref.experiments.sources.models import ModelSource, load_pretrained
from drlora_ref.experiments.tasks.data import (
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Inputs,
    TaskData,
    find_files,
    find_splits,
    read_json_lines,
    task_data,
)
from drlora_ref.experiments.tasks.evaluation import check_lengths, label_inputs

OPTIONS = ("max_length", "eval_batch_size")


@dataclass(frozen=True)
class CommonsenseTask:
    """One row of TASKS; the keys are the same in the authors' files and on the hub."""

    folder: str
    files: tuple[str, str]  # train, validation
    hub: tuple[str, ...]
    keys: tuple[str, ...]  # what `texts` reads
    texts: Callable[[dict], dict]  # the text columns of one raw row
    label_key: str
    labels: tuple[str, ...]  # raw labels, as text, in order


def _boolq_texts(row: dict) -> dict:
    return {"question": row["question"], "passage": row["passage"]}


def _hellaswag_texts(row: dict) -> dict:
    if not isinstance(row["endings"], list) or len(row["endings"]) != 4:
        raise ValueError(f"endings {shown(row['endings'])}: must be a list of 4")
    return {"context": row["ctx"], "endings": row["endings"]}


def _winogrande_texts(row: dict) -> dict:
    """Each choice is an option in place of the blank, with all that follows the blank."""
    before, *after = row["sentence"].split("_")
    if len(after) != 1:
        raise ValueError(f"{len(after)} blanks (_) in {shown(row['sentence'])}, must be 1")
    endings = [row[option] + after[0] for option in ("option1", "option2")]
    return {"context": before.strip(), "endings": endings}


TASKS = {
    "boolq": CommonsenseTask(
        "BoolQ", ("train.jsonl", "dev.jsonl"), ("google/boolq",),
        ("question", "passage"), _boolq_texts, "answer", ("False", "True")),
    "hellaswag": CommonsenseTask(
        "HellaSwag", ("hellaswag_train.jsonl", "hellaswag_val.jsonl"), ("Rowan/hellaswag",),
        ("ctx", "endings"), _hellaswag_texts, "label", ("0", "1", "2", "3")),
    "winogrande": CommonsenseTask(
        "WinoGrande", ("train_xl.jsonl", "dev.jsonl"), ("allenai/winogrande", "winogrande_xl"),
        ("sentence", "option1", "option2"), _winogrande_texts, "answer", ("1", "2")),
}  # fmt: skip


def metric_name(task: str) -> str:
    """Accuracy, for all three.

    >>> metric_name("boolq")
    'accuracy'
    """
    check_name("task", task, TASKS)
    return "accuracy"


def load_task(
    task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
) -> TaskData:
    """A task's data: from a folder of the authors' files, made up ("generated"), or from the hub.

    The folder is `data_dir`, else the environment variable COMMONSENSE_DIR, and holds BoolQ/,
    HellaSwag/ and WinoGrande/; the hub is asked only where neither is set. Columns: question and
    passage (BoolQ), or context and endings, of which the model chooses one; label, from 0.
    Raises ValueError (a wrong argument or row), FileNotFoundError, ConnectionError.

    >>> load_task("winogrande", "generated").train.column_names
    ['context', 'endings', 'label']
    """
    check_name("task", task, TASKS)
    places = (data_dir, "COMMONSENSE_DIR", _from_folder, _from_hub, write_commonsense)
    return task_data(task, *find_splits(task, *places), train_size, seed, holdout)


def _from_hub(task: str) -> tuple[dict[str, Dataset], str]:
    found = fetch_from_hub(f"task {task!r}", datasets.load_dataset, *TASKS[task].hub)
    source = f"hub {' '.join(TASKS[task].hub)}"
    splits = ("train", "validation")  # the labels of test are not public
    return {split: _dataset(found[split], task, f"{source} {split}") for split in splits}, source


def _from_folder(task: str, folder: str) -> tuple[dict[str, Dataset], str]:
    root, entry = place(folder) / TASKS[task].folder, TASKS[task]
    paths = find_files(root, list(entry.files))
    raw = [read_json_lines(path, [*entry.keys, entry.label_key]) for path in paths]
    train, validation = (_dataset(rows, task, path) for rows, path in zip(raw, paths, strict=True))
    return {"train": train, "validation": validation}, f"{entry.folder} folder {root}"


def _dataset(raw: Iterable[dict], task: str, where: str | Path) -> Dataset:
    rows = []
    for number, row in enumerate(raw, 1):
        try:
            rows.append(_checked(row, TASKS[task]))
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: {error}") from None
    return Dataset.from_list(rows)


def _checked(row: dict, entry: CommonsenseTask) -> dict:
    for key in entry.keys:
        texts = row[key] if key == "endings" and isinstance(row[key], list) else [row[key]]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{key} {shown(row[key])}: must be text")
    label = str(row[entry.label_key])
    if label not in entry.labels:
        raise ValueError(
            f"{entry.label_key} {shown(label)}: must be one of {', '.join(entry.labels)}"
        )
    return {**entry.texts(row), "label": entry.labels.index(label)}


def write_commonsense(task: str, folder: Path) -> None:
    """Files as the authors distribute them, with generated rows: who did what, and with what."""
    entry, row = TASKS[task], {"boolq": _boolq, "hellaswag": _hellaswag, "winogrande": _winogrande}
    (folder / entry.folder).mkdir()
    for file, size in zip(entry.files, (TRAIN_ROWS, VALIDATION_ROWS), strict=True):
        rng = random.Random(f"{task} {file}")
        rows = [row[task](rng, n % len(entry.labels)) for n in range(size)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / entry.folder / file).write_text(text, encoding="utf-8")


def _boolq(rng: random.Random, label: int) -> dict:
    first = words.fact(rng)
    asked = first if label else words.other_fact(first, rng)
    passage = [first, *(words.fact(rng) for _ in range(rng.randint(0, 3)))]
    text = {"question": f"is it true that {asked}", "passage": " . ".join(passage)}
    return {**text, "title": "", "answer": bool(label)}


def _hellaswag(rng: random.Random, label: int) -> dict:
    first = words.fact(rng)
    _, _, _, colour, thing, *_ = first.split()
    colours = rng.sample([c for c in words.COLOURS if c != colour], 3)
    colours.insert(label, colour)
    context = {"ctx_a": f"{first} .", "ctx_b": "there was", "ctx": f"{first} . there was"}
    return {**context, "endings": [f"a {colour} {thing} ." for colour in colours], "label": label}


def _winogrande(rng: random.Random, label: int) -> dict:
    people, places = rng.sample(words.NAMES, 2), rng.sample(words.CITIES, 2)
    went = " and ".join(f"{who} went to {where}" for who, where in zip(people, places, strict=True))
    options = {"option1": people[0], "option2": people[1], "answer": str(label + 1)}
    return {"sentence": f"{went} , so _ was in {places[label]} .", **options}


def load_model(source: ModelSource, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model with a new head, its tokenizer); raises what load_pretrained raises.

    BoolQ's head has two classes; the others' gives each choice a score.
    """
    check_name("task", task, TASKS)
    if task == "boolq":
        settings = {"num_labels": 2, "problem_type": "single_label_classification"}
        return load_pretrained(source, AutoModelForSequenceClassification, **settings)
    return load_pretrained(source, AutoModelForMultipleChoice)


def make_inputs(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eval_batch_size: int = 64,
) -> Inputs:
    """The task's rows as a training loop takes them; raises ValueError as `encode` does.

    Shapes of a batch's tensors: (batch, length), or (batch, choices, length).
    """
    from sklearn.metrics import accuracy_score  # as in glue.py

    encoded = partial(encode, tokenizer=tokenizer, max_length=max_length)
    choices = "endings" in data.train.column_names
    collate = (DataCollatorForMultipleChoice if choices else DataCollatorWithPadding)(tokenizer)
    return label_inputs(data, encoded, accuracy_score, collate, eval_batch_size)


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids of each pair of texts, plus "labels"; a row with choices has a list for each.

    Choice: a passage loses its end; a context loses its beginning, since the ending continues its
    last words. Questions and endings are never cut.
    Raises ValueError for a `max_length` above what the model can read, or too small for a question
    or ending.
    """
    check_lengths(tokenizer, max_length=max_length)
    parts = []
    for rows in dataset.iter(10_000):
        tokens = (_choices if "endings" in rows else _pairs)(rows, tokenizer, max_length)
        parts.append(Dataset.from_dict({**tokens, "labels": rows["label"]}))
    return concatenate_datasets(parts)


def _pairs(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    _check_room("question", rows["question"], tokenizer, max_length)
    texts = rows["question"], rows["passage"]
    return tokenizer(*texts, truncation="only_second", max_length=max_length)


def _choices(rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    endings = [ending for choices in rows["endings"] for ending in choices]
    _check_room("ending", endings, tokenizer, max_length)
    n = len(rows["endings"][0])
    contexts = [context for context in rows["context"] for _ in range(n)]
    cut_left = copy(tokenizer)
    cut_left.truncation_side = "left"
    tokens = cut_left(contexts, endings, truncation="only_first", max_length=max_length)
    starts = range(0, len(endings), n)
    return {name: [flat[i : i + n] for i in starts] for name, flat in tokens.items()}


def _check_room(
    what: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    least = max(map(len, ids)) + tokenizer.num_special_tokens_to_add(pair=True) + 1
    if least > max_length:
        raise ValueError(f"max_length = {max_length}: must be {least} or more: no {what} is cut")
