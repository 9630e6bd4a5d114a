"""BoolQ, HellaSwag and WinoGrande: the authors' files, pairs and choices, truncation, accuracy."""

import json
import logging
import warnings
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.sources.words import vocabulary
from drlora_ref.experiments.tasks import commonsense
from drlora_ref.experiments.tasks.commonsense import (
    TASKS,
    encode,
    load_model,
    load_task,
    make_inputs,
)

RAW = {  # a row of the authors' file for each task
    "boolq": {"question": "is it so", "title": "T", "answer": True, "passage": "It is “so”."},
    "hellaswag": {
        "ind": 4,
        "activity_label": "Walking",
        "ctx_a": "A man walks.",
        "ctx_b": "he",
        "ctx": "A man walks. he",
        "split": "train",
        "split_type": "indomain",
        "label": 3,
        "endings": ["sits.", "flies.", "sleeps.", "runs."],
        "source_id": "activitynet~1",
    },
    "winogrande": {
        "qID": "1-1",
        "sentence": "Ann thanked Eve because _ had helped.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
}
READ = {  # and what is read from it
    "boolq": {"question": "is it so", "passage": "It is “so”.", "label": 1},
    "hellaswag": {
        "context": "A man walks. he",
        "endings": ["sits.", "flies.", "sleeps.", "runs."],
        "label": 3,
    },
    "winogrande": {
        "context": "Ann thanked Eve because",
        "endings": ["Ann had helped.", "Eve had helped."],
        "label": 1,
    },
}
CHOICES = ("hellaswag", "winogrande")
all_tasks = pytest.mark.parametrize("name", list(TASKS))


@pytest.fixture(autouse=True)
def no_commonsense_dir(monkeypatch):
    monkeypatch.delenv("COMMONSENSE_DIR", raising=False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(resolve_model("tiny-roberta"), "boolq")[1]


def write_rows(folder, name, rows):
    """The same rows as training and validation file of a task."""
    (folder / TASKS[name].folder).mkdir()
    for file in TASKS[name].files:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / TASKS[name].folder / file).write_text(text, encoding="utf-8")
    return str(folder)


@all_tasks
def test_authors_rows_become_texts_and_a_label_from_zero(tmp_path, name):
    data = load_task(name, write_rows(tmp_path, name, [RAW[name]] * 2))
    assert data.train.to_list() == data.validation["validation"].to_list() == [READ[name]] * 2
    assert data.source == f"{TASKS[name].folder} folder {tmp_path / TASKS[name].folder}"


@pytest.mark.parametrize(
    "name, folder, files",
    [
        ("boolq", "BoolQ", ("train.jsonl", "dev.jsonl")),
        ("hellaswag", "HellaSwag", ("hellaswag_train.jsonl", "hellaswag_val.jsonl")),
        ("winogrande", "WinoGrande", ("train_xl.jsonl", "dev.jsonl")),
    ],
)
def test_missing_file_is_named_with_the_authors_own_names(tmp_path, name, folder, files):
    write_rows(tmp_path, name, [RAW[name]])
    (tmp_path / folder / files[1]).unlink()
    message = f"{folder}/{files[1]} not found: such a folder holds {files[0]}, {files[1]}"
    with pytest.raises(FileNotFoundError, match=message):
        load_task(name, str(tmp_path))


@pytest.mark.parametrize(
    "name, asked, label",
    [
        ("boolq", ("google/boolq",), True),
        ("hellaswag", ("Rowan/hellaswag",), "3"),  # a number in the file, a string on the hub
        ("winogrande", ("allenai/winogrande", "winogrande_xl"), "2"),
    ],
)
def test_hub_gives_the_same_rows_and_fingerprint_as_the_folder(
    tmp_path, monkeypatch, name, asked, label
):
    local = load_task(name, write_rows(tmp_path, name, [RAW[name]] * 3))
    rows = Dataset.from_list([{**RAW[name], TASKS[name].label_key: label}] * 3)
    hub, calls = DatasetDict(train=rows, validation=rows, test=rows), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: calls.append(args) or hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # so that nothing is probed
    data = load_task(name)
    assert calls == [asked]
    assert data.source == f"hub {' '.join(asked)}"
    assert data.fingerprint == local.fingerprint


def test_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMONSENSE_DIR", write_rows(tmp_path, "boolq", [RAW["boolq"]]))
    assert load_task("boolq").source == f"BoolQ folder {tmp_path / 'BoolQ'}"


@pytest.mark.parametrize("wrong, near", [("BoolQ", "boolq"), ("hella_swag", "hellaswag")])
def test_unknown_task_names_the_nearest(wrong, near):
    for use in (load_task, commonsense.metric_name):
        with pytest.raises(ValueError, match=rf"unknown task '{wrong}' \(nearest: {near}\)"):
            use(wrong)


@pytest.mark.parametrize("name, key", [(name, key) for name in TASKS for key in TASKS[name].keys])
def test_missing_key_is_named_with_its_line(tmp_path, name, key):
    rows = [RAW[name], {k: v for k, v in RAW[name].items() if k != key}]
    with pytest.raises(ValueError, match=rf"{TASKS[name].files[0]}, line 2 lacks \['{key}'\]"):
        load_task(name, write_rows(tmp_path, name, rows))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("boolq", {"answer": "yes"}, "answer 'yes': must be one of False, True"),
        ("boolq", {"answer": 1}, "answer '1': must be one of False, True"),
        ("boolq", {"passage": None}, "passage None: must be text"),
        ("hellaswag", {"label": 4}, "label '4': must be one of 0, 1, 2, 3"),
        ("hellaswag", {"label": ""}, "label '': must be one of 0, 1, 2, 3"),
        ("hellaswag", {"endings": ["a", "b", "c"]}, "endings .* must be a list of 4"),
        ("hellaswag", {"endings": "abcd"}, "endings 'abcd': must be a list of 4"),
        ("hellaswag", {"endings": ["a", "b", "c", 4]}, "endings .* must be text"),
        ("winogrande", {"answer": "0"}, "answer '0': must be one of 1, 2"),
        ("winogrande", {"sentence": "No blank."}, r"0 blanks \(_\) in 'No blank.', must be 1"),
        ("winogrande", {"sentence": "_ and _."}, r"2 blanks \(_\) in '_ and _.', must be 1"),
        ("winogrande", {"option2": 7}, "option2 7: must be text"),
    ],
)
def test_bad_row_is_named_with_its_file_and_number(tmp_path, name, change, message):
    folder = write_rows(tmp_path, name, [RAW[name], {**RAW[name], **change}])
    with pytest.raises(ValueError, match=f"{TASKS[name].files[0]}, row 2: {message}"):
        load_task(name, folder)


@all_tasks
def test_generated_rows_use_only_the_vocabulary_and_every_label(name):
    data = load_task(name, "generated")
    assert data.source == f"generated {name} set"
    rows = [*data.train, *data.validation["validation"]]
    texts = [row.get("question", row.get("context")) for row in rows]
    texts += [text for row in rows for text in row.get("endings", [row.get("passage")])]
    assert {word for text in texts for word in text.split()} <= set(vocabulary())
    assert set(data.train["label"]) == set(range(len(TASKS[name].labels)))
    choices = [row["endings"] for row in rows if "endings" in row]
    assert all(len(set(endings)) == len(endings) for endings in choices)
    assert data.fingerprint == load_task(name, "generated").fingerprint


def decoded(tokenizer, ids):
    return tokenizer.decode(ids).replace("<s>", "").replace("</s>", "|").split("|")


def test_long_passage_loses_its_end_and_the_question_nothing(tokenizer):
    rows = {"question": ["is the box red ?"], "passage": ["one two three four five six"]}
    encoded = encode(Dataset.from_dict({**rows, "label": [1]}), tokenizer, max_length=12)
    ids = encoded["input_ids"][0]
    assert len(ids) == 12
    assert [part.split() for part in decoded(tokenizer, ids)][:3] == [
        ["is", "the", "box", "red", "?"],
        [],
        ["one", "two", "three"],
    ]


def test_long_context_loses_its_beginning_and_the_endings_nothing(tokenizer):
    rows = {"context": ["one two three four five six"], "endings": [["a red box .", "a lamp"]]}
    encoded = encode(Dataset.from_dict({**rows, "label": [1]}), tokenizer, max_length=11)
    parts = [[p.split() for p in decoded(tokenizer, ids)] for ids in encoded["input_ids"][0]]
    assert parts[0][0] == ["four", "five", "six"] and parts[0][2] == ["a", "red", "box", "."]
    assert parts[1][0] == ["two", "three", "four", "five", "six"] and parts[1][2] == ["a", "lamp"]
    assert tokenizer.truncation_side == "right"  # the caller's tokenizer is as it was


@all_tasks
def test_length_without_room_for_what_is_never_cut_is_refused(tokenizer, name):
    data = load_task(name, "generated")
    longest = max(
        len(tokenizer(text, add_special_tokens=False)["input_ids"])
        for rows in (data.train, *data.validation.values())
        for row in rows
        for text in row.get("endings", [row.get("question")])
    )
    least = longest + 5  # four special tokens, and one of the text that may be cut
    make_inputs(data, tokenizer, max_length=least)
    what = "ending" if name in CHOICES else "question"
    message = f"max_length = {least - 1}: must be {least} or more: no {what} is cut"
    with pytest.raises(ValueError, match=message):
        make_inputs(data, tokenizer, max_length=least - 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 0}, "max_length = 0: must be 1 to 512"),
        ({"max_length": 513}, "max_length = 513: must be 1 to 512"),
        ({"eval_batch_size": 0}, "eval_batch_size = 0: must be at least 1"),
    ],
)
@all_tasks
def test_settings_out_of_range_are_named(tokenizer, name, options, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(load_task(name, "generated"), tokenizer, **{"max_length": 60, **options})


@pytest.mark.parametrize("name, choices", [("hellaswag", 4), ("winogrande", 2)])
def test_batches_of_choices_have_the_examples_first(tokenizer, name, choices):
    inputs = make_inputs(load_task(name, "generated"), tokenizer, max_length=60)
    batch = inputs.collate(inputs.train.to_list()[:3])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[:2] == (3, choices)
    assert batch["labels"].tolist() == inputs.train["labels"][:3]


class Oracle(torch.nn.Module):
    """The logits of the right label for each row that it knows, whatever its padding."""

    def __init__(self, rows, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.classes = classes
        self.answers = {self.key(row["input_ids"]): row["labels"] for row in rows}

    def key(self, ids):
        rows = ids if isinstance(ids[0], list) else [ids]
        return tuple(tuple(i for i in row if i != 1) for row in rows)

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled() and not self.training
        labels = torch.tensor([self.answers[self.key(ids)] for ids in input_ids.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(labels, self.classes))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@all_tasks
def test_oracle_scores_one_through_the_whole_path(tokenizer, name, batch_size):
    data = load_task(name, "generated")
    inputs = make_inputs(data, tokenizer, max_length=60, eval_batch_size=batch_size)
    rows = encode(data.validation["validation"], tokenizer, 60)
    oracle = Oracle(rows, len(TASKS[name].labels))
    assert inputs.evaluate(oracle) == {"metric": 1.0, "collapsed": False}
    assert oracle.training


@all_tasks
def test_the_same_label_for_every_row_is_collapsed(tokenizer, name):
    data = load_task(name, "generated")
    rows = encode(data.validation["validation"], tokenizer, 60)
    share = rows["labels"][:].count(1) / len(rows)
    oracle = Oracle([{**row, "labels": 1} for row in rows], len(TASKS[name].labels))
    found = make_inputs(data, tokenizer, max_length=60).evaluate(oracle)
    assert found == {"metric": pytest.approx(share), "collapsed": True}


@all_tasks
def test_tiny_roberta_takes_the_whole_path_without_noise_or_random_numbers(name, caplog, capfd):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, tokenizer = load_model(resolve_model("tiny-roberta"), name)
        inputs = make_inputs(load_task(name, "generated"), tokenizer, max_length=60)
        model.train()
        model(**inputs.collate(inputs.train.to_list()[:8])).loss.backward()
        state = torch.get_rng_state()
        found = inputs.evaluate(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.classifier.parameters())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert set(found) == {"metric", "collapsed"} and 0 <= found["metric"] <= 1
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_model_has_the_head_that_the_task_needs():
    source = resolve_model("tiny-roberta")
    kinds = {name: type(load_model(source, name)[0]).__name__ for name in TASKS}
    choice = "RobertaForMultipleChoice"
    classes = "RobertaForSequenceClassification"
    assert kinds == {"boolq": classes, "hellaswag": choice, "winogrande": choice}
