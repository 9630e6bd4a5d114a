"""The embedded task: what its module says of it."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from drlora_ref.experiments.tasks.grammar import FRAMES, WORDS, grammar_sentences

TRAIN, VALIDATION = grammar_sentences("train"), grammar_sentences("validation")
SHARED = set(
    "a and be been both either enough not or the to my he she him them they himself herself".split()
)


def words(rows: list[dict]) -> set[str]:
    return {word for row in rows for word in re.findall("[a-z]+", row["sentence"].lower())}


def test_there_are_3840_training_and_960_evaluation_sentences_all_different():
    assert (len(TRAIN), len(VALIDATION)) == (3840, 960)
    assert len({row["sentence"] for row in TRAIN + VALIDATION}) == 3840 + 960


@pytest.mark.parametrize("rows", [TRAIN, VALIDATION], ids=["train", "validation"])
def test_half_of_every_phenomenon_is_acceptable(rows):
    counts = Counter((row["phenomenon"], row["label"]) for row in rows)
    assert len(counts) == 2 * len(FRAMES) == 32 and len(set(counts.values())) == 1


@pytest.mark.parametrize("rows", [TRAIN, VALIDATION], ids=["train", "validation"])
def test_the_sentences_of_a_pair_are_minimal_and_of_opposite_label(rows):
    pairs = {}
    for row in rows:
        pairs.setdefault(row["pair"], []).append(row)
    for first, second in pairs.values():
        assert {first["label"], second["label"]} == {0, 1}
        one, other = (
            Counter(row["sentence"].lower().rstrip(".").split()) for row in (first, second)
        )
        assert (one - other).total() <= 2 and (other - one).total() <= 2


def test_the_two_halves_share_only_function_words():
    assert words(TRAIN) & words(VALIDATION) <= SHARED
    for slot, (train, validation) in WORDS.items():
        pattern = r"\w+"
        assert not set(re.findall(pattern, train)) & set(re.findall(pattern, validation)), slot


def test_the_two_halves_share_no_frame():
    for train, validation in FRAMES.values():
        assert not set(train) & set(validation)


@pytest.mark.parametrize("longest", [1, 2])
def test_counting_words_does_not_solve_it(longest):
    count = CountVectorizer(ngram_range=(1, longest), token_pattern=r"\w+")
    features = count.fit_transform([row["sentence"] for row in TRAIN])
    model = LogisticRegression(max_iter=1000).fit(features, [row["label"] for row in TRAIN])
    answers = model.predict(count.transform([row["sentence"] for row in VALIDATION]))
    assert abs(matthews_corrcoef([row["label"] for row in VALIDATION], answers)) < 0.1


def test_it_is_the_same_in_every_process_and_another_for_another_seed():
    program = (
        "from drlora_ref.experiments.tasks.grammar import *; print(grammar_sentences('train')[:99])"
    )
    # other hashes than here
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env={"PYTHONHASHSEED": seed}
    )
    assert told.stdout.decode().strip() == str(TRAIN[:99])
    assert grammar_sentences("train", seed=1) != TRAIN


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split = 'test': must be one of train, validation"):
        grammar_sentences("test")
