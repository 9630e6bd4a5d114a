"""SQuAD 1.1 and 2.0: the files, the windows, the search for a span, exact match and F1."""

import json
import math
import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from drlora_ref.experiments.sources.models import ModelSource, resolve_model
from drlora_ref.experiments.tasks import squad, squad_windows
from drlora_ref.experiments.tasks.squad import (
    TASKS,
    load_model,
    load_task,
    make_inputs,
    write_squad,
)
from drlora_ref.experiments.tasks.squad_answers import (
    LONGEST,
    Spans,
    best_spans,
    choose_answers,
    score_answers,
)
from drlora_ref.experiments.tasks.squad_windows import (
    Windows,
    answer_characters,
    encode,
    encode_train,
    locate,
)

SHORT = dict(max_length=40, stride=10)  # so short that the longer contexts take several windows


@pytest.fixture(autouse=True)
def no_squad_dir(monkeypatch):
    monkeypatch.delenv("SQUAD_DIR", raising=False)


@pytest.fixture(scope="module")
def tiny():
    """(model, tokenizer) of a random RoBERTa for question answering."""
    torch.manual_seed(0)
    return load_model(resolve_model("tiny-roberta"), "squad_v2")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


def questions(*rows):
    """Rows of (context, question, gold answers); each answer's first place in the context."""
    return Dataset.from_list(
        [
            {
                **dict(id=str(n), title="t", context=context, question=question),
                "answers": {"text": golds, "answer_start": [context.index(g) for g in golds]},
            }
            for n, (context, question, golds) in enumerate(rows)
        ],
        features=squad.COLUMNS,
    )


class Pointer(torch.nn.Module):
    """Knows where to point in every window: to `positions`, by the window's token ids."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        assert not torch.is_grad_enabled() and not self.training
        start, end = torch.full((2, *input_ids.shape), -10.0)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            first, last = self.positions(tuple(ids[mask.bool()].tolist()))
            start[row, first], end[row, last] = 10.0, 10.0
        return SimpleNamespace(start_logits=start * self.scale, end_logits=end * self.scale)


def oracle(rows, tokenizer, max_length, stride):
    encoded = encode_train(rows, tokenizer, max_length, stride)
    columns = (encoded[name] for name in ("input_ids", "start_positions", "end_positions"))
    known = {tuple(ids): where for ids, *where in zip(*columns, strict=True)}
    return Pointer(known.__getitem__)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lengths", [SHORT, dict(max_length=384, stride=128)])
def test_model_that_points_to_the_gold_span_scores_one(task, lengths, tokenizer):
    data = load_task(task, "generated")
    inputs = make_inputs(data, tokenizer, **lengths, eval_batch_size=7)
    model = oracle(data.validation["validation"], tokenizer, **lengths)
    assert inputs.evaluate(model) == {
        "metric": 1.0,
        "f1": 1.0,
        "exact_match": 1.0,
        "collapsed": False,
    }


@pytest.mark.parametrize("task", TASKS)
def test_random_model_trains_and_is_evaluated_on_windows(task, tiny):
    model, tokenizer = tiny
    inputs = make_inputs(load_task(task, "generated"), tokenizer, **SHORT)
    batch = inputs.collate(inputs.train.select(range(8)).to_list())
    assert {len(tensor) for tensor in batch.values()} == {8}
    model.zero_grad()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = inputs.evaluate(model)
    assert 0 <= found["exact_match"] <= found["metric"] < 0.6


def test_windows_without_the_answer_count_in_the_loss_as_pointing_to_the_first_token(tiny):
    model, tokenizer = tiny
    inputs = make_inputs(load_task("squad_v2", "generated"), tokenizer, **SHORT)
    rows = inputs.train.to_list()
    chosen = [row for row in rows if not row["start_positions"]][:3] + rows[:3]
    assert [row["end_positions"] for row in chosen[:3]] == [0, 0, 0]
    batch = inputs.collate(chosen)
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    parts = [
        cross_entropy(output[f"{side}_logits"], batch[f"{side}_positions"], reduction="none")
        for side in ("start", "end")
    ]
    torch.testing.assert_close(output.loss, torch.stack(parts).mean())


@pytest.mark.parametrize("task", TASKS)
def test_start_and_end_of_every_window_decode_to_its_answer(task, tokenizer):
    rows = load_task(task, "generated").train
    encoded = encode_train(rows, tokenizer, **SHORT)
    pointed = 0
    for n, window in zip(encode(rows, tokenizer, **SHORT).question, encoded, strict=True):
        first, last, ids = (
            window[key] for key in ("start_positions", "end_positions", "input_ids")
        )
        text = "".join(rows[int(n)]["answers"]["text"])
        if first:
            assert tokenizer.decode(ids[first : last + 1]) == text
            pointed += 1
        else:
            context = tokenizer.decode(ids).split("</s>")[2]
            assert last == 0 and (not text or f" {text} " not in f" {context} ")
    answered = sum(bool(answers["text"]) for answers in rows["answers"])
    assert answered <= pointed < len(encoded)


def test_contexts_take_the_fewest_windows_that_overlap_by_stride(tokenizer):
    rows = load_task("squad_v1", "generated").train
    counts = np.bincount(encode(rows, tokenizer, **SHORT).question)
    expected = []
    for row in rows:
        room = SHORT["max_length"] - len(row["question"].split()) - 4
        more = max(0, len(row["context"].split()) - room)
        expected.append(1 + math.ceil(more / (room - SHORT["stride"])))
    assert counts.tolist() == expected and {1, 2} < set(expected)


def test_every_token_of_every_context_is_in_a_window(tokenizer):
    rows = load_task("squad_v1", "generated").train
    windows = encode(rows, tokenizer, **SHORT)
    for n, row in enumerate(rows):
        offsets = windows.offsets[windows.question == n].reshape(-1, 2)
        held = {row["context"][begin:end] for begin, end in offsets if begin >= 0}
        assert held == set(row["context"].split())
        assert offsets[:, 1].max() == len(row["context"])


def test_answer_in_the_last_window_of_a_long_context_is_found(tokenizer):
    context = "Ben lost the red cup in Rome . " * 500 + "Anna found the blue box in Oslo ."
    rows = questions((context, "Who found the blue box ?", ["Anna"]))
    data = squad.TaskData("squad_v1", rows, {"validation": rows}, "", "")
    inputs = make_inputs(data, tokenizer, max_length=384, stride=128)
    positions = inputs.train["start_positions"][:]
    assert len(positions) > 10 and not any(positions[:-1]) and positions[-1]
    found = inputs.evaluate(oracle(rows, tokenizer, max_length=384, stride=128))
    assert found["metric"] == found["exact_match"] == 1.0


def test_questions_encoded_few_at_a_time_are_encoded_alike(tokenizer, monkeypatch):
    rows = load_task("squad_v2", "generated").train
    at_once, train = encode(rows, tokenizer, **SHORT), encode_train(rows, tokenizer, **SHORT)
    monkeypatch.setattr(squad_windows, "CHUNK", 7)
    few = encode(rows, tokenizer, **SHORT)
    assert few.tokens[:] == at_once.tokens[:]
    np.testing.assert_array_equal(few.question, at_once.question)
    np.testing.assert_array_equal(few.offsets, at_once.offsets)
    assert encode_train(rows, tokenizer, **SHORT)[:] == train[:]


def test_overlap_of_two_windows_is_stride_tokens(tokenizer):
    rows = questions(("Anna lost the red box in Rome . " * 9, "Who ?", ["Anna"]))
    first, second, *_ = encode(rows, tokenizer, **SHORT).offsets[..., 0]
    assert len({*first[first >= 0]} & {*second[second >= 0]}) == SHORT["stride"]


def test_long_question_is_cut_to_64_tokens_and_leaves_room_for_its_context(tokenizer):
    rows = questions(("Anna left .", "Who was it that " * 25, ["Anna"]))
    ids = encode(rows, tokenizer, max_length=80, stride=2).tokens["input_ids"][0]
    text = tokenizer.decode(ids)
    assert text == f"<s> {' '.join(['Who was it that'] * 16)} </s> </s> Anna left . </s>"


@pytest.mark.parametrize("answer", ["Anna", " Anna", "Rome", ". "])
def test_blanks_around_question_context_and_answer_move_nothing(answer, tokenizer):
    rows = questions(("   Anna left Rome . ", "  Who left ? ", [answer]))
    window = encode_train(rows, tokenizer, **SHORT)[0]
    first, last = window["start_positions"], window["end_positions"]
    assert tokenizer.decode(window["input_ids"][first : last + 1]) == answer.strip()


def byte_tokenizer():
    """RoBERTa's byte-level tokenizer without its merges: one token a byte."""
    words = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", model_max_length=512
    )


@pytest.mark.parametrize("answer", ["Zoë", " Zoë", " Here", "ë", "東京 ", "東", "spring. "])
def test_byte_level_tokens_give_back_the_answers_characters(answer):
    context, tokenizer = " Here Zoë saw 東京 in the spring. ", byte_tokenizer()
    rows = questions((context, "¿ Who ?", [answer]))
    windows = encode(rows, tokenizer, max_length=64, stride=8)
    [first], [last] = locate(windows.offsets, answer_characters(rows)[windows.question])
    begin, end = windows.offsets[0, first, 0], windows.offsets[0, last, 1]
    assert context[begin:end] == answer.strip()


def test_answer_inside_a_token_points_to_that_token():
    window = np.array([[[-1, -1], [0, 2], [3, 7], [-1, -1]]])  # <s> In 1817 </s>
    assert [n.tolist() for n in locate(window, np.array([[6, 7]]))] == [[2], [2]]


def test_answer_that_a_window_cuts_is_not_in_it():
    window = np.array([[[-1, -1], [9, 12], [13, 16], [-1, -1]]])
    for cut in ([5, 12], [13, 20], [0, 3], [30, 33], [-1, -1]):
        assert [n.tolist() for n in locate(window, np.array([cut]))] == [[0], [0]]


def loop_over_all_pairs(start, end, in_context, n_best):
    best = (-math.inf, None, None)
    inside = [t for t in range(len(start)) if in_context[t]]
    for i in sorted(inside, key=lambda t: -start[t])[:n_best]:
        for j in sorted(inside, key=lambda t: -end[t])[:n_best]:
            if i <= j < i + LONGEST and start[i] + end[j] > best[0]:
                best = (start[i] + end[j], i, j)
    return best


@pytest.mark.parametrize("n_best", [3, 20, 100])
def test_best_span_is_that_of_a_loop_over_starts_and_ends(n_best):
    start, end = torch.randn(2, 40, 80)
    in_context = (torch.arange(80) > 9) & (torch.arange(80) < torch.randint(11, 80, (40, 1)))
    found = best_spans(start, end, in_context, n_best)
    for n, (score, first, last) in enumerate(zip(*found, strict=True)):
        expected = loop_over_all_pairs(start[n], end[n], in_context[n], n_best)
        assert score == expected[0]
        assert score == -math.inf or (first, last) == expected[1:]
    assert n_best > 3 or found[0].isneginf().any()  # three starts may all lie behind three ends


@pytest.mark.parametrize("length, allowed", [(LONGEST, True), (LONGEST + 1, False)])
def test_span_is_at_most_30_tokens_long(length, allowed):
    start, end = torch.zeros(2, 1, 60)
    start[0, 5], end[0, 5 + length - 1] = 9, 9
    score, *_ = best_spans(start, end, torch.ones(1, 60, dtype=torch.bool))
    assert score.item() == (18 if allowed else 9)


def spans_of(*rows):
    """(Spans, Windows, contexts): a row is (question, score, token, no answer) of one window."""
    question, score, token, no_answer = map(np.array, zip(*rows, strict=True))
    offsets = np.array([[[0, 4], [5, 8], [9, 13]]] * len(rows))
    contexts = ["Anna and Emma"] * (max(question) + 1)
    return (
        Spans(score, token, token, no_answer),
        Windows([0] * len(rows), question, offsets),
        contexts,
    )


def test_best_window_answers_and_the_least_sure_window_says_whether_there_is_an_answer():
    found = spans_of((0, 1.0, 0, 9.0), (0, 3.0, 2, 2.0), (1, 4.0, 0, 6.0), (1, 5.0, 2, 7.0))
    assert choose_answers(*found, unanswerable=False) == ["Emma", "Emma"]
    assert choose_answers(*found, unanswerable=True) == ["Emma", ""]


def test_no_answer_must_score_more_than_the_span():
    found = spans_of((0, 3.0, 0, 3.0), (1, 3.0, 0, 3.1))
    assert choose_answers(*found, unanswerable=True) == ["Anna", ""]


def test_window_without_any_span_gives_no_text():
    found = spans_of((0, -np.inf, 0, 1.0), (1, -np.inf, 0, 1.0), (1, -5.0, 1, 1.0))
    assert choose_answers(*found, unanswerable=False) == ["", "and"]


CASES = {
    "right": ("Paris", ["Paris"], 1, 1),
    "right but for case, article and full stop": ("the PARIS.", ["Paris"], 1, 1),
    "partly right": ("red box in Rome", ["red box"], 0, 2 / 3),  # precision 2/4, recall 2/2
    "word said twice counts once": ("red red box", ["red box"], 0, 0.8),  # 2/3, 2/2
    "wrong": ("Rome", ["Paris"], 0, 0),
    "wrongly unanswered": ("", ["Paris"], 0, 0),
    "wrongly answered": ("Paris", [], 0, 0),
    "rightly unanswered": ("", [], 1, 1),
    "answer of which nothing is left": ("The", [], 1, 1),
    "golds of which nothing is left": ("", ["the", "!"], 1, 1),
    "answer to golds of which nothing is left": ("Paris", ["the"], 0, 0),
    "gold of which nothing is left does not count": ("", ["the", "Paris"], 0, 0),
    "best of several golds": ("red box", ["box", "the red box"], 1, 1),
    "nearest of several golds": ("red box Rome", ["red", "red box"], 0, 0.8),
}


@pytest.mark.parametrize("case", CASES)
def test_exact_match_and_f1_of(case):
    answer, golds, exact_match, f1 = CASES[case]
    assert score_answers([answer], [golds]) == pytest.approx((exact_match, f1))


def test_scores_are_the_mean_over_all_questions_as_plain_floats_without_a_warning():
    answers, golds, exact_match, f1 = zip(*CASES.values(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score_answers(list(answers), list(golds))
    assert found == pytest.approx((np.mean(exact_match), np.mean(f1)))
    assert [type(score) for score in found] == [float, float]


def test_no_answer_to_any_question_is_collapsed(tokenizer):
    inputs = make_inputs(load_task("squad_v2", "generated"), tokenizer, **SHORT)
    found = inputs.evaluate(Pointer(lambda ids: (0, 0)))
    assert found == {"metric": 0.5, "f1": 0.5, "exact_match": 0.5, "collapsed": True}


def test_same_text_for_every_question_is_collapsed(tokenizer):
    facts = "Anna left Rome .", "Anna left Oslo ."
    rows = questions(*[(fact, "Who left ?", ["Anna"]) for fact in facts])
    data = squad.TaskData("squad_v1", rows, {"validation": rows}, "", "")
    found = make_inputs(data, tokenizer, **SHORT).evaluate(oracle(rows, tokenizer, **SHORT))
    assert found == {"metric": 1.0, "f1": 1.0, "exact_match": 1.0, "collapsed": True}


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_is_collapsed_with_metric_zero(broken, tokenizer):
    data = load_task("squad_v1", "generated")
    rows = data.validation["validation"]
    model, fail = oracle(rows, tokenizer, **SHORT), iter([True])

    def spoil(module, args, output):
        output.end_logits[0, 5] += broken if next(fail, False) else 0

    model.register_forward_hook(spoil)
    found = make_inputs(data, tokenizer, **SHORT, eval_batch_size=8).evaluate(model)
    assert found == {"metric": 0.0, "f1": 0.0, "exact_match": 0.0, "collapsed": True}


def test_evaluation_leaves_modes_and_random_numbers_as_they_were(tokenizer):
    data = load_task("squad_v2", "generated")
    model = oracle(data.validation["validation"], tokenizer, **SHORT).train()
    model.dropout.eval()
    state = torch.get_rng_state()
    make_inputs(data, tokenizer, **SHORT).evaluate(model)
    assert model.training and not model.dropout.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def folder(tmp_path):
    """The generated files of both versions."""
    for task in TASKS:
        write_squad(task, tmp_path)
    return tmp_path


def change(path, edit):
    """Let `edit` change the content of a json file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def first_question(content):
    return content["data"][0]["paragraphs"][0]["qas"][0]


@pytest.mark.parametrize("task, unanswered", [("squad_v1", 0), ("squad_v2", 0.5)])
def test_files_become_the_hubs_columns(task, unanswered, folder):
    data = load_task(task, folder)
    assert data.source == f"SQuAD folder {folder}"
    assert (len(data.train), len(data.validation["validation"])) == (64, 24)
    for rows in (data.train, data.validation["validation"]):
        assert rows.column_names == ["id", "title", "context", "question", "answers"]
        assert np.mean([not answers["text"] for answers in rows["answers"]]) == unanswered
        assert len(set(rows["id"])) == len(rows)


def test_generated_sets_are_what_their_files_hold_and_known_word_for_word(folder, tokenizer):
    for task in TASKS:
        data = load_task(task, "generated")
        assert data.source == f"generated {task} set"
        assert data.fingerprint == load_task(task, folder).fingerprint
        ids = encode(data.train, tokenizer, **SHORT).tokens["input_ids"][:]
        assert not any(tokenizer.unk_token_id in row for row in ids)


def test_folder_beats_environment_and_a_failing_one_is_no_reason_to_ask_the_hub(
    folder, monkeypatch, tmp_path_factory
):
    monkeypatch.setattr(squad, "_from_hub", lambda task: pytest.fail("asked the hub"))
    monkeypatch.setenv("SQUAD_DIR", str(tmp_path_factory.mktemp("empty")))
    assert load_task("squad_v1", folder).source == f"SQuAD folder {folder}"
    with pytest.raises(FileNotFoundError, match=r"train-v1.1.json.*such a folder holds.*dev-v1.1"):
        load_task("squad_v1")


@pytest.mark.parametrize("task", TASKS)
def test_hub_gives_the_same_rows_and_fingerprint_as_the_folder(task, folder, monkeypatch):
    local, asked = load_task(task, folder), []
    hub = DatasetDict(train=local.train, **local.validation)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data = load_task(task)
    assert asked == [(TASKS[task].hub,)]
    assert data.source == f"hub {TASKS[task].hub}"
    assert data.fingerprint == local.fingerprint


def test_hub_out_of_reach_says_how_to_go_on(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="SQuAD task 'squad_v1' cannot be had"):
        load_task("squad_v1")


def test_train_size_draws_questions():
    data = load_task("squad_v1", "generated", train_size=10, seed=3)
    assert len(data.train) == 10 and len(data.validation["validation"]) == 24


def test_unknown_task_names_the_nearest():
    for function in (load_task, squad.metric_name):
        with pytest.raises(ValueError, match=r"'squad_v3' \(nearest: squad_v\d\)"):
            function("squad_v3")


@pytest.mark.parametrize("split, where", [("train", "train-v1.1.json"), ("dev", "dev-v1.1.json")])
def test_answer_that_is_not_at_its_place_is_named_with_what_is_there(folder, split, where):
    def move(content):
        qa = first_question(content)
        qa.update(id="q7", answers=[{"text": "Nobody", "answer_start": 2}])

    change(folder / f"{split}-v1.1.json", move)
    with pytest.raises(
        ValueError, match=rf"{where}: question q7: answer 'Nobody' is not at.* 2 .* there is '\w+"
    ):
        load_task("squad_v1", folder)


@pytest.mark.parametrize("wrong", ["from the end", 10**6])
def test_answer_outside_of_the_context_is_refused(folder, wrong):
    def move(content):
        [answer] = first_question(content)["answers"]
        length = len(content["data"][0]["paragraphs"][0]["context"])
        answer["answer_start"] += -length if wrong == "from the end" else wrong

    change(folder / "train-v2.0.json", move)
    with pytest.raises(ValueError, match=r"is not at its answer_start -?\d+ in the context"):
        load_task("squad_v2", folder)


@pytest.mark.parametrize("text", ["", " "])
def test_blank_answer_is_refused(folder, text):
    blank = [{"text": text, "answer_start": 5}]
    change(
        folder / "train-v2.0.json", lambda content: first_question(content).update(answers=blank)
    )
    with pytest.raises(ValueError, match=f"question Paris 0 0 has a blank answer, '{text}'"):
        load_task("squad_v2", folder)


def test_hubs_answers_are_checked_too(folder, monkeypatch):
    rows = load_task("squad_v1", folder).train
    moved = rows.map(lambda row: {"context": f"- {row['context']}"}, load_from_cache_file=False)
    hub = DatasetDict(train=moved, validation=rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hub rajpurkar/squad, train: .* is not at its"):
        load_task("squad_v1")


def test_question_without_an_answer_is_for_version_2_alone(folder):
    change(folder / "train-v1.1.json", lambda content: first_question(content).update(answers=[]))
    with pytest.raises(ValueError, match=r"train-v1.1.json: question Paris 0 0 has no answer"):
        load_task("squad_v1", folder)


@pytest.mark.parametrize(
    "key, place",
    [
        ("data", lambda content: content),
        ("paragraphs", lambda content: content["data"][0]),
        ("title", lambda content: content["data"][0]),
        ("context", lambda content: content["data"][0]["paragraphs"][0]),
        ("qas", lambda content: content["data"][0]["paragraphs"][0]),
        ("id", first_question),
        ("question", first_question),
        ("answers", first_question),
        ("text", lambda content: first_question(content)["answers"][0]),
        ("answer_start", lambda content: first_question(content)["answers"][0]),
    ],
)
def test_missing_key_is_named_with_the_file_and_its_layout(folder, key, place):
    change(folder / "dev-v1.1.json", lambda content: place(content).pop(key))
    with pytest.raises(ValueError, match=f"dev-v1.1.json lacks a key '{key}'.*data > paragraphs"):
        load_task("squad_v1", folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"data": 3}', '{"data": "x"}', '{"data": null}'])
def test_file_of_another_kind_is_refused(folder, text):
    (folder / "dev-v1.1.json").write_text(text)
    with pytest.raises(ValueError, match=r"dev-v1.1.json: not in SQuAD's format, data > "):
        load_task("squad_v1", folder)


@pytest.mark.parametrize("key, value", [("question", None), ("answers", [{"text": None}])])
def test_null_is_refused_with_the_question(folder, key, value):
    if key == "answers":
        value[0]["answer_start"] = 0
    change(folder / "dev-v1.1.json", lambda content: first_question(content).update({key: value}))
    with pytest.raises(ValueError, match=r"dev-v1.1.json: null in question Paris 0 0"):
        load_task("squad_v1", folder)


def test_file_without_questions_is_refused(folder):
    change(folder / "dev-v1.1.json", lambda content: content.update(data=[]))
    with pytest.raises(ValueError, match=r"dev-v1.1.json holds no question"):
        load_task("squad_v1", folder)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_length=0), "max_length = 0: must be 1 to 512"),
        (dict(max_length=513), "max_length = 513: must be 1 to 512"),
        (dict(max_length=11), "max_length = 11: must be more than 12.*question takes 7 tokens"),
        (dict(max_length=31, stride=20), "stride = 20: must be 0 to 19, less than the 20 tokens"),
        (dict(max_length=31, stride=-1), "stride = -1: must be 0 to 19"),
        (dict(max_length=40, eval_batch_size=0), "eval_batch_size = 0: must be at least 1"),
    ],
)
def test_setting_that_no_window_fits_is_refused(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        make_inputs(load_task("squad_v1", "generated"), tokenizer, **{"stride": 1, **options})


def test_tokenizer_without_a_first_token_for_no_answer_is_refused(tiny_encoder):
    source = ModelSource("no-cls", str(tiny_encoder), "local folder no-cls", "")
    with pytest.raises(ValueError, match="no-cls: SQuAD needs a tokenizer that begins with"):
        load_model(source, "squad_v1")


def test_by_the_authors_count_a_window_without_the_answer_wants_none(tokenizer):
    data = load_task("squad_v2", "generated")
    rows = data.validation["validation"]
    starts = encode_train(rows, tokenizer, **SHORT)["start_positions"]
    share = starts[:].count(0) / len(starts)
    assert len(starts) > len(rows) and 0.5 < share < 1  # half the questions have no answer at all
    by_window = make_inputs(data, tokenizer, **SHORT, scoring="authors")
    silent = by_window.evaluate(Pointer(lambda ids: (0, 0)))
    assert silent["exact_match"] == silent["f1"] == pytest.approx(share)
    assert by_window.evaluate(oracle(rows, tokenizer, **SHORT))["exact_match"] == 1


def test_by_the_authors_count_a_window_without_the_answer_is_left_out_where_all_have_one(tokenizer):
    data = load_task("squad_v1", "generated")
    rows = data.validation["validation"]
    right = oracle(rows, tokenizer, **SHORT).positions

    def last_token_where_there_is_no_answer(ids):
        first, last = right(ids)
        return (first, last) if first else (len(ids) - 2, len(ids) - 2)

    model = Pointer(last_token_where_there_is_no_answer)
    by_window = make_inputs(data, tokenizer, **SHORT, scoring="authors").evaluate(model)
    by_question = make_inputs(data, tokenizer, **SHORT).evaluate(model)
    assert by_window["exact_match"] == 1 > by_question["exact_match"]
