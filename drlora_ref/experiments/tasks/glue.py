"""The paper's eight GLUE tasks (arXiv 1804.07461) and an embedded one: data, metric, evaluation."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from numpy.typing import ArrayLike
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_ref.experiments.given import check_name, place, read_lines, shown
from drlora_ref.experiments.sources.hub import fetch_from_hub
from drlora_ref.experiments.sources.models import ModelSource, load_pretrained
from drlora_ref.experiments.tasks.data import Collate, Inputs, TaskData, find_splits, task_data
from drlora_ref.experiments.tasks.evaluation import (
    SAME,
    check_room,
    evaluate_labels,
    label_inputs,
)
from drlora_ref.experiments.tasks.glue_generated import write_glue
from drlora_ref.experiments.tasks.grammar import grammar_sentences


@dataclass(frozen=True)
class GlueTask:
    """One row of TASKS: the hub's names, and what GLUE's raw files call the same things."""

    folder: str
    columns: dict[str, str]  # text columns: name on the hub -> name in the raw file
    label_column: str
    labels: tuple[str, ...]  # in the order of the hub's ClassLabel; empty: a score from 0 to 5
    metric: str = "accuracy"
    validation: tuple[str, ...] = ("validation",)
    header: tuple[str, ...] = ()  # column names, where the file has no line for them


ONE, TWO = {"sentence": "sentence"}, {"sentence1": "sentence1", "sentence2": "sentence2"}
ACCEPTABLE, ENTAILS = ("unacceptable", "acceptable"), ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask("CoLA", ONE, "label", ACCEPTABLE, "matthews",
                     header=("source", "label", "star", "sentence")),
    "sst2": GlueTask("SST-2", ONE, "label", ("negative", "positive")),
    "mrpc": GlueTask("MRPC", {"sentence1": "#1 String", "sentence2": "#2 String"}, "Quality",
                     ("not_equivalent", "equivalent")),
    "stsb": GlueTask("STS-B", TWO, "score", (), "pearson"),
    "qqp": GlueTask("QQP", {"question1": "question1", "question2": "question2"}, "is_duplicate",
                    ("not_duplicate", "duplicate")),
    "mnli": GlueTask("MNLI", {"premise": "sentence1", "hypothesis": "sentence2"}, "gold_label",
                     ("entailment", "neutral", "contradiction"),
                     validation=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask("QNLI", {"question": "question", "sentence": "sentence"}, "label", ENTAILS),
    "rte": GlueTask("RTE", TWO, "label", ENTAILS),
    "grammar": GlueTask("", ONE, "label", ACCEPTABLE, "matthews"),
}  # fmt: skip
OPTIONS = ("max_length", "eval_batch_size")  # the settings that `make_inputs` takes


def get_task(task: str) -> GlueTask:
    """The row of TASKS; raises ValueError, with the nearest name, if there is none."""
    check_name("task", task, TASKS)
    return TASKS[task]


def metric_name(task: str) -> str:
    """matthews, pearson or accuracy, as `metric` computes it.

    >>> metric_name("stsb")
    'pearson'
    """
    return get_task(task).metric


def load_task(
    task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
) -> TaskData:
    """A task's data: embedded ("grammar"), from a folder in GLUE's own layout, or from the hub.

    The folder is `data_dir`, else the environment variable GLUE_DIR; the hub is asked only where
    neither is set, and a source that fails is an error. The data_dir "generated" makes up a tiny
    set. Wherever they come from, the columns are the hub's: text, label, idx. A `train_size` above
    0 takes that many training rows at random, drawn with `seed`, once `holdout` are put aside.
    Raises ValueError (a wrong argument, column or label), FileNotFoundError, ConnectionError.

    >>> load_task("grammar", train_size=50).train.num_rows
    50
    """
    get_task(task)
    if task == "grammar" and data_dir:
        raise ValueError(f"data_dir = '{data_dir}': the embedded task 'grammar' takes none, use ''")
    if task == "grammar":
        splits, source = _embedded(), "embedded grammar set"
    else:
        splits, source = find_splits(
            task, data_dir, "GLUE_DIR", _from_folder, _from_hub, generate=write_glue
        )
    return task_data(task, splits, source, train_size, seed, holdout)


def _embedded() -> dict[str, Dataset]:
    splits = {}
    for split in ("train", "validation"):
        rows = [(row["sentence"], row["label"]) for row in grammar_sentences(split)]
        splits[split] = _dataset("grammar", [(*row, idx) for idx, row in enumerate(rows)])
    return splits


def _from_hub(task: str) -> tuple[dict[str, Dataset], str]:
    found = fetch_from_hub(f"GLUE task {task!r}", datasets.load_dataset, "nyu-mll/glue", task)
    wanted = ("train", *TASKS[task].validation)  # the test splits have no labels
    return {split: found[split] for split in wanted}, "hub nyu-mll/glue"


def _from_folder(task: str, folder: str) -> tuple[dict[str, Dataset], str]:
    root = place(folder) / TASKS[task].folder
    splits = ("train", *TASKS[task].validation)
    files = {split: root / f"{split.replace('validation', 'dev')}.tsv" for split in splits}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        layout = ", ".join(f"{root.name}/{path.name}" for path in files.values())
        raise FileNotFoundError(f"{', '.join(missing)} not found: a GLUE folder holds {layout}")
    read, dropped = zip(*[_read_tsv(path, task) for path in files.values()], strict=True)
    note = f" ({sum(dropped)} incomplete rows dropped)" if any(dropped) else ""
    return dict(zip(splits, read, strict=True)), f"GLUE folder {folder}{note}"


def _read_tsv(path: Path, task: str) -> tuple[Dataset, int]:
    # No csv parser: GLUE's files quote nothing, so a lone " and the words NA and null are text.
    lines = read_lines(path)
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    found = lines[0].split("\t")
    header = TASKS[task].header[: len(found)] or tuple(found)
    raw = [*TASKS[task].columns.values(), TASKS[task].label_column]
    if missing := [column for column in raw if column not in header]:
        raise ValueError(f"{path} lacks the columns {missing}; its first line holds {shown(found)}")
    places = [header.index(column) for column in raw]
    rows, skip = [], 0 if TASKS[task].header else 1
    for idx, line in enumerate(lines[skip:]):
        fields = line.split("\t")
        # As on the hub, a row that ends early (QQP has some) is dropped; the others keep their idx.
        if len(fields) > max(places) and fields[places[-1]]:
            *text, label = (fields[place] for place in places)
            rows.append((*text, _label(label, task, f"{path}, line {idx + skip + 1}"), idx))
    if not rows:
        raise ValueError(f"{path} holds no complete row of {raw}")
    return _dataset(task, rows), len(lines) - skip - len(rows)


def _label(text: str, task: str, where: str) -> int | float:
    names = TASKS[task].labels
    numbers = {key: n for n, name in enumerate(names) for key in (str(n), name)}
    with suppress(KeyError, ValueError):
        label = numbers[text] if names else float(text)
        if 0 <= label <= 5:
            return label
    allowed = f"one of {', '.join(numbers)}" if names else "a number from 0 to 5"
    raise ValueError(f"{where}: label {shown(text)} must be {allowed}")


def _dataset(task: str, rows: list[tuple]) -> Dataset:
    names = list(TASKS[task].labels)
    label = ClassLabel(names=names) if names else Value("float32")
    text = {name: Value("string") for name in TASKS[task].columns}
    features = Features({**text, "label": label, "idx": Value("int32")})
    columns = zip(*rows, strict=True)
    return Dataset.from_dict(dict(zip(features, columns, strict=True)), features=features)


def load_model(source: ModelSource, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model with a new head for `task`, its tokenizer); raises what load_pretrained raises."""
    labels = dict(enumerate(get_task(task).labels or ("score",)))
    return load_pretrained(
        source,
        AutoModelForSequenceClassification,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
        problem_type="single_label_classification" if len(labels) > 1 else "regression",
    )


def make_inputs(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eval_batch_size: int = 64,
) -> Inputs:
    """The task's rows as a training loop takes them; raises ValueError as `encode` does.

    Shapes of a batch: input_ids and attention_mask (batch, length), labels (batch,).
    """
    encoded = partial(encode, tokenizer=tokenizer, task=data.task, max_length=max_length)
    collate, score = DataCollatorWithPadding(tokenizer), partial(metric, data.task)
    return label_inputs(data, encoded, score, collate, eval_batch_size)


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, max_length: int
) -> Dataset:
    """Token ids of one or two text columns, cut to `max_length` and not padded, plus "labels".

    Raises ValueError for a `max_length` as check_room does.
    """
    check_room(tokenizer, len(get_task(task).columns), max_length=max_length)
    parts = []
    for rows in dataset.iter(10_000):  # all of MNLI at once would take 4 GB
        text = [rows[name] for name in get_task(task).columns]
        tokens = tokenizer(*text, truncation=True, max_length=max_length)
        parts.append(Dataset.from_dict({**tokens, "labels": rows["label"]}))
    return concatenate_datasets(parts)


def metric(task: str, predictions: ArrayLike, labels: ArrayLike) -> float:
    """The paper's metric as a fraction: Matthews (CoLA), Pearson (STS-B), accuracy (the others).

    Shapes: predictions and labels (n,): class numbers, or STS-B's scores.

    Choice: 0.0, not NaN, where a prediction is NaN and where Pearson is undefined (predictions or
    labels all equal; Matthews is 0.0 there by convention). The paper is silent.

    >>> round(metric("cola", predictions=[0, 1, 1, 1], labels=[0, 1, 0, 1]), 4)
    0.5774
    """
    # A second to import, which whoever only looks at the settings of a run need not wait for.
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    kind, predictions = get_task(task).metric, np.asarray(predictions, dtype=float)
    if not np.isfinite(predictions).all():
        return 0.0
    if kind == "pearson":
        undefined = min(np.ptp(predictions), np.ptp(labels)) < SAME
        return 0.0 if undefined else float(pearsonr(predictions, labels).statistic)
    score = matthews_corrcoef if kind == "matthews" else accuracy_score
    return float(score(labels, predictions.astype(int)))


def evaluate(
    model: nn.Module,
    encoded_validation: dict[str, Dataset],
    task: str,
    collate: Collate,
    batch_size: int = 64,
) -> dict[str, float | bool]:
    """`metric` of `task` on its encoded validation splits, as evaluate_labels does it."""
    score = partial(metric, task)
    return evaluate_labels(model, encoded_validation, score, collate, batch_size)
