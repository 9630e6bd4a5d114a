"""GLUE's eight raw layouts, the embedded task, the metrics and the evaluation."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from huggingface_hub import constants

from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.tasks import glue
from drlora_ref.experiments.tasks.glue import (
    TASKS,
    encode,
    evaluate,
    load_model,
    load_task,
    make_inputs,
    metric,
)

GLUE = Path(__file__).parents[1] / ".." / "shared" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder at ../shared/glue")

# What trips a CSV reader: words that read as missing values, lone quotes, a trailing space.
TRAPS = ["NA", "null", 'She said "no', '"', "a 'b' , c ", "naïve"]
# One line of each raw file; the header line where there is one.
HEADERS = {
    "CoLA": "",
    "SST-2": "sentence\tlabel",
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    "\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
}
ROWS = {
    "CoLA": "gj04\t{label}\t*\t{a}",
    "SST-2": "{a}\t{label}",
    "MRPC": "{label}\t11\t22\t{a}\t{b}",
    "STS-B": "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\t{a}\t{b}\t{label}",
    "QQP": "1\t2\t3\t{a}\t{b}\t{label}",
    "MNLI": "0\t31\t31n\tfiction\t( )\t( )\t(R)\t(R)\t{a}\t{b}\tneutral\t{label}",
    "QNLI": "0\t{a}\t{b}\t{label}",
    "RTE": "0\t{a}\t{b}\t{label}",
}
RAW_LABELS = {  # raw labels and what they become
    "CoLA": {"0": 0, "1": 1},
    "SST-2": {"0": 0, "1": 1},
    "MRPC": {"0": 0, "1": 1},
    "STS-B": {"0.000": 0.0, "3.800": pytest.approx(3.8), "5": 5.0},
    "QQP": {"0": 0, "1": 1},
    "MNLI": {"entailment": 0, "neutral": 1, "contradiction": 2},
    "QNLI": {"entailment": 0, "not_entailment": 1},
    "RTE": {"entailment": 0, "not_entailment": 1},
}
GLUE_TASKS = [name for name in TASKS if name != "grammar"]


@pytest.fixture(autouse=True)
def no_glue_dir(monkeypatch):
    monkeypatch.delenv("GLUE_DIR", raising=False)


def write_task(folder, name, lines=None, files=None):
    """The raw files of one task, six rows each unless `lines` are given."""
    layout = TASKS[name].folder
    if lines is None:
        labels = list(RAW_LABELS[layout])
        lines = [
            ROWS[layout].format(a=text, b=f"{text} too", label=labels[n % len(labels)])
            for n, text in enumerate(TRAPS)
        ]
    head = [HEADERS[layout]] if HEADERS[layout] else []
    (folder / layout).mkdir(exist_ok=True)
    dev = ["dev_matched.tsv", "dev_mismatched.tsv"] if name == "mnli" else ["dev.tsv"]
    for file in files or ["train.tsv", *dev]:
        (folder / layout / file).write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_raw_layout_becomes_the_hubs_columns_with_every_word_intact(tmp_path, name):
    data = load_task(name, write_task(tmp_path, name))
    labels = list(RAW_LABELS[TASKS[name].folder].values())
    first, *second = TASKS[name].columns
    for split in (data.train, *data.validation.values()):
        assert split.column_names == [*TASKS[name].columns, "label", "idx"]
        assert split[first][:] == TRAPS
        assert not second or split[second[0]][:] == [f"{text} too" for text in TRAPS]
        assert split["label"][:] == [labels[n % len(labels)] for n in range(len(TRAPS))]
        assert split["idx"][:] == list(range(len(TRAPS)))
        assert split.features["idx"] == Value("int32")
    kind = ClassLabel(names=list(TASKS[name].labels)) if TASKS[name].labels else Value("float32")
    assert data.train.features["label"] == kind


@pytest.mark.parametrize(
    "name, columns, labels",
    [
        ("cola", ["sentence"], ["unacceptable", "acceptable"]),
        ("sst2", ["sentence"], ["negative", "positive"]),
        ("mrpc", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
        ("stsb", ["sentence1", "sentence2"], []),
        ("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"]),
        ("mnli", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
        ("qnli", ["question", "sentence"], ["entailment", "not_entailment"]),
        ("rte", ["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    ],
)
def test_columns_and_label_order_are_the_hubs(name, columns, labels):
    assert list(TASKS[name].columns) == columns
    assert list(TASKS[name].labels) == labels


def test_mnli_has_a_matched_and_a_mismatched_validation_split(tmp_path):
    data = load_task("mnli", write_task(tmp_path, "mnli"))
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_bom_and_either_line_end_are_tolerated(tmp_path, end):
    folder = write_task(tmp_path, "sst2")
    for path in (tmp_path / "SST-2").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", end.encode()))
    data = load_task("sst2", folder)
    assert data.train["sentence"][:] == TRAPS
    assert data.train.column_names[0] == "sentence"


def test_incomplete_rows_are_dropped_and_counted_and_the_others_keep_their_idx(tmp_path):
    good = ROWS["QQP"].format(a="Why?", b="How?", label=1)
    lines = [good, "1\t2\t3\tWhy", good, "1\t2\t3\tWhy?\tHow?\t"]
    data = load_task("qqp", write_task(tmp_path, "qqp", lines))
    assert data.train["idx"][:] == [0, 2]
    assert data.source == f"GLUE folder {tmp_path} (4 incomplete rows dropped)"


@needs_glue
def test_real_cola_has_the_papers_counts():
    data = load_task("cola", GLUE)
    assert (len(data.train), len(data.validation["validation"])) == (8551, 1043)
    assert data.source == f"GLUE folder {GLUE}"


@needs_glue
@pytest.mark.parametrize("name, train, dev", [("mrpc", 3668, 408), ("stsb", 5749, 1500)])
def test_real_pair_tasks_have_the_hubs_counts(name, train, dev):
    data = load_task(name, GLUE)
    assert (len(data.train), len(data.validation["validation"])) == (train, dev)


def test_grammar_is_embedded_and_the_same_for_every_seed():
    data, other = load_task("grammar"), load_task("grammar", seed=1)
    assert data.source == "embedded grammar set"
    assert data.train.column_names == ["sentence", "label", "idx"]
    assert set(data.validation["validation"]["label"]) == {0, 1}
    assert data.fingerprint == other.fingerprint


def test_folder_beats_environment_and_environment_beats_hub(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "a", "rte")
    write_task(tmp_path / "b", "rte")
    monkeypatch.setenv("GLUE_DIR", "a")
    assert load_task("rte").source == "GLUE folder a"
    assert load_task("rte", "b").source == "GLUE folder b"


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_a_generated_set_goes_through_the_reader_the_tokenizer_and_a_model(name):
    data, again = load_task(name, "generated"), load_task(name, "generated")
    assert data.source == f"generated {name} set" and data.fingerprint == again.fingerprint
    assert data.train.num_rows == 64 and set(data.train.column_names) >= {"label", "idx"}
    model, tokenizer = load_model(resolve_model("tiny-roberta"), name)
    train, collate, score, _ = make_inputs(data, tokenizer, max_length=64)
    assert all(tokenizer.unk_token_id not in ids for ids in train["input_ids"][:])
    assert not name == "mnli" or len(data.validation) == 2
    model(**collate(train.select(range(8)).to_list())).loss.backward()
    head = [p for n, p in model.named_parameters() if n.startswith("classifier")]
    assert all(p.grad.abs().sum() > 0 for p in head)
    assert -1 <= score(model)["metric"] <= 1


def test_failing_folder_is_an_error_and_not_a_reason_to_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "_from_hub", lambda task: pytest.fail("asked the hub"))
    monkeypatch.setenv("GLUE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        load_task("rte")


def test_grammar_ignores_glue_dir_and_refuses_a_folder(monkeypatch):
    monkeypatch.setenv("GLUE_DIR", "somewhere")
    assert load_task("grammar").source == "embedded grammar set"
    with pytest.raises(ValueError, match=r"data_dir = 'somewhere'.*'grammar' takes none"):
        load_task("grammar", data_dir="somewhere")


def test_hub_gives_the_same_rows_and_fingerprint_as_the_folder(tmp_path, monkeypatch):
    local = load_task("mnli", write_task(tmp_path, "mnli"))
    renumbered = local.train.remove_columns("idx").add_column("idx", [9, 8, 7, 6, 5, 4])
    hub = DatasetDict(train=renumbered, **local.validation, test_matched=local.train)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # so that nothing is probed
    data = load_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert data.source == "hub nyu-mll/glue"
    assert list(data.validation) == list(local.validation)
    assert data.fingerprint == local.fingerprint


def test_hub_out_of_reach_says_how_to_go_on(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"GLUE task 'rte' cannot be had(.|\n)*GLUE_DIR"):
        load_task("rte")


def test_train_size_takes_a_seeded_subset_of_the_training_set_alone():
    full, some = load_task("grammar"), load_task("grammar", train_size=20, seed=3)
    assert len(some.train) == 20
    assert set(some.train["idx"]) < set(full.train["idx"])
    assert some.validation["validation"][:] == full.validation["validation"][:]
    assert load_task("grammar", train_size=20, seed=3).fingerprint == some.fingerprint
    assert load_task("grammar", train_size=20, seed=4).train["idx"][:] != some.train["idx"][:]


@pytest.mark.parametrize("size, message", [(-1, "train_size = -1"), (10**6, "training rows")])
def test_train_size_out_of_range_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        load_task("grammar", train_size=size)


def test_fingerprint_sees_one_changed_word(tmp_path):
    before = load_task("rte", write_task(tmp_path, "rte")).fingerprint
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("null", "nill"), encoding="utf-8")
    assert load_task("rte", str(tmp_path)).fingerprint != before


@pytest.mark.parametrize("wrong, near", [("CoLA", "cola"), ("SST-2", "sst2"), ("sts-b", "stsb")])
def test_unknown_task_names_the_nearest_and_all(wrong, near):
    with pytest.raises(
        ValueError, match=rf"unknown task '{wrong}' \(nearest: {near}\): use cola, .*rte"
    ):
        load_task(wrong)


def test_missing_file_is_named_with_the_expected_layout(tmp_path):
    write_task(tmp_path, "mnli", files=["train.tsv", "dev_matched.tsv"])
    message = "dev_mismatched.tsv not found.*MNLI/train.tsv, MNLI/dev_matched.tsv"
    with pytest.raises(FileNotFoundError, match=message):
        load_task("mnli", str(tmp_path))


def test_wrong_columns_are_named_with_those_found(tmp_path):
    write_task(tmp_path, "rte")
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text("index\tpremise\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    message = r"dev.tsv lacks the columns \['sentence1'\].*'premise'"
    with pytest.raises(ValueError, match=message):
        load_task("rte", str(tmp_path))


def test_cola_file_with_too_few_columns_is_refused(tmp_path):
    write_task(tmp_path, "cola", ["The sailors rode.\t1"])
    with pytest.raises(ValueError, match=r"lacks the columns.*'sentence'"):
        load_task("cola", str(tmp_path))


def test_file_without_a_complete_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no complete row"):
        load_task("rte", write_task(tmp_path, "rte", ["0\ta"]))


@pytest.mark.parametrize(
    "name, label, allowed",
    [
        ("cola", "2", "one of 0, unacceptable, 1, acceptable"),
        ("sst2", "-1", "one of 0, negative, 1, positive"),
        ("mnli", "-", "contradiction"),
        ("rte", "Entailment", "not_entailment"),
        ("stsb", "5.1", "a number from 0 to 5"),
        ("stsb", "nan", "a number from 0 to 5"),
        ("stsb", "high", "a number from 0 to 5"),
    ],
)
def test_bad_label_is_named_with_file_line_and_what_is_allowed(tmp_path, name, label, allowed):
    layout = TASKS[name].folder
    good = next(iter(RAW_LABELS[layout]))
    lines = [ROWS[layout].format(a="a", b="b", label=raw) for raw in (good, label)]
    number = 2 if name == "cola" else 3
    message = f"train.tsv, line {number}: label '{label}' must be .*{allowed}"
    with pytest.raises(ValueError, match=message):
        load_task(name, write_task(tmp_path, name, lines))


class WordTokenizer:
    """One id per letter; the shape of a real tokenizer's answer is all that is needed here."""

    model_max_length = 16

    def __call__(self, *texts, truncation, max_length):
        ids = [[len(word) for word in " | ".join(row).split()] for row in zip(*texts, strict=True)]
        ids = [row[:max_length] if truncation else row for row in ids]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def test_encode_keeps_model_inputs_and_labels_cut_and_unpadded():
    pairs = {"sentence1": ["a bb", "a"], "sentence2": ["ccc", "d e f g"], "label": [1, 0]}
    rows = Dataset.from_dict({**pairs, "idx": [0, 1]})
    encoded = encode(rows, WordTokenizer(), "rte", max_length=5)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert encoded["input_ids"][:] == [[1, 2, 1, 3], [1, 1, 1, 1, 1]]
    assert encoded["labels"][:] == [1, 0]


@pytest.mark.parametrize("max_length", [0, 17])
def test_encode_refuses_a_length_that_the_model_cannot_read(max_length):
    rows = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    with pytest.raises(ValueError, match=f"max_length = {max_length}: must be 1 to 16"):
        encode(rows, WordTokenizer(), "cola", max_length)


def test_matthews_pearson_and_accuracy_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    assert metric("cola", guess, truth) == pytest.approx(np.corrcoef(guess, truth)[0, 1])
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert metric("stsb", x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    for name in ("sst2", "mrpc", "qqp", "mnli", "qnli", "rte"):
        assert metric(name, guess, truth) == pytest.approx(np.mean(guess == truth))


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_constant_predictions_or_labels_correlate_with_nothing(name):
    assert metric(name, [1, 1, 1], [0, 1, 1]) == metric(name, [0, 1, 1], [1, 1, 1]) == 0.0


@pytest.mark.parametrize("name", list(TASKS))
def test_nan_prediction_scores_zero(name):
    assert metric(name, [1.0, float("nan"), 0.0], [1, 0, 0]) == 0.0


class MeanModel(torch.nn.Module):
    """Logits from the mean of the ids (padding left out), so that each row's answer is known."""

    def __init__(self, head):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.dropout = torch.nn.Dropout(0.5)
        self.head = head

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled() and not self.training
        mean = (input_ids * attention_mask).sum(-1) / attention_mask.sum(-1)
        return SimpleNamespace(logits=self.head(self.dropout(mean * self.scale)))


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    names = ("input_ids", "attention_mask")
    batch = {
        name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in rows])
        for name in names
    }
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def encoded_rows(labels, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 9, rng.integers(1, 12)).tolist() for _ in labels]
    mask = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": labels})


def score_head(mean):
    return mean.unsqueeze(-1)


def class_head(mean):
    return torch.stack([torch.full_like(mean, 4.5), mean], dim=-1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluate_pairs_each_prediction_with_its_own_label(batch_size):
    labels = np.random.default_rng(1).uniform(0, 5, 21).tolist()
    rows = encoded_rows(labels)
    means = [np.mean(ids) for ids in rows["input_ids"]]
    found = evaluate(MeanModel(score_head), {"validation": rows}, "stsb", pad, batch_size)
    assert found["metric"] == pytest.approx(np.corrcoef(means, labels)[0, 1], abs=1e-6)
    classes = encoded_rows([n % 2 for n in range(21)])
    guess = [int(np.mean(ids) > 4.5) for ids in classes["input_ids"]]
    found = evaluate(MeanModel(class_head), {"validation": classes}, "rte", pad, batch_size)
    assert found == {
        "metric": pytest.approx(np.mean(np.array(guess) == classes["labels"][:])),
        "collapsed": False,
    }


def test_evaluate_averages_mnlis_two_splits_of_different_size():
    few, many = encoded_rows([1] * 5), encoded_rows([0, 1] * 20, seed=2)
    model = MeanModel(class_head)
    alone = [evaluate(model, {"x": rows}, "mnli", pad)["metric"] for rows in (few, many)]
    both = {"validation_matched": few, "validation_mismatched": many}
    assert alone[0] != alone[1]
    assert evaluate(model, both, "mnli", pad)["metric"] == pytest.approx(np.mean(alone))


def test_evaluate_leaves_modes_and_random_numbers_as_they_were():
    model = MeanModel(score_head).train()
    model.dropout.eval()  # a module that somebody froze stays frozen
    state = torch.get_rng_state()
    evaluate(model, {"validation": encoded_rows([1.0, 2.0, 3.0])}, "stsb", pad)
    assert model.training and not model.dropout.training
    assert torch.equal(state, torch.get_rng_state())


def test_evaluate_restores_modes_after_an_error():
    model = MeanModel(lambda mean: 1 / 0).train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, {"validation": encoded_rows([1.0])}, "stsb", pad)
    assert model.training


def test_one_class_for_every_sentence_is_collapsed_whatever_its_accuracy():
    def head(mean):
        return torch.stack([mean * 0, mean * 0 + 1], dim=-1)

    rows = {"validation": encoded_rows([1, 1, 0])}
    found = evaluate(MeanModel(head), rows, "mrpc", pad)
    assert found == {"metric": pytest.approx(2 / 3), "collapsed": True}


def test_one_score_for_every_sentence_is_collapsed_with_metric_zero():
    rows = {"validation": encoded_rows([1.0, 2.0, 4.0])}
    found = evaluate(MeanModel(lambda mean: score_head(mean * 0 + 2.5)), rows, "stsb", pad)
    assert found == {"metric": 0.0, "collapsed": True}


@pytest.mark.parametrize("name, head", [("stsb", score_head), ("cola", class_head)])
def test_nan_for_one_sentence_is_collapsed_with_metric_zero(name, head):
    def broken(mean):
        return head(torch.where(mean == mean.max(), torch.nan, mean))

    found = evaluate(MeanModel(broken), {"validation": encoded_rows([0, 1, 1, 0])}, name, pad)
    assert found == {"metric": 0.0, "collapsed": True}
