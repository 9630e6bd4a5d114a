"""XSum (arXiv 1808.08745): one-sentence summaries of BBC articles, as in the paper's Table 4."""

import json
import random
import re
from functools import partial
from pathlib import Path

import datasets
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drlora_ref.experiments.given import check_name, place, read_json, read_lines, screen, shown
from drlora_ref.experiments.sources import words
from drlora_ref.experiments.sources.hub import fetch_from_hub
from drlora_ref.experiments.sources.models import ModelSource, load_pretrained
from drlora_ref.experiments.tasks.data import (
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Collate,
    Inputs,
    TaskData,
    find_files,
    find_splits,
    task_data,
)
from drlora_ref.experiments.tasks.evaluation import (
    batches_by_length,
    check_positive,
    check_room,
    evaluation_mode,
    final_texts,
)

TASKS = {"xsum": "rougeL"}  # task: the metric by which epochs and methods are compared
OPTIONS = ("max_length", "summary_length", "num_beams", "eval_batch_size", "scoring")

SPLIT_FILE, ARTICLES = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", "bbc-summary-data"
SECTION = re.compile(r"^\[SN\](.+)\[SN\]$", re.MULTILINE)  # a line of its own before each section
SHARE_BUTTONS = frozenset({
    "Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp",
    "Linkedin", "LinkedIn", "Copy this link",
    "These are external links and will open in a new window",
})  # fmt: skip


def metric_name(task: str) -> str:
    """The main one of the three ROUGE scores.

    Choice: ROUGE-L, which also sees the order of words. The paper reports all three and does not
    say by which one it picked a run; within a budget of its Table 4 they rank the methods alike.

    >>> metric_name("xsum")
    'rougeL'
    """
    check_name("task", task, TASKS)
    return TASKS[task]


def load_task(
    task: str, data_dir: str = "", train_size: int = 0, seed: int = 0, holdout: int = 0
) -> TaskData:
    """XSum's articles: from a folder in the authors' own format, made up, or from the hub.

    The folder is `data_dir`, else the environment variable XSUM_DIR; the hub is asked only where
    neither is set. Columns: document (what is read), summary (what is to be written), id.

    Choice: articles without text are dropped and counted in `source`; there is nothing to sum up.
    Raises ValueError (a wrong argument or file), FileNotFoundError, ConnectionError.

    >>> load_task("xsum", "generated").train.column_names
    ['document', 'summary', 'id']
    """
    check_name("task", task, TASKS)
    found = find_splits(task, data_dir, "XSUM_DIR", _from_folder, _from_hub, generate=write_xsum)
    return task_data(task, *found, train_size, seed, holdout)


def _from_hub(task: str) -> tuple[dict[str, Dataset], str]:
    # Not main: `datasets` no longer runs loading scripts; this branch always holds parquet files.
    where = {"path": "EdinburghNLP/xsum", "revision": "refs/convert/parquet"}
    found = fetch_from_hub("XSum", datasets.load_dataset, **where)
    splits = {split: found[split] for split in ("train", "validation")}
    return _without_empty(splits, f"hub {where['path']}")


def _from_folder(task: str, folder: str) -> tuple[dict[str, Dataset], str]:
    root = place(folder)
    ids = _read_split_file(*find_files(root, [SPLIT_FILE]))
    held = {path.stem for path in (root / ARTICLES).glob("*.summary")}
    wanted = [*ids["train"], *ids["validation"]]
    if missing := [f"{article}.summary" for article in wanted if article not in held]:
        named = ", ".join(missing[:3])
        found = f"{len(missing)} of the {len(wanted)} articles in {SPLIT_FILE}"
        raise FileNotFoundError(f"{root / ARTICLES} lacks {found}: {screen(named)} ...")
    splits = {}
    for split, articles in ids.items():
        rows = [_read_article(root / ARTICLES / f"{article}.summary") for article in articles]
        splits[split] = Dataset.from_list(rows).add_column("id", articles)
    return _without_empty(splits, f"XSum folder {folder}")


def _read_split_file(path: Path) -> dict[str, list[str]]:
    ids = read_json(path)
    try:
        ids = {split: [str(article) for article in ids[split]] for split in ("train", "validation")}
    except (KeyError, TypeError) as error:
        wanted = "a JSON object with lists of ids as train and validation"
        raise ValueError(f"{path} is not {wanted} ({screen(repr(error))})") from None
    if not all(ids.values()):
        raise ValueError(f"{path}: train and validation need at least one id each")
    return ids


def _read_article(path: Path) -> dict[str, str]:
    lines = read_lines(path)
    text = "\n".join(line for line in lines if line.strip() and line not in SHARE_BUTTONS)
    _, *parts = SECTION.split(text)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    names = {"document": "RESTBODY", "summary": "FIRST-SENTENCE"}
    if missing := [name for name in names.values() if name not in sections]:
        raise ValueError(f"{path} lacks the section {missing}; it holds {shown([*sections])}")
    return {column: sections[name].strip() for column, name in names.items()}


def _without_empty(splits: dict[str, Dataset], source: str) -> tuple[dict[str, Dataset], str]:
    dropped = 0
    for split, rows in splits.items():
        texts = zip(rows["document"], rows["summary"], strict=True)
        full = [n for n, (document, summary) in enumerate(texts) if document and summary]
        if not full:
            raise ValueError(f"{source}: no article of {split} has both a text and a summary")
        dropped += len(rows) - len(full)
        splits[split] = rows.select(full)
    return splits, source + (f" ({dropped} articles without text dropped)" if dropped else "")


def write_xsum(task: str, folder: Path) -> None:
    """Files as the authors distribute them, with generated articles: who did what."""
    sizes = {"train": TRAIN_ROWS, "validation": VALIDATION_ROWS}
    ids = {split: [f"{split}{n}" for n in range(size)] for split, size in sizes.items()}
    (folder / SPLIT_FILE).write_text(json.dumps({**ids, "test": []}), encoding="utf-8")
    (folder / ARTICLES).mkdir()
    rng = random.Random(task)
    for article in (*ids["train"], *ids["validation"]):
        text = f"[SN]URL[SN]\n{article}\n\n[SN]TITLE[SN]\nNews\n\n{_article(rng)}"
        (folder / ARTICLES / f"{article}.summary").write_text(text, encoding="utf-8")


def _article(rng: random.Random) -> str:
    news = words.fact(rng)
    who, did, _, _, thing, *_ = news.split()
    body = [news, words.other_fact(news, rng)]
    body += [words.fact(rng) for _ in range(rng.randint(1, 4))]
    document = "".join(f"{sentence} .\n" for sentence in body)
    first = f"[SN]FIRST-SENTENCE[SN]\n{who} {did} a {thing} ."
    return f"{first}\n\n[SN]RESTBODY[SN]\nShare this with\n{document}"


def load_model(source: ModelSource, task: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(a sequence-to-sequence model, its tokenizer); raises what load_pretrained raises."""
    check_name("task", task, TASKS)
    model, tokenizer = load_pretrained(source, AutoModelForSeq2SeqLM)
    # A tokenizer that was saved without its limit says 1e30, but the positions are limited too.
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return model, tokenizer


def make_inputs(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    summary_length: int = 64,
    num_beams: int = 3,
    eval_batch_size: int = 64,
    scoring: str = "official",
) -> Inputs:
    """Articles and summaries as a training loop takes them; lengths are in tokens.

    Choice: a summary is held against the whole reference, by ROUGE with a stemmer, as is usual.
    With scoring "authors", as the code of this paper does it, references end after `summary_length`
    tokens and there is no stemmer.

    Shapes of a batch: input_ids and attention_mask (batch, length), labels (batch, summary length).

    Raises ValueError for a setting below 1 or a length beyond what the model can read.
    """
    check_positive(num_beams=num_beams, eval_batch_size=eval_batch_size)
    lengths = {"max_length": max_length, "summary_length": summary_length}
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100, which the loss skips

    def scored(articles: Dataset) -> partial:
        encoded, references = encode(articles, tokenizer, **lengths), articles["summary"][:]
        if scoring == "authors":
            references = tokenizer.batch_decode(encoded["labels"][:], skip_special_tokens=True)
        return partial(
            evaluate,
            encoded=encoded,
            references=references,
            stemmer=scoring != "authors",
            tokenizer=tokenizer,
            collate=collate,
            batch_size=eval_batch_size,
            generation=beam_search(num_beams, summary_length),
        )

    train, score = encode(data.train, tokenizer, **lengths), scored(data.validation["validation"])
    return Inputs(train, collate, score, final_texts(scored, data.holdout))


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, summary_length: int
) -> Dataset:
    """Token ids of the documents ("input_ids") and summaries ("labels"), each cut to its length.

    The model itself makes the decoder's input, by shifting the labels one place to the right.
    Raises ValueError for a length as check_room does.
    """
    check_room(tokenizer, 1, max_length=max_length, summary_length=summary_length)
    parts = []
    for rows in dataset.iter(10_000):
        document = tokenizer(rows["document"], truncation=True, max_length=max_length)
        summary = tokenizer(text_target=rows["summary"], truncation=True, max_length=summary_length)
        # Without an attention mask: `collate` makes one.
        columns = {"input_ids": document["input_ids"], "labels": summary["input_ids"]}
        parts.append(Dataset.from_dict(columns))
    return concatenate_datasets(parts)


def beam_search(num_beams: int, summary_length: int) -> GenerationConfig:
    """How summaries are written; of the model's own files only the ids of special tokens count.

    Choice: beam 3 and 64 tokens are the authors' code's; the paper is silent on all of this. As in
    BART's own configuration no trigram comes twice, and the search ends once `num_beams` summaries
    have ended. They are ranked by mean log-probability (length_penalty 1) and may be as short as
    they like.
    """
    return GenerationConfig(
        num_beams=num_beams,
        max_length=summary_length + 1,  # the decoder's start token comes before the summary's
        min_length=0,
        early_stopping=num_beams > 1,  # greedy search would warn
        no_repeat_ngram_size=3,
        length_penalty=1.0,
        do_sample=False,
    )


def evaluate(
    model: PreTrainedModel,
    encoded: Dataset,
    references: list[str],
    tokenizer: PreTrainedTokenizerBase,
    collate: Collate,
    batch_size: int,
    generation: GenerationConfig,
    stemmer: bool = True,
) -> dict[str, float | bool]:
    """ROUGE of generated against reference summaries; "metric" is the one of `metric_name`.

    Collapsed: one and the same summary (or none) for every document. Afterwards the model is in the
    mode it was in; no random number is drawn.
    """
    summaries = [""] * len(encoded)
    with evaluation_mode(model):
        for chosen, batch in batches_by_length(model, encoded, collate, batch_size):
            del batch["labels"]
            ids = model.generate(**batch, generation_config=generation)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for place, text in zip(chosen, texts, strict=True):
                summaries[place] = text
    scores = rouge(summaries, references, stemmer)
    return {"metric": scores[TASKS["xsum"]], "collapsed": len(set(summaries)) == 1, **scores}


def rouge(summaries: list[str], references: list[str], stemmer: bool = True) -> dict[str, float]:
    """ROUGE-1, -2 and -L: F1 of words, of word pairs, of the longest common subsequence of words.

    Fractions, the mean over documents. Words are in lower case and stemmed (Porter), as usual.

    >>> scores = rouge(["the cat sat"], ["The cats sat down."])  # all of 3 words, 3 of 4
    >>> {name: round(score, 3) for name, score in scores.items()}
    {'rouge1': 0.857, 'rouge2': 0.8, 'rougeL': 0.857}
    """
    from torchmetrics.functional.text.rouge import rouge_score  # two seconds, with all its metrics

    names = ("rouge1", "rouge2", "rougeL")
    scores = rouge_score(summaries, references, use_stemmer=stemmer, rouge_keys=names)
    return {name: float(scores[f"{name}_fmeasure"]) for name in names}
