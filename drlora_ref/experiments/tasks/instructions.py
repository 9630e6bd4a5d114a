"""Causal language modelling: an instruction is read, an answer is written (a decoder's task).

The paper stops at encoders and BART. Rows are JSON Lines, {"instruction": ..., "answer": ...}; the
loss is on the answer alone, and an answer that is written counts if it is the right one to the
letter. As PEFT's comparison of methods does, a run also measures what it costs elsewhere: the loss
on a text that has nothing to do with the task, before and after (forgetting).
"""

import json
import math
import random
from collections.abc import Iterable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_ref.experiments.given import check_name, place, shown
from drlora_ref.experiments.sources import words
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
from drlora_ref.experiments.tasks.evaluation import (
    batches_by_length,
    check_lengths,
    check_positive,
    evaluation_mode,
    final_texts,
    row_lengths,
)
from drlora_ref.experiments.tasks.orders import order_rows

TASKS = {"instructions": "exact_match", "orders": "exact_match"}  # task: its metric
OPTIONS = ("max_length", "eval_batch_size")
FILES = ["train.jsonl", "validation.jsonl"]
KEYS = ["instruction", "answer"]

# Choice: one plain form for every model, as in PEFT's comparison. A chat template differs from
# model to model, and of some it is longer than the rows here.
PROMPT = "Question: {}\nAnswer:"

# The text by which forgetting is measured. It is nobody's training set: it was written for this.
OTHER_TEXT = """
The river rises in the hills north of the town and reaches the sea after ninety miles.
In winter the lower fields are under water for weeks, and the road is closed.
Most of the houses were built of the grey stone that lies just below the grass.
My grandmother kept bees behind the church until she was well over eighty.
A good bridge is not noticed by the people who walk across it every morning.
The teacher explained that light takes about eight minutes to travel from the sun to the earth.
Bread needs flour, water, salt and yeast, and more patience than most recipes admit.
When the power failed, the whole street came out to look at the stars.
Nobody could say who had painted the portrait, or how it had come into the attic.
If the train is late again, we will miss the last boat to the island.
Cats sleep for more than half of the day, but never when you want them to.
The committee decided to repair the old theatre instead of building a new one.
""".strip().splitlines()


def metric_name(task: str) -> str:
    """The share of answers that are right to the letter.

    >>> metric_name("orders")
    'exact_match'
    """
    check_name("task", task, TASKS)
    return TASKS[task]


def load_task(
    task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
) -> TaskData:
    """A task's rows, of the columns instruction and answer.

    "orders" is embedded. "instructions" reads train.jsonl and validation.jsonl in the folder
    `data_dir`, else in the one that the environment variable INSTRUCTIONS_DIR names; "generated"
    makes up a tiny set. There is none on the hub.
    Raises ValueError (a wrong argument or row), FileNotFoundError.

    >>> load_task("orders", train_size=50).train.column_names
    ['instruction', 'answer']
    """
    check_name("task", task, TASKS)
    if task == "orders" and data_dir:
        raise ValueError(f"data_dir = '{data_dir}': the embedded task 'orders' takes none, use ''")
    if task == "orders":
        splits = {split: Dataset.from_list(order_rows(split)) for split in ("train", "validation")}
        return task_data(task, splits, "embedded orders set", train_size, seed, holdout)
    places = (data_dir, "INSTRUCTIONS_DIR", _from_folder, _from_hub, write_instructions)
    return task_data(task, *find_splits(task, *places), train_size, seed, holdout)


def _from_hub(task: str) -> tuple[dict[str, Dataset], str]:
    raise ValueError(
        f"task {task!r} needs a data_dir (or INSTRUCTIONS_DIR): a folder that holds "
        f"{' and '.join(FILES)}, with one {json.dumps(dict.fromkeys(KEYS, '...'))} a line; "
        "'generated' makes one up, and the task 'orders' is embedded"
    )


def _from_folder(task: str, folder: str) -> tuple[dict[str, Dataset], str]:
    root = place(folder)
    paths = find_files(root, FILES)
    train, validation = (_dataset(read_json_lines(path, KEYS), path) for path in paths)
    return {"train": train, "validation": validation}, f"instructions folder {root}"


def _dataset(raw: Iterable[dict], path: Path) -> Dataset:
    rows = []
    for number, row in enumerate(raw, 1):
        for key in KEYS:
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(
                    f"{path}, row {number}: {key} {shown(row[key])}: must be text, and not empty"
                )
        rows.append({key: row[key].strip() for key in KEYS})
    return Dataset.from_list(rows)


def write_instructions(task: str, folder: Path) -> None:
    """The two files, with generated rows: who did something, and what was it?"""
    for file, size in zip(FILES, (TRAIN_ROWS, VALIDATION_ROWS), strict=True):
        rng, lines = random.Random(f"{task} {file}"), []
        for n in range(size):
            who, did, _, colour, thing, *_ = (fact := words.fact(rng)).split()
            asked = ("who was it ?", who) if n % 2 else (f"what was {did} ?", f"a {colour} {thing}")
            row = {"instruction": f"{fact} . {asked[0]}", "answer": asked[1]}
            lines.append(json.dumps(row) + "\n")
        (folder / file).write_text("".join(lines), encoding="utf-8")


def load_model(source: ModelSource, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(a decoder, its tokenizer); raises what load_pretrained raises."""
    check_name("task", task, TASKS)
    model, tokenizer = load_pretrained(source, AutoModelForCausalLM)
    # A tokenizer that was saved without its limit says 1e30, but the positions are limited too.
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{source.source}: the tokenizer has no eos_token, so no answer could end: give "
            "tokenizer_config.json one"
        )
    return model, tokenizer


def padding(tokenizer: PreTrainedTokenizerBase, side: str) -> PreTrainedTokenizerBase:
    """A tokenizer that pads on this side, whatever its files say; the given one stays as it is."""
    padded = copy(tokenizer)
    padded.padding_side = side
    return padded


def make_inputs(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    eval_batch_size: int = 64,
) -> Inputs:
    """Instructions with their answers as a training loop takes them; `max_length` is in tokens.

    Shapes of a batch: input_ids, attention_mask and labels (batch, length), padded on the right.
    Raises ValueError for a setting out of range, and as `encode` does.
    """
    check_positive(eval_batch_size=eval_batch_size)

    def scored(rows: Dataset, split: str = "holdout") -> partial:
        return partial(
            evaluate,
            encoded=encode(rows, tokenizer, max_length, split),
            tokenizer=tokenizer,
            batch_size=eval_batch_size,
        )

    train = encode(data.train, tokenizer, max_length, "train")
    score = scored(data.validation["validation"], "validation")
    # It pads labels with -100, which the loss skips.
    collate = DataCollatorForSeq2Seq(padding(tokenizer, "right"))
    return Inputs(train, collate, score, final_texts(scored, data.holdout))


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str = "train"
) -> Dataset:
    """Token ids of prompt and answer ("input_ids"), and "labels": -100 but for the answer.

    The answer ends in the tokenizer's eos_token, which is learnt too. Read with care: for many
    decoders that is the padding token as well. Who tells padding by its id (as transformers'
    DataCollatorForLanguageModeling does) never teaches such a model to stop.

    Nothing is cut. Raises ValueError for a max_length as check_lengths, and naming the longest row
    if it is longer.
    """
    check_lengths(tokenizer, max_length=max_length)
    end, parts = tokenizer.eos_token_id, []
    for some in rows.iter(1000):
        prompts = tokenizer([PROMPT.format(text) for text in some["instruction"]])["input_ids"]
        answers = tokenizer([f" {text}" for text in some["answer"]], add_special_tokens=False)
        ids, labels = [], []
        for prompt, answer in zip(prompts, answers["input_ids"], strict=True):
            prompt = prompt[:-1] if prompt[-1] == end else prompt  # some tokenizers end all texts
            ids.append([*prompt, *answer, end])
            labels.append([-100] * len(prompt) + [*answer, end])
        parts.append(Dataset.from_dict({"input_ids": ids, "labels": labels}))
    encoded = concatenate_datasets(parts)
    lengths, most = row_lengths(encoded), tokenizer.model_max_length
    if (n := max(lengths)) > max_length:
        way = "leave it out" if n > most else f"take {n} or more"
        raise ValueError(
            f"{split}, row {lengths.index(n) + 1}: instruction and answer are {n} tokens and "
            f"nothing is cut, but max_length = {max_length} and the model reads {most}: {way}"
        )
    return encoded


def evaluate(
    model: PreTrainedModel,
    encoded: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> dict[str, float | bool | None]:
    """The share of answers that are right to the letter, and the loss on OTHER_TEXT.

    Answers are written greedily, and have one token more than the longest right one of their batch
    to end. Collapsed: one and the same answer (or none) to every instruction. other_text_loss is
    the mean over tokens, in nats; None if it is not finite. Afterwards the model is in the mode it
    was in; no random number is drawn.
    """
    written, right = write_answers(model, encoded, tokenizer, batch_size)
    hits = sum(one == other for one, other in zip(written, right, strict=True))
    return {
        "metric": hits / len(right),
        "collapsed": len(set(written)) == 1 < len(set(right)),
        "other_text_loss": other_text_loss(model, tokenizer),
    }


def write_answers(
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[list[str], list[str]]:
    """(what the model answers, what is right), for each encoded row; without spaces around."""
    collate = DataCollatorWithPadding(padding(tokenizer, "left"))
    answers = [[n for n in labels if n != -100] for labels in encoded["labels"][:]]
    rows = zip(encoded["input_ids"][:], answers, strict=True)
    prompts = Dataset.from_dict({"input_ids": [ids[: -len(answer)] for ids, answer in rows]})
    written = [""] * len(answers)
    with evaluation_mode(model):
        for chosen, batch in batches_by_length(model, prompts, collate, batch_size):
            longest = max(len(answers[place]) for place in chosen)
            given: dict[str, Any] = dict(batch, generation_config=_greedy(tokenizer, longest + 1))
            ids = cast(Any, model).generate(**given)
            texts = _texts(tokenizer, ids[:, batch["input_ids"].shape[1] :])
            for place, text in zip(chosen, texts, strict=True):
                written[place] = text
    return written, _texts(tokenizer, answers)


def _texts(tokenizer: PreTrainedTokenizerBase, ids) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _greedy(tokenizer: PreTrainedTokenizerBase, tokens: int) -> GenerationConfig:
    """How answers are written, whatever generation_config.json of the model says."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0, **ids
    )


def other_text_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 12
) -> float | None:
    """The mean loss of the next token over OTHER_TEXT, each line by itself; None if not finite."""
    lines = tokenizer(OTHER_TEXT, truncation=True)["input_ids"]
    rows = Dataset.from_dict({"input_ids": lines})
    collate = DataCollatorWithPadding(padding(tokenizer, "right"))
    total = tokens = 0.0
    with evaluation_mode(model):
        for _, batch in batches_by_length(model, rows, collate, batch_size):
            read = batch["attention_mask"][:, 1:].bool()
            logits = model(**batch).logits[:, :-1][read].float()
            loss = nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:][read])
            total, tokens = total + loss.item() * len(logits), tokens + len(logits)
    return total / tokens if math.isfinite(total) else None
