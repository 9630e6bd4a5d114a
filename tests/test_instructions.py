"""Causal language modelling: what is read, what is learnt, what counts as right, what it costs."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_smollm2
from datasets import Dataset
from tiny_runs import tiny, without_costs
from torch import nn
from transformers import GenerationConfig

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.replicas.many_runs import check_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.tasks.instructions import (
    OTHER_TEXT,
    PROMPT,
    TASKS,
    encode,
    evaluate,
    load_model,
    load_task,
    make_inputs,
    other_text_loss,
    write_answers,
)
from drlora_ref.experiments.tasks.orders import DAYS, NUMBERS, TEMPLATES, WORDS, order_rows

GOOD = {"instruction": "name the capital of France", "answer": "Paris"}


@pytest.fixture
def loaded():
    """tiny-llama and its tokenizer, which knows every byte."""
    return load_model(resolve_model("tiny-llama"), "orders")


def write_rows(folder: Path, train: list, validation: list | None = None) -> str:
    for file, rows in (("train", train), ("validation", validation or [GOOD])):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return str(folder)


# --- where rows come from ------------------------------------------------------------------------


def test_a_folder_of_json_lines_is_read(tmp_path, monkeypatch):
    rows = [GOOD, "", {"instruction": " what\nis 2 + 2 ", "answer": "4", "source": "a book"}]
    folder = write_rows(tmp_path, rows)
    data = load_task("instructions", folder)
    assert data.train.to_list() == [GOOD, {"instruction": "what\nis 2 + 2", "answer": "4"}]
    assert data.validation["validation"].to_list() == [GOOD]
    assert data.source == f"instructions folder {folder}" and data.also_in_train == {
        "validation": 1
    }
    monkeypatch.setenv("INSTRUCTIONS_DIR", folder)
    assert load_task("instructions").fingerprint == data.fingerprint


BAD_LINES = {
    '{"instruction": "a"}': "line 2 lacks ['answer']; it holds ['instruction']",
    '{"answer": "a"}': "line 2 lacks ['instruction']",
    '{"Instruction": "a", "Answer": "b"}': "line 2 lacks ['instruction', 'answer']",
    '{"instruction": "a", "answer": ""}': "row 2: answer '': must be text, and not empty",
    '{"instruction": "a", "answer": " \\n"}': "row 2: answer ' \\n': must be text, and not empty",
    '{"instruction": "", "answer": "b"}': "row 2: instruction '': must be text",
    '{"instruction": "a", "answer": null}': "row 2: answer None: must be text",
    '{"instruction": "a", "answer": 4}': "row 2: answer 4: must be text",
    '{"instruction": ["a"], "answer": "b"}': "row 2: instruction ['a']: must be text",
    '["a", "b"]': "line 2: ['a', 'b']: must be an object",
    '"a"': "line 2: 'a': must be an object",
    '{"instruction": "a", "answer": "b"': "line 2: not JSON",
    "instruction,answer": "line 2: not JSON",
}


@pytest.mark.parametrize("file", [0, 1])
@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_its_file_and_place(line, file, tmp_path):
    rows = [[GOOD, line], [GOOD]]
    with pytest.raises(ValueError) as refused:
        load_task("instructions", write_rows(tmp_path, rows[file], rows[1 - file]))
    message, name = str(refused.value), ["train", "validation"][file]
    assert f"{name}.jsonl, {BAD_LINES[line]}" in message and "\n" not in message


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_missing_and_empty_files_are_named(name, tmp_path):
    folder = write_rows(tmp_path, [GOOD])
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match=f"{name} holds no row"):
        load_task("instructions", folder)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} not found: such a folder holds train"):
        load_task("instructions", folder)


def test_without_a_folder_it_says_what_one_holds(monkeypatch):
    monkeypatch.delenv("INSTRUCTIONS_DIR", raising=False)
    with pytest.raises(ValueError, match=r"needs a data_dir .*train.jsonl and validation.jsonl"):
        load_task("instructions")
    with pytest.raises(ValueError, match="the embedded task 'orders' takes none"):
        load_task("orders", "generated")


def test_the_two_halves_of_orders_share_no_template_and_no_word():
    for slot in ("name", "city", "things", "colour"):
        assert not set(WORDS["train"][slot]) & set(WORDS["validation"][slot]), slot
    assert not set(TEMPLATES["train"]) & set(TEMPLATES["validation"])
    halves = {split: order_rows(split) for split in ("train", "validation")}
    assert {split: len(rows) for split, rows in halves.items()} == {"train": 640, "validation": 128}
    texts = [row["instruction"] for rows in halves.values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert not load_task("orders").also_in_train


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_order_holds_all_that_its_line_says(split):
    singular = dict(reversed(one.split("/")) for one in WORDS[split]["things"])
    days = {day[:3].upper(): day for day in DAYS}
    for row in order_rows(split):
        place, what, day, name = row["answer"].split(" | ")
        n, thing, colour = what.split()
        said = re.findall(r"\w+", row["instruction"].lower())
        things = [plural for plural, one in singular.items() if one == thing]
        for word in (place, name, colour, days[day], NUMBERS[int(n) - 2], *things):
            assert word.lower() in said, row


def test_generated_rows_are_a_set_in_the_format_and_the_same_every_time():
    one, again = (load_task("instructions", "generated") for _ in range(2))
    assert one.fingerprint == again.fingerprint and one.source == "generated instructions set"
    assert len(one.train) == 64 and len({row["answer"] for row in one.train}) > 10


# --- what is learnt ------------------------------------------------------------------------------


def test_the_loss_is_on_the_answer_and_its_end_alone(loaded):
    _, tokenizer = loaded
    (row,) = encode(Dataset.from_list([GOOD]), tokenizer, 100)
    read = [n for n, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    learnt = [n for n in row["labels"] if n != -100]
    assert tokenizer.decode(read) == PROMPT.format(GOOD["instruction"])
    assert tokenizer.decode(learnt) == " Paris</s>" and row["input_ids"][-len(learnt) :] == learnt


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_end_is_learnt_where_it_is_the_padding_token_too(loaded, padding_side):
    """Most decoders' tokenizers are so."""
    _, tokenizer = loaded
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, padding_side
    inputs = make_inputs(load_task("instructions", "generated"), tokenizer, 200)
    batch = inputs.collate(inputs.train.to_list()[:5])
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(dim=1)
    assert ends.tolist() == [1] * 5
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["attention_mask"][:, 0].all()  # padded on the right, whatever the tokenizer says
    assert tokenizer.padding_side == padding_side


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(loaded):
    _, tokenizer = loaded

    class Ending:
        eos_token_id, model_max_length = tokenizer.eos_token_id, 512

        def __call__(self, texts, add_special_tokens=True):
            ids = tokenizer(texts)["input_ids"]
            return {"input_ids": [[*one, 2] for one in ids] if add_special_tokens else ids}

    rows = Dataset.from_list([GOOD])
    assert encode(rows, Ending(), 100).to_list() == encode(rows, tokenizer, 100).to_list()


FIGURES = ["one", "two", "three", "four"]


def test_a_decoder_learns_to_answer_and_to_stop(tmp_path):
    rows = [{"instruction": f"say {n}", "answer": word} for n, word in enumerate(FIGURES, 1)]
    folder = write_rows(tmp_path, rows * 200, rows)  # one epoch, so one evaluation
    run = one_run.run(
        Settings(task="instructions", data_dir=folder, model_name="tiny-llama", method="full",
                 batch_size=8, epochs=1, max_length=64, learning_rate=1e-2,
                 output_dir=str(tmp_path / "run"), checkpoint_every=0)
    )  # fmt: skip
    assert run["metric_name"] == "exact_match"
    assert run["metric_before_training"] == 0 and run["last"] == 1.0
    assert run["status"] == "completed"


# --- what counts as right ------------------------------------------------------------------------


class Scribe(nn.Module):
    """Answers as it is told, by the instruction; of the next token it knows nothing."""

    def __init__(self, tokenizer, answers: dict[str, str], vocabulary: int = 260):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.answers = {PROMPT.format(text): answer for text, answer in answers.items()}

    def generate(self, input_ids, attention_mask, generation_config: GenerationConfig):
        assert not torch.is_grad_enabled() and not self.training
        assert attention_mask[:, -1].all()  # padded on the left
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        ids = [self.tokenizer(f" {self.answers[text]}")["input_ids"] + [2] for text in texts]
        most = generation_config.max_new_tokens
        wide = torch.full((len(ids), most), 1)
        for row, own in zip(wide, ids, strict=True):
            row[: len(own)] = torch.tensor(own[:most])
        return torch.cat([input_ids, wide], dim=1)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


def answers_of(data) -> dict[str, str]:
    return {row["instruction"]: row["answer"] for row in data.validation["validation"]}


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("task", TASKS)
def test_right_answers_score_one_through_the_whole_path(task, batch_size, loaded):
    data = load_task(task, "generated" if task == "instructions" else "")
    scribe = Scribe(loaded[1], answers_of(data))
    found = make_inputs(data, loaded[1], 256, batch_size).evaluate(scribe)
    assert found.pop("other_text_loss") == pytest.approx(math.log(260))
    assert found == {"metric": 1.0, "collapsed": False} and scribe.training


@pytest.mark.parametrize(
    "change",
    [lambda a: a + " more", lambda a: a + "x", lambda a: a[:-1], lambda a: a.upper() + ".",
     lambda a: "", lambda a: a.replace("a", "the", 1) + "?"],
)  # fmt: skip
def test_an_answer_that_is_not_right_to_the_letter_is_wrong(change, loaded):
    data = load_task("instructions", "generated")
    answers = answers_of(data)
    spoilt = list(answers)[::3]
    scribe = Scribe(loaded[1], answers | {text: change(answers[text]) for text in spoilt})
    found = make_inputs(data, loaded[1], 256).evaluate(scribe)
    assert found["metric"] == pytest.approx(1 - len(spoilt) / len(answers))


def test_one_answer_to_everything_is_collapsed(loaded):
    data = load_task("instructions", "generated")
    for answer in ("", "Anna"):
        scribe = Scribe(loaded[1], dict.fromkeys(answers_of(data), answer))
        assert make_inputs(data, loaded[1], 256).evaluate(scribe)["collapsed"]
    alike = [dict(GOOD, instruction=f"say it {n}") for n in range(3)]
    encoded = encode(Dataset.from_list(alike), loaded[1], 100)
    scribe = Scribe(loaded[1], {row["instruction"]: "Paris" for row in alike})
    assert not evaluate(scribe, encoded, loaded[1], 8)["collapsed"]  # it is right


def test_padding_and_the_size_of_a_batch_change_no_answer(loaded):
    model, tokenizer = loaded
    encoded = encode(
        load_task("instructions", "generated").validation["validation"], tokenizer, 200
    )
    nn.init.normal_(model.model.embed_tokens.weight)  # it would always say the same
    model.train()
    state = torch.get_rng_state()
    one_by_one, right = write_answers(model, encoded, tokenizer, 1)
    together, _ = write_answers(model, encoded, tokenizer, 24)  # may be as long as the longest
    starts = [text[: len(short)] for text, short in zip(together, one_by_one, strict=True)]
    assert starts == one_by_one and len(set(one_by_one)) > 1
    # A space before it, its end, and one more.
    assert all(len(text) <= len(own) + 3 for text, own in zip(one_by_one, right, strict=True))
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_what_the_model_wants_to_sample_is_not_asked(loaded):
    """Instruct models come with a temperature."""
    model, tokenizer = loaded
    encoded = encode(Dataset.from_list([GOOD]), tokenizer, 100)
    plain = write_answers(model, encoded, tokenizer, 1)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, repetition_penalty=3.0, max_new_tokens=50
    )
    assert write_answers(model, encoded, tokenizer, 1) == plain


def test_forgetting_is_the_mean_loss_over_all_tokens_of_the_text(loaded):
    model, tokenizer = loaded
    nn.init.normal_(model.model.embed_tokens.weight)  # far from uniform
    losses, model = [], model.eval()
    for line in OTHER_TEXT:
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        losses += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    expected = sum(losses) / len(losses)
    for size in (1, 5, 12):
        assert other_text_loss(model, tokenizer, size) == pytest.approx(expected, rel=1e-5)
    nn.init.constant_(model.model.norm.weight, torch.nan)
    assert other_text_loss(model, tokenizer) is None


# --- runs ----------------------------------------------------------------------------------------

RUN = dict(task="instructions", data_dir="generated", model_name="tiny-llama", max_length=160,
           batch_size=8, max_steps=10, deltaT=2, checkpoint_every=0)  # fmt: skip


@pytest.mark.parametrize("method", ["drlora", "lora", "adalora", "full", "h-adapter"])
def test_a_record_has_what_a_comparison_of_methods_reports(method, tmp_path):
    record = one_run.run(Settings(**RUN, method=method, output_dir=str(tmp_path)))
    assert set(record["forgetting"]) == {"before", "after"}
    assert record["forgetting"]["before"] == pytest.approx(math.log(260), rel=0.05)  # it is random
    assert record["forgetting"]["after"] != record["forgetting"]["before"]
    assert record["forgetting"]["after"] == record["evaluations"][-1]["other_text_loss"]
    assert record["adapter_bytes"] == 4 * record["trainable_parameters"]["adapter"] > 0
    assert record["tokens_per_second"] > 0 and record["peak_memory_mib"] > 0
    matrices = 14 if method in ("drlora", "lora", "adalora") else 0
    assert record["surviving_components"] == 2 * matrices


def test_tokens_a_second_are_those_that_were_read(tmp_path, loaded):
    """Padding left out, and counted on after a stop."""
    train = make_inputs(load_task("instructions", "generated"), loaded[1], 160).train
    in_all = sum(map(len, train["input_ids"]))
    ready = one_run.set_up(Settings(**RUN | {"max_steps": 8}, output_dir=str(tmp_path)))
    trained = one_run.train(ready)
    assert trained.tokens == in_all  # one epoch
    record = one_run.make_record(ready, trained)
    spent = trained.seconds - trained.evaluation_seconds
    assert record["tokens_per_second"] == pytest.approx(in_all / spent, abs=0.1)


def test_a_run_that_was_cut_goes_on_to_the_same_record(tmp_path, monkeypatch):
    from drlora_ref.experiments.run.loop import Loop

    given = RUN | {"checkpoint_every": 3}
    whole = one_run.run(Settings(**given, output_dir=str(tmp_path / "whole")))
    really = Loop._take_step

    def cut(self, *rest):
        if self.step == 7:
            raise KeyboardInterrupt
        return really(self, *rest)

    settings = Settings(**given, output_dir=str(tmp_path / "cut"))
    monkeypatch.setattr(Loop, "_take_step", cut)
    with pytest.raises(KeyboardInterrupt):
        one_run.run(settings)
    monkeypatch.setattr(Loop, "_take_step", really)
    ready = one_run.set_up(settings)
    trained = one_run.train(ready)
    whole_again = one_run.make_record(ready, trained)
    assert without_costs(whole_again) == without_costs(whole)
    ready = one_run.set_up(Settings(**RUN, output_dir=str(tmp_path / "counted")))
    assert one_run.train(ready).tokens == trained.tokens


def test_bitfit_has_nothing_to_train_in_a_llama(tmp_path):
    with pytest.raises(ValueError, match="bitfit trains biases, and LlamaForCausalLM has none"):
        one_run.set_up(Settings(**RUN, method="bitfit", output_dir=str(tmp_path)))


@pytest.mark.parametrize("task", TASKS)
def test_replicas_are_refused(task):
    with pytest.raises(ValueError, match=f"on task = '{task}': only drlora and lora on GLUE"):
        check_replicas([Settings(task=task, seed=seed) for seed in (0, 1)])


def test_other_families_have_no_forgetting(tmp_path):
    assert one_run.run(tiny(tmp_path, max_steps=4))["forgetting"] is None


# --- refused -------------------------------------------------------------------------------------

# A prompt has 18 letters more than its instruction; an answer has a space before it and its end.
LONG = {"instruction": "a" * 40, "answer": "b" * 470}
TOO_LONG = [
    (dict(GOOD, answer="b" * 300), 160, "row 2: .* are 346 tokens .* reads 512: take 346 or more"),
    (dict(GOOD, instruction="b" * 200), 160, "row 2: .* nothing is cut, .* take 225 or more"),
    (LONG, 160, "row 2: .* are 530 tokens .* the model reads 512: leave it out"),
    (LONG, 512, "row 2: .* are 530 tokens .* the model reads 512: leave it out"),
]


@pytest.mark.parametrize("split", ["train", "validation", "holdout"])
@pytest.mark.parametrize("row, max_length, message", TOO_LONG)
def test_a_row_that_is_too_long_is_named_before_any_training(
    row, max_length, message, split, loaded
):
    rows = Dataset.from_list([GOOD, row, dict(GOOD, answer="b" * 150)])  # the longest is named
    with pytest.raises(ValueError, match=f"{split}, {message}"):
        encode(rows, loaded[1], max_length, split)


@pytest.mark.parametrize("max_length", [0, 513, 10**6])
def test_a_length_beyond_the_models_positions_is_refused(max_length, loaded):
    with pytest.raises(ValueError, match=f"max_length = {max_length}: must be 1 to 512"):
        make_inputs(load_task("instructions", "generated"), loaded[1], max_length)
    with pytest.raises(ValueError, match="eval_batch_size = 0: must be at least 1"):
        make_inputs(load_task("instructions", "generated"), loaded[1], 160, 0)


def changed(folder: Path, **entries) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"pad_token": None}, "the tokenizer has no padding token: give tokenizer_config.json a"),
        ({"eos_token": None}, "the tokenizer has no eos_token, so no answer could end"),
        ({"model_max_length": "many"}, "model_max_length of the tokenizer must be a number"),
    ],
)
def test_a_tokenizer_without_what_is_needed_is_one_line(entries, message, tmp_path, capsys):
    folder = shutil.copytree(resolve_model("tiny-llama").path, tmp_path / "model")
    changed(folder, **entries)
    given = RUN | {"model_name": str(folder)}
    words = itertools.chain.from_iterable(("-p", k, repr(v)) for k, v in given.items())
    assert main(["run", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("ValueError: ")
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.mark.parametrize("limit", [10**30, 100])
def test_the_models_positions_are_the_limit_where_the_tokenizer_knows_none(limit, tmp_path):
    folder = shutil.copytree(resolve_model("tiny-llama").path, tmp_path / "model")
    changed(folder, model_max_length=limit)
    _, tokenizer = load_model(resolve_model(str(folder)), "orders")
    assert tokenizer.model_max_length == min(limit, 512)


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-bart"])
def test_an_encoder_is_not_taken_for_a_decoder(name):
    with pytest.raises(ValueError):
        load_model(resolve_model(name), "orders")


@needs_smollm2
def test_the_real_decoder_reads_its_task():
    model, tokenizer = load_model(resolve_model("smollm2-135m"), "orders")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    data = load_task("orders")
    encoded = encode(data.train.select(range(8)), tokenizer, 48)
    assert tokenizer.decode([n for n in encoded[0]["labels"] if n != -100]) == (
        f" {data.train[0]['answer']}<|im_end|>"
    )
    assert other_text_loss(model, tokenizer) < 5 < math.log(len(tokenizer)) / 2  # it knows English


def test_the_record_is_on_the_disk_as_it_was_returned(tmp_path):
    record = one_run.run(Settings(**RUN, method="lora", output_dir=str(tmp_path)))
    assert read_record(tmp_path)["forgetting"] == record["forgetting"]
