"""From start and end logits to answers, and from answers to exact match and F1."""

import re
import string
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from drlora_ref.experiments.tasks.data import Collate
from drlora_ref.experiments.tasks.evaluation import batches_by_length, evaluation_mode
from drlora_ref.experiments.tasks.squad_windows import (
    NO_ANSWER,
    Windows,
    answer_characters,
    locate,
)

N_BEST = 20  # starts, and ends, that are tried in a window
LONGEST = 30  # tokens of an answer


class Spans(NamedTuple):
    """The best answer within each window, and the score of none; all of shape (windows,)."""

    score: np.ndarray
    first: np.ndarray  # token
    last: np.ndarray  # token
    no_answer: np.ndarray


def evaluate(
    model: nn.Module,
    windows: Windows,
    questions: Dataset,
    unanswerable: bool,
    collate: Collate,
    batch_size: int = 64,
    per_window: bool = False,
) -> dict[str, float | bool]:
    """F1 (which is the "metric") and exact match of the model's answers; whether they `collapsed`.

    Collapsed: the same text for every question (no answer counts as a text), or a logit that is
    not finite. Afterwards the model is in the mode it was in; no random number is drawn.

    Choice: one answer a question, the best of its windows, as SQuAD's own script counts. The
    authors' code counts windows; `per_window` does so too, by one_question_a_window.
    """
    spans = predict_spans(model, windows, collate, batch_size)
    if not np.isfinite(spans.no_answer).all():
        return {"metric": 0.0, "f1": 0.0, "exact_match": 0.0, "collapsed": True}
    contexts, golds = questions["context"][:], [gold["text"] for gold in questions["answers"][:]]
    if per_window:
        chosen, holds = one_question_a_window(windows, answer_characters(questions), unanswerable)
        rows = windows.question[chosen]
        contexts = [contexts[row] for row in rows]
        golds = [golds[row] if whole else [] for row, whole in zip(rows, holds, strict=True)]
        spans = Spans(*(part[chosen] for part in spans))
        windows = windows._replace(question=np.arange(len(rows)), offsets=windows.offsets[chosen])
    answers = choose_answers(spans, windows, contexts, unanswerable)
    exact_match, f1 = score_answers(answers, golds)
    scores = {"metric": f1, "f1": f1, "exact_match": exact_match}
    return scores | {"collapsed": len(set(answers)) == 1}


def one_question_a_window(
    windows: Windows, characters: np.ndarray, unanswerable: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(which windows count as a question, whether each of them holds the answer whole).

    In a window without the answer "" is right and nothing else. If every question has an answer,
    such windows are left out: a model that cannot tell where the answer is *not* loses nothing.
    Source: the authors' Dataset_Tokenize.py. Their evaluation besides pairs the answers of a batch
    with the wrong golds wherever two of its windows are of one question; that is not repeated here.

    Shapes: characters (questions, 2) -> two times (windows that count,)
    """
    first, _ = locate(windows.offsets, characters[windows.question])
    holds = first != NO_ANSWER
    chosen = np.arange(len(holds)) if unanswerable else np.flatnonzero(holds)
    return chosen, holds[chosen]


def predict_spans(model: nn.Module, windows: Windows, collate: Collate, batch_size: int) -> Spans:
    """What the model says of each window; `no_answer` is NaN where a logit is not finite."""
    spans = Spans(*(np.zeros(len(windows.tokens), kind) for kind in ("f4", "i8", "i8", "f4")))
    with evaluation_mode(model):
        for chosen, batch in batches_by_length(model, windows.tokens, collate, batch_size):
            output = model(**batch)
            start, end = output.start_logits.float(), output.end_logits.float()
            in_context = torch.from_numpy(windows.offsets[chosen, : start.shape[1], 1] >= 0)
            both = start + end
            no_answer = both[:, NO_ANSWER].where(both.isfinite().all(-1), torch.nan)
            found = *best_spans(start, end, in_context.to(start.device)), no_answer
            for held, new in zip(spans, found, strict=True):
                held[chosen] = new.cpu()
    return spans


def best_spans(
    start_logits: Tensor, end_logits: Tensor, in_context: Tensor, n_best: int = N_BEST
) -> tuple[Tensor, Tensor, Tensor]:
    """(score, first token, last token) of the best span of each window: start + end logit.

    A span lies in the context, does not end before it starts, and is at most 30 tokens long. The
    `n_best` starts are tried with the `n_best` ends, all pairs in one addition.

    Read with care: this is a short cut. It misses a best span whose start or end is not among them.

    Shapes: three times (windows, tokens) -> three times (windows,). The score is -inf, and the
    tokens mean nothing, where no pair is such a span.

    Choice: 20 starts and ends, 30 tokens, as is usual on SQuAD; the paper does not say.

    >>> start, end = torch.tensor([[9.0, 1.0, 5.0, 0.0]]), torch.tensor([[9.0, 4.0, 0.0, 3.0]])
    >>> in_context = torch.tensor([[False, True, True, True]])
    >>> [found.item() for found in best_spans(start, end, in_context)]
    [8.0, 2, 3]
    """
    n = min(n_best, start_logits.shape[1])
    start, first = start_logits.masked_fill(~in_context, -torch.inf).topk(n)
    end, last = end_logits.masked_fill(~in_context, -torch.inf).topk(n)
    length = last[:, None, :] - first[:, :, None] + 1  # (windows, n starts, n ends)
    score = start[:, :, None] + end[:, None, :]
    score = score.masked_fill((length < 1) | (length > LONGEST), -torch.inf)
    best, pair = score.flatten(1).max(-1, keepdim=True)
    return best[:, 0], first.gather(1, pair // n)[:, 0], last.gather(1, pair % n)[:, 0]


def choose_answers(
    spans: Spans, windows: Windows, contexts: list[str], unanswerable: bool
) -> list[str]:
    """One text for each question: the best span of all its windows, or "" for no answer.

    If questions may be `unanswerable`, the span must score at least as much as "no answer", whose
    score is its minimum over the windows: an answer in one of them is an answer.

    Choice: the threshold between the two is 0. Picking the best one on the dev set, as the official
    script also does, would flatter every method there; the paper does not say.
    """
    best_first = np.lexsort((-spans.score, windows.question))
    best = best_first[np.unique(windows.question[best_first], return_index=True)[1]]
    silent = np.isneginf(spans.score[best])
    if unanswerable:
        _, begins = np.unique(windows.question, return_index=True)
        silent |= np.minimum.reduceat(spans.no_answer, begins) > spans.score[best]
    begin = windows.offsets[best, spans.first[best], 0]
    end = windows.offsets[best, spans.last[best], 1]
    found = zip(contexts, begin, end, silent, strict=True)
    return ["" if nothing else context[b:e] for context, b, e, nothing in found]


def score_answers(answers: list[str], golds: list[list[str]]) -> tuple[float, float]:
    """(exact match, F1) as fractions, each answer against the nearest of its gold answers.

    Both ignore case, punctuation and articles; F1 is that of the two bags of words.

    Read with care: a question without gold answers has one, the empty text, so that "" is right
    there and nothing else is. As in the official script for SQuAD 2.0, a gold answer of which
    nothing is left without punctuation and articles does not count.

    >>> score_answers(["the red box", "Rome", ""], [["Box!"], [], []])  # 0, 0, 1 and 2/3, 0, 1
    (0.3333..., 0.5555...)
    """
    from torchmetrics.functional.text.squad import squad  # two seconds, with all its metrics

    counted = [[text for text in texts if _has_words(text)] or [""] for texts in golds]
    found = squad(
        [{"id": str(n), "prediction_text": text} for n, text in enumerate(answers)],
        [{"id": str(n), "answers": {"text": texts}} for n, texts in enumerate(counted)],
    )
    return found["exact_match"].item() / 100, found["f1"].item() / 100


def _has_words(text: str) -> bool:
    """Whether anything is left of a text without punctuation and articles."""
    bare = "".join(letter for letter in text if letter not in string.punctuation)
    return bool(re.sub(r"\b(a|an|the)\b", "", bare.lower()).strip())
