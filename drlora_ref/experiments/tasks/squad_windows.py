"""Questions and their contexts as windows of tokens, and where in a window the answer lies."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from drlora_ref.experiments.tasks.evaluation import check_lengths

QUESTION_LENGTH = 64  # tokens; what is longer is cut
CHUNK = 1_000  # questions that are encoded at a time; all at once would take several GB
NO_ANSWER = 0  # the position of the tokenizer's first token, <s> or [CLS], means "no answer here"


class Windows(NamedTuple):
    """Questions, each with as much of its context as fits, in as many windows as that takes.

    Shapes: `tokens` has one row a window; `question` (windows,) is the number of the question that
    it belongs to, ascending; `offsets` (windows, max_length, 2) holds where each token of the
    context begins and ends in it, in characters, and -1 for every other token and for padding.
    """

    tokens: Dataset
    question: np.ndarray
    offsets: np.ndarray


def encode(
    questions: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Windows:
    """All windows of these questions, as `iterate_windows` makes them."""
    parts = iterate_windows(questions, tokenizer, max_length, stride)
    tokens, question, offsets = zip(*parts, strict=True)
    return Windows(concatenate_datasets(tokens), np.concatenate(question), np.concatenate(offsets))


def encode_train(
    questions: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Dataset:
    """The tokens of all windows, with "start_positions" and "end_positions" of the answer.

    Choice: as is usual, a window without the whole answer points to <s> or [CLS], in both versions.
    Of several answers to a training question the first counts; the original sets have one at most.
    """
    characters, parts = answer_characters(questions), []
    for windows in iterate_windows(questions, tokenizer, max_length, stride):
        first, last = locate(windows.offsets, characters[windows.question])
        positions = Dataset.from_dict({"start_positions": first, "end_positions": last})
        parts.append(concatenate_datasets([windows.tokens, positions], axis=1))
    return concatenate_datasets(parts)


def iterate_windows(
    questions: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int
) -> Iterator[Windows]:
    """Windows of question, then context: at most `max_length` tokens, not padded.

    They come CHUNK questions at a time.

    Read with care: `stride` is what two neighbouring windows have in common, in tokens of the
    context. BERT's authors gave that name to the distance between them.

    Choice: a question is cut to 64 tokens, as is usual: SQuAD 2.0 has a few that run on and on, and
    would leave no room for the context. Stride 128 is the usual one too; the paper is silent.

    Raises ValueError for a max_length beyond what the model reads, and for a stride that is not
    less than what max_length leaves for the context beside the longest question.
    """
    check_lengths(tokenizer, max_length=max_length)
    texts, longest = cut_questions(questions, tokenizer)
    _check_room(max_length, stride, longest, tokenizer.num_special_tokens_to_add(pair=True))
    for begin in range(0, len(texts), CHUNK):
        tokens = tokenizer(
            texts[begin : begin + CHUNK],
            questions["context"][begin : begin + CHUNK],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
        )
        question = begin + np.array(tokens.pop("overflow_to_sample_mapping"))
        offsets = context_offsets(tokens.encodings, max_length)
        yield Windows(Dataset.from_dict(dict(tokens)), question, offsets)


def _check_room(max_length: int, stride: int, longest: int, special: int) -> None:
    room = max_length - longest - special
    if room < 1:
        raise ValueError(
            f"max_length = {max_length}: must be more than {longest + special + stride}, since the "
            f"longest question takes {longest} tokens, the special ones {special}, stride {stride}"
        )
    if not 0 <= stride < room:
        raise ValueError(
            f"stride = {stride}: must be 0 to {room - 1}, less than the {room} tokens that "
            f"max_length = {max_length} leaves for the context beside the longest question"
        )


def cut_questions(questions: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], int]:
    """(the questions, each cut to 64 tokens; how many tokens the longest of them takes)."""
    cut, longest = [], 0
    for rows in questions.iter(CHUNK):
        texts = [text.strip() for text in rows["question"]]
        tokens = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=QUESTION_LENGTH
        )
        ends = [encoding.offsets[-1][1] if encoding.ids else 0 for encoding in tokens.encodings]
        texts = [text[:end] for text, end in zip(texts, ends, strict=True)]
        # Counted again: half of a word that was cut in two may fall into other tokens.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(longest, *map(len, ids))
        cut += texts
    return cut, longest


def context_offsets(encodings: list[Encoding], max_length: int) -> np.ndarray:
    """`offsets` of Windows, from the encodings of a fast tokenizer."""
    offsets = np.full((len(encodings), max_length, 2), -1, np.int32)
    for held, encoding in zip(offsets, encodings, strict=True):
        in_context = [sequence == 1 for sequence in encoding.sequence_ids]
        held[: len(in_context)][in_context] = np.array(encoding.offsets)[in_context]
    return offsets


def answer_characters(questions: Dataset) -> np.ndarray:
    """Where in the context each question's first answer begins and ends; -1 if it has none.

    Blanks at its ends do not count, since they may belong to no token. Shape: (questions, 2)
    """
    characters = np.full((len(questions), 2), -1)
    for held, answers in zip(characters, questions["answers"][:], strict=True):
        if answers["text"]:
            text, start = answers["text"][0], answers["answer_start"][0]
            held[:] = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    return characters


def locate(offsets: np.ndarray, characters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) token of each window's answer; 0 and 0 where the window lacks a part of it.

    An answer may be part of a token (the 7 of 1817 is one of SQuAD's), so every token that holds a
    character of it counts.

    Shapes: offsets (windows, tokens, 2) as in Windows, characters (windows, 2) -> two (windows,)

    >>> window = np.array([[[-1, -1], [0, 4], [5, 9], [-1, -1]]])  # <s> Anna left </s>
    >>> [token.tolist() for token in locate(window, np.array([[5, 9]]))]
    [[2], [2]]
    """
    begin, end = characters[:, :1], characters[:, 1:]
    held = (offsets[..., 0] < end) & (offsets[..., 1] > begin)
    from_here = np.where(offsets[..., 0] >= 0, offsets[..., 0], np.inf).min(1, keepdims=True)
    whole = (from_here <= begin) & (end <= offsets[..., 1].max(1, keepdims=True)) & held
    first, last = whole.argmax(1), whole.shape[1] - 1 - whole[:, ::-1].argmax(1)
    found = whole.any(1)
    return np.where(found, first, NO_ANSWER), np.where(found, last, NO_ANSWER)
