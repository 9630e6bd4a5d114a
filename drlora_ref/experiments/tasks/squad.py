"""SQuAD 1.1 (arXiv 1606.05250) and 2.0 (1806.03822): the answer is a span of a Wikipedia paragraph.

In 2.0 half of the dev set's questions have no answer. This file finds the questions,
squad_windows makes a model's input of them, and squad_answers makes answers of its output.
"""

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, Features, List, Value
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_ref.experiments.given import check_name, place, read_json, screen, shown
from drlora_ref.experiments.sources.hub import fetch_from_hub
from drlora_ref.experiments.sources.models import ModelSource, load_pretrained
from drlora_ref.experiments.sources.words import CITIES, COLOURS, NAMES, THINGS, VERBS
from drlora_ref.experiments.tasks.data import (
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Inputs,
    TaskData,
    find_files,
    find_splits,
    task_data,
)
from drlora_ref.experiments.tasks.evaluation import check_positive, final_texts
from drlora_ref.experiments.tasks.squad_answers import evaluate
from drlora_ref.experiments.tasks.squad_windows import NO_ANSWER, encode, encode_train


@dataclass(frozen=True)
class SquadTask:
    """One row of TASKS."""

    version: str  # in the names of the original files
    hub: str
    unanswerable: bool  # whether questions may have no answer


TASKS = {
    "squad_v1": SquadTask("v1.1", "rajpurkar/squad", unanswerable=False),
    "squad_v2": SquadTask("v2.0", "rajpurkar/squad_v2", unanswerable=True),
}
OPTIONS = ("max_length", "stride", "eval_batch_size", "scoring")  # what `make_inputs` takes

COLUMNS = Features({
    **{name: Value("string") for name in ("id", "title", "context", "question")},
    "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
})  # fmt: skip
LAYOUT = "data > paragraphs (context) > qas (id, question, answers (text, answer_start))"


def metric_name(task: str) -> str:
    """F1, by which runs are compared; squad_answers.evaluate gives the exact match as well.

    >>> metric_name("squad_v2")
    'f1'
    """
    check_name("task", task, TASKS)
    return "f1"


def load_task(
    task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
) -> TaskData:
    """SQuAD's questions: from a folder with the original json files, made up, or from the hub.

    The folder is `data_dir`, else the environment variable SQUAD_DIR; the hub is asked only where
    neither is set. Columns: id, title, context, question, answers (text, answer_start).
    `train_size` counts questions, of which some take several windows.
    Raises ValueError (a wrong argument or file), FileNotFoundError, ConnectionError.

    >>> load_task("squad_v1", "generated").train["answers"][0]
    {'text': ['the white lamp'], 'answer_start': [11]}
    """
    check_name("task", task, TASKS)
    found = find_splits(task, data_dir, "SQUAD_DIR", _from_folder, _from_hub, generate=write_squad)
    return task_data(task, *found, train_size, seed, holdout)


def _from_hub(task: str) -> tuple[dict[str, Dataset], str]:
    name = TASKS[task].hub
    found = fetch_from_hub(f"SQuAD task {task!r}", datasets.load_dataset, name)
    splits = {split: found[split] for split in ("train", "validation")}
    for split, rows in splits.items():
        _check_answers(rows, task, f"hub {name}, {split}")
    return splits, f"hub {name}"


def _from_folder(task: str, folder: str) -> tuple[dict[str, Dataset], str]:
    names = [f"{split}-{TASKS[task].version}.json" for split in ("train", "dev")]
    train, dev = (_read(path, task) for path in find_files(place(folder), names))
    return {"train": train, "validation": dev}, f"SQuAD folder {folder}"


def _read(path: Path, task: str) -> Dataset:
    try:
        articles = read_json(path)["data"]
        rows = [
            {
                "id": qa["id"],
                "title": article["title"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {key: [a[key] for a in qa["answers"]] for key in COLUMNS["answers"]},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        columns = {name: [row[name] for row in rows] for name in COLUMNS}
        dataset = Dataset.from_dict(columns, features=COLUMNS)
    except KeyError as error:
        raise ValueError(f"{path} lacks a key {error}; SQuAD's files hold {LAYOUT}") from None
    except (ValueError, TypeError, OverflowError) as error:  # no JSON, or other kinds of values
        raise ValueError(f"{path}: not in SQuAD's format, {LAYOUT} ({screen(error)})") from None
    if not rows:
        raise ValueError(f"{path} holds no question")
    _check_answers(dataset, task, str(path))
    return dataset


def _check_answers(questions: Dataset, task: str, where: str) -> None:
    for row in questions.to_list():
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        if None in [*row.values(), *texts, *starts]:
            raise ValueError(f"{where}: null in question {row['id']}; every value must be there")
        if not (texts or TASKS[task].unanswerable):
            raise ValueError(
                f"{where}: question {row['id']} has no answer; only squad_v2 allows that"
            )
        for text, start in zip(texts, starts, strict=True):
            held = row["context"][max(start, 0) : start + len(text)]
            if not text.strip():
                raise ValueError(f"{where}: question {row['id']} has a blank answer, {shown(text)}")
            if held != text:
                raise ValueError(
                    f"{where}: question {row['id']}: answer {shown(text)} is not at its "
                    f"answer_start {start} in the context, where there is {shown(held)}"
                )


def write_squad(task: str, folder: Path) -> None:
    """Files in the original format, with generated questions on paragraphs of two to nine facts."""
    version, unanswerable = TASKS[task].version, TASKS[task].unanswerable
    for split, size in {"train": TRAIN_ROWS, "dev": VALIDATION_ROWS}.items():
        rng = random.Random(f"{task} {split}")
        articles = [
            {
                "title": title,
                "paragraphs": [_paragraph(f"{title} {n}", rng, unanswerable) for n in range(2)],
            }
            for title in CITIES[: size // 8]
        ]
        text = json.dumps({"version": version, "data": articles})
        (folder / f"{split}-{version}.json").write_text(text, encoding="utf-8")


def _paragraph(name: str, rng: random.Random, unanswerable: bool) -> dict:
    """Two to nine facts and four questions; if `unanswerable`, two of them on what is not told."""
    names, things, cities = (rng.sample(words, 10) for words in (NAMES, THINGS, CITIES))
    things = [f"the {rng.choice(COLOURS)} {thing}" for thing in things]
    facts = [(n, rng.choice(VERBS), t, c) for n, t, c in zip(names, things, cities, strict=True)]
    told, untold = facts[: rng.randint(2, 9)], facts[-1]
    context = " ".join(f"{who} {did} {what} in {city} ." for who, did, what, city in told)
    qas = []
    for number in range(4):
        impossible = unanswerable and number % 2 == 1
        who, did, what, city = untold if impossible else rng.choice(told)
        asked = {
            f"Who {did} {what} ?": who,
            f"What was {did} in {city} ?": what,
            f"Where was {what} {did} ?": city,
        }
        question, answer = rng.choice(list(asked.items()))
        golds = [] if impossible else [{"text": answer, "answer_start": context.index(answer)}]
        qas.append({"id": f"{name} {number}", "question": question, "answers": golds})
    return {"context": context, "qas": qas}


def load_model(source: ModelSource, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model with a new head for start and end, its tokenizer).

    Raises what load_pretrained raises, and ValueError if an encoded text does not begin with the
    CLS token, whose position stands for "no answer".
    """
    check_name("task", task, TASKS)
    model, tokenizer = load_pretrained(source, AutoModelForQuestionAnswering)
    if tokenizer("a")["input_ids"][NO_ANSWER] != tokenizer.cls_token_id:
        raise ValueError(f"{source.name}: SQuAD needs a tokenizer that begins with a CLS token")
    return model, tokenizer


def make_inputs(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int = 128,
    eval_batch_size: int = 64,
    scoring: str = "official",
) -> Inputs:
    """The task's windows as a training loop takes them; raises ValueError as iterate_windows does.

    scoring: "official", by question, or "authors", by window: see squad_answers.evaluate.

    `train` has a row for each window, so it may be longer than `data.train`, which has a row for
    each question.
    Shapes of a batch: input_ids and attention_mask (batch, length), start_positions and
    end_positions (batch,).
    """
    check_positive(eval_batch_size=eval_batch_size)
    collate = DataCollatorWithPadding(tokenizer)

    def scored(questions: Dataset) -> partial:
        return partial(
            evaluate,
            windows=encode(questions, tokenizer, max_length, stride),
            questions=questions,
            unanswerable=TASKS[data.task].unanswerable,
            collate=collate,
            batch_size=eval_batch_size,
            per_window=scoring == "authors",
        )

    train = encode_train(data.train, tokenizer, max_length, stride)
    score = scored(data.validation["validation"])
    return Inputs(train, collate, score, final_texts(scored, data.holdout))
