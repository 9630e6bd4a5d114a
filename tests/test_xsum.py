"""XSum: the authors' files, what is read from them, the search for summaries, ROUGE."""

import json
import logging
import warnings

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.sources.words import vocabulary
from drlora_ref.experiments.tasks import xsum
from drlora_ref.experiments.tasks.xsum import (
    ARTICLES,
    SPLIT_FILE,
    load_model,
    load_task,
    make_inputs,
    rouge,
)

ARTICLE = """[SN]URL[SN]
http://web.archive.org/web/1/http://www.example.org/news/1

[SN]TITLE[SN]
A title

[SN]FIRST-SENTENCE[SN]
{summary}

[SN]RESTBODY[SN]
Share this with
Email
Facebook
Copy this link
These are external links and will open in a new window
{document}
"""
IDS = {"train": ["11", "12", "13"], "validation": ["21", "22"], "test": ["31"]}


@pytest.fixture(autouse=True)
def no_xsum_dir(monkeypatch):
    monkeypatch.delenv("XSUM_DIR", raising=False)


@pytest.fixture(scope="module")
def tiny():
    return load_model(resolve_model("tiny-bart"), "xsum")


def write_articles(folder, ids=IDS, **other):
    """The authors' files; `other` gives some articles another text. Those of test are left out."""
    (folder / ARTICLES).mkdir()
    (folder / SPLIT_FILE).write_text(json.dumps(ids))
    for name in (*ids["train"], *ids["validation"]):
        text = ARTICLE.format(summary=f"Sum of {name}.", document=f"One {name}.\n\nTwo “é”.")
        path = folder / ARTICLES / f"{name}.summary"
        path.write_text(other.get(f"article{name}", text), encoding="utf-8")
    return str(folder)


def test_sections_become_columns_without_title_share_buttons_or_blank_lines(tmp_path):
    data = load_task("xsum", write_articles(tmp_path))
    assert data.source == f"XSum folder {tmp_path}"
    assert list(data.validation) == ["validation"]
    assert data.train["id"][:] == ["11", "12", "13"]
    assert data.validation["validation"].to_list() == [
        {"document": f"One {name}.\nTwo “é”.", "summary": f"Sum of {name}.", "id": name}
        for name in ("21", "22")
    ]


def test_only_whole_lines_are_share_buttons(tmp_path):
    text = ARTICLE.format(summary="s", document="Email is old.\nOn Facebook\nTwitter\nThe end")
    data = load_task("xsum", write_articles(tmp_path, article11=text))
    assert data.train["document"][0] == "Email is old.\nOn Facebook\nThe end"


def test_articles_without_document_or_summary_are_dropped_and_counted(tmp_path):
    empty = {
        "article11": ARTICLE.format(summary="s", document=""),
        "article21": ARTICLE.format(summary="", document="d"),
    }
    data = load_task("xsum", write_articles(tmp_path, **empty))
    assert data.train["id"][:] == ["12", "13"]
    assert data.validation["validation"]["id"][:] == ["22"]
    assert data.source == f"XSum folder {tmp_path} (2 articles without text dropped)"


def test_split_without_any_text_is_refused(tmp_path):
    empty = {f"article{name}": ARTICLE.format(summary="s", document="") for name in (21, 22)}
    with pytest.raises(ValueError, match="no article of validation has both a text and a summary"):
        load_task("xsum", write_articles(tmp_path, **empty))


def test_hub_gives_the_same_rows_and_fingerprint_as_the_folder(tmp_path, monkeypatch):
    empty = ARTICLE.format(summary="s", document="")
    local = load_task("xsum", write_articles(tmp_path, article13=empty))
    row = {"document": [""], "summary": ["s"], "id": ["13"]}
    train = datasets.concatenate_datasets([local.train, Dataset.from_dict(row)])
    hub = DatasetDict(train=train, test=local.train, **local.validation)
    asked = []

    monkeypatch.setattr(datasets, "load_dataset", lambda **where: asked.append(where) or hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # so that nothing is probed
    data = load_task("xsum")
    assert asked == [{"path": "EdinburghNLP/xsum", "revision": "refs/convert/parquet"}]
    assert data.source == "hub EdinburghNLP/xsum (1 articles without text dropped)"
    assert data.fingerprint == local.fingerprint


def test_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XSUM_DIR", write_articles(tmp_path))
    assert load_task("xsum").source == f"XSum folder {tmp_path}"


def test_missing_split_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{SPLIT_FILE} not found"):
        load_task("xsum", str(tmp_path))


def test_id_without_a_file_is_named_with_how_many_there_are(tmp_path):
    folder = write_articles(tmp_path)
    (tmp_path / ARTICLES / "12.summary").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 5 articles.*: 12\.summary"):
        load_task("xsum", folder)
    (tmp_path / SPLIT_FILE).write_text(json.dumps({**IDS, "train": ["nobody"]}))
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 articles.*nobody\.summary"):
        load_task("xsum", folder)


@pytest.mark.parametrize("section", ["FIRST-SENTENCE", "RESTBODY"])
def test_article_without_a_section_is_named(tmp_path, section):
    text = ARTICLE.format(summary="s", document="d").replace(f"[SN]{section}[SN]\n", "")
    folder = write_articles(tmp_path, article22=text)
    with pytest.raises(ValueError, match=rf"22\.summary lacks the section \['{section}'\].*'URL'"):
        load_task("xsum", folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSONDecodeError"),
        ("[]", "lists of ids as train and validation"),
        ('{"train": ["11"]}', "KeyError.'validation'"),
        ('{"train": 3, "validation": ["21"]}', "TypeError"),
        ('{"train": [], "validation": ["21"]}', "at least one id each"),
    ],
)
def test_malformed_split_file_is_named(tmp_path, text, message):
    folder = write_articles(tmp_path)
    (tmp_path / SPLIT_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{SPLIT_FILE}.*{message}"):
        load_task("xsum", folder)


def test_unknown_task_is_refused():
    for use in (load_task, xsum.metric_name):
        with pytest.raises(ValueError, match=r"unknown task 'XSum' \(nearest: xsum\)"):
            use("XSum")


def test_generated_articles_use_only_the_vocabulary_and_all_differ():
    data = load_task("xsum", "generated")
    assert data.source == "generated xsum set"
    rows = [*data.train, *data.validation["validation"]]
    words = {word for row in rows for word in f"{row['document']} {row['summary']}".split()}
    assert words <= set(vocabulary())
    assert len({row["document"] for row in rows}) == len(rows)
    assert data.fingerprint == load_task("xsum", "generated", train_size=5).fingerprint


def test_too_long_document_and_summary_are_cut_and_keep_their_last_special_token(tiny):
    tokenizer = tiny[1]
    words = " ".join(["box"] * 2000)
    rows = Dataset.from_dict({"document": [words, "box"], "summary": [words, "box"]})
    encoded = xsum.encode(rows, tokenizer, max_length=1024, summary_length=7)
    box = tokenizer.convert_tokens_to_ids("box")
    assert encoded["input_ids"][:] == [[0, *[box] * 1022, 2], [0, box, 2]]
    assert encoded["labels"][:] == [[0, *[box] * 5, 2], [0, box, 2]]


def test_collate_pads_labels_with_what_the_loss_skips(tiny):
    model, tokenizer = tiny
    inputs = make_inputs(load_task("xsum", "generated"), tokenizer, max_length=60)
    rows = [dict(inputs.train[0]), dict(inputs.train[1])]
    rows[0]["input_ids"], rows[0]["labels"] = [0, 7, 2], [0, 8, 2]
    batch = inputs.collate(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(1).tolist() == [3, len(rows[1]["input_ids"])]
    assert batch["labels"][0].tolist() == [0, 8, 2] + [-100] * (len(rows[1]["labels"]) - 3)
    alone = [inputs.collate([row]) for row in rows]
    model.eval()
    with torch.no_grad():
        losses = [model(**one).loss * one["labels"].numel() for one in alone]
        together = model(**batch).loss * sum(one["labels"].numel() for one in alone)
    assert together == pytest.approx(float(sum(losses)), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 0}, "max_length = 0: must be 1 to 1024"),
        ({"max_length": 1025}, "max_length = 1025: must be 1 to 1024"),
        ({"summary_length": 0}, "summary_length = 0: must be 1 to 1024"),
        ({"summary_length": 1025}, "summary_length = 1025: must be 1 to 1024"),
        ({"num_beams": 0}, "num_beams = 0: must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size = 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(tiny, options, message):
    data = load_task("xsum", "generated")
    with pytest.raises(ValueError, match=message):
        make_inputs(data, tiny[1], **{"max_length": 60, **options})


def test_limit_is_the_models_where_the_tokenizer_names_none(monkeypatch, tiny):
    model, tokenizer = tiny
    monkeypatch.setattr(tokenizer, "model_max_length", int(1e30))
    monkeypatch.setattr(xsum, "load_pretrained", lambda *args: (model, tokenizer))
    assert load_model(resolve_model("tiny-bart"), "xsum")[1].model_max_length == 1024


class Oracle(torch.nn.Module):
    """Answers each document with the ids of its own summary, padded as generate() pads them."""

    def __init__(self, rows, answer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.answers = {tuple(row["input_ids"]): answer or row["labels"] for row in rows}

    def generate(self, input_ids, attention_mask, generation_config):
        assert not torch.is_grad_enabled() and not self.training
        lengths = attention_mask.sum(1).tolist()
        found = [
            self.answers[tuple(ids[:length])]
            for ids, length in zip(input_ids.tolist(), lengths, strict=True)
        ]
        longest = max(map(len, found))
        return torch.tensor([[2, *ids] + [1] * (longest - len(ids)) for ids in found])


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_oracle_scores_one_through_the_whole_path(tiny, batch_size):
    data = load_task("xsum", "generated")
    inputs = make_inputs(data, tiny[1], max_length=60, eval_batch_size=batch_size)
    rows = xsum.encode(data.validation["validation"], tiny[1], 60, 64)
    assert len({len(ids) for ids in rows["input_ids"]}) > 1  # so that batches reorder them
    oracle = Oracle(rows).train()
    assert inputs.evaluate(oracle) == {
        **dict.fromkeys(("metric", "rouge1", "rouge2", "rougeL"), 1.0),
        "collapsed": False,
    }
    assert oracle.training


@pytest.mark.parametrize("words, score", [("Anna", "some"), ("", "none")])
def test_one_summary_or_none_for_every_document_is_collapsed(tiny, words, score):
    data = load_task("xsum", "generated")
    inputs = make_inputs(data, tiny[1], max_length=60)
    rows = xsum.encode(data.validation["validation"], tiny[1], 60, 64)
    found = inputs.evaluate(Oracle(rows, answer=tiny[1](words)["input_ids"]))
    assert found["collapsed"]
    assert (found["rouge1"] > 0) == (score == "some")
    assert found["rouge2"] == 0


def test_tiny_bart_takes_the_whole_path_without_noise_or_random_numbers(caplog, capfd):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model, tokenizer = load_model(resolve_model("tiny-bart"), "xsum")
        data = load_task("xsum", "generated", train_size=8)
        inputs = make_inputs(data, tokenizer, max_length=60, summary_length=6)
        model.train()
        model(**inputs.collate([inputs.train[n] for n in range(4)])).loss.backward()
        model.model.encoder.eval()  # a part that somebody froze stays frozen
        state = torch.get_rng_state()
        found = inputs.evaluate(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.model.shared.weight.grad.abs().sum() > 0
    assert model.training and not model.model.encoder.training
    assert torch.equal(state, torch.get_rng_state())
    assert set(found) == {"metric", "collapsed", "rouge1", "rouge2", "rougeL"}
    assert found["metric"] == found["rougeL"]
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_model_of_nan_is_collapsed_with_metric_zero():
    model, tokenizer = load_model(resolve_model("tiny-bart"), "xsum")
    with torch.no_grad():
        model.model.shared.weight.fill_(torch.nan)
    inputs = make_inputs(load_task("xsum", "generated"), tokenizer, max_length=60, summary_length=6)
    found = inputs.evaluate(model)
    assert found["metric"] == 0 and found["collapsed"]


def test_a_summary_has_at_most_summary_length_tokens_and_no_trigram_twice(tiny):
    model, tokenizer = tiny
    ids = tokenizer(["Anna bought the box"], return_tensors="pt")
    for beams in (1, 3):
        found = model.generate(**ids, generation_config=xsum.beam_search(beams, 9))[0].tolist()
        assert len(found) <= 10 and found[0] == model.config.decoder_start_token_id
        trigrams = [tuple(found[n : n + 3]) for n in range(len(found) - 2)]
        assert len(trigrams) == len(set(trigrams))


def test_a_few_steps_of_training_raise_rouge():
    model, tokenizer = load_model(resolve_model("tiny-bart"), "xsum")
    data = load_task("xsum", "generated", train_size=16)
    inputs = make_inputs(data, tokenizer, max_length=60, summary_length=6, num_beams=1)
    before = inputs.evaluate(model)["rouge1"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = inputs.collate(inputs.train.to_list()[:8])
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert inputs.evaluate(model)["rouge1"] > before + 0.1


@pytest.mark.parametrize(
    "summary, reference, rouge1, rouge2, rouge_l",
    [
        # words: 3 of 3 and 3 of 4; pairs: 2 of 2 and 2 of 3; in order: 3 words
        ("the cat sat", "the cat sat down", 6 / 7, 4 / 5, 6 / 7),
        # the same words in another order: no pair but "dog bit", 2 words in order
        ("dog bit man", "man dog bit", 1, 1 / 2, 2 / 3),
        # a word counts as often as it is in both: 1 of 3 and 1 of 2
        ("box box box", "box lamp", 2 / 5, 0, 2 / 5),
        ("nothing", "in common", 0, 0, 0),
        ("", "a reference", 0, 0, 0),
        # lower case, no punctuation, stems
        ("MARKETS, opening!", "market opened", 1, 1, 1),
    ],
)
def test_rouge_agrees_with_counts_by_hand(summary, reference, rouge1, rouge2, rouge_l):
    found = rouge([summary], [reference])
    wanted = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_rouge_is_the_mean_over_documents():
    pairs = [("the cat sat", "the cat sat down"), ("nothing", "in common"), ("a box", "a box")]
    alone = [rouge([summary], [reference]) for summary, reference in pairs]
    together = rouge(*map(list, zip(*pairs, strict=True)))
    for name, score in together.items():
        assert score == pytest.approx(sum(one[name] for one in alone) / 3, abs=1e-6)


def test_encoder_is_refused_as_a_model_that_writes():
    with pytest.raises(ValueError, match="tiny-roberta: roberta models have no head"):
        load_model(resolve_model("tiny-roberta"), "xsum")


@pytest.mark.parametrize("scoring, stemmer", [("official", True), ("authors", False)])
def test_by_the_authors_count_references_are_cut_and_words_keep_their_ends(
    scoring, stemmer, tiny, monkeypatch
):
    model, tokenizer = tiny
    asked = []
    monkeypatch.setattr(xsum, "rouge", lambda *given: asked.append(given) or rouge(*given))
    data = load_task("xsum", "generated")
    given = dict(max_length=60, summary_length=6, num_beams=1, scoring=scoring)
    make_inputs(data, tokenizer, **given).evaluate(model)
    ((_, references, stems),) = asked
    whole = data.validation["validation"]["summary"][:]
    assert stems == stemmer and len(references) == len(whole)
    assert (references == whole) == (scoring == "official")
    for reference, summary in zip(references, whole, strict=True):
        assert summary.split()[: len(reference.split())] == reference.split()
    alike = rouge(["cats sat"], ["cat sat"], stemmer)["rouge1"]
    assert alike == pytest.approx(1 if stemmer else 0.5)
