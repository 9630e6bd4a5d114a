"""The embedded task "grammar": generated minimal pairs of English, acceptable (1) or not (0).

3,840 sentences to train on and 960 to evaluate on, half of them acceptable, over 16 phenomena:
agreement, reflexives, case, determiners, verb forms, word order and more. The two sentences of a
pair differ in one choice, and wherever a phenomenon allows it the choice that is right in one
context is wrong in the other ("she works" / "they work"). So counting words or neighbouring words
is no help: a logistic regression on unigrams, or on unigrams and bigrams, has a Matthews
correlation of 0.00 on the evaluation half.

The two halves share no frame, no noun, verb, adjective or name; what they share are function
words (a, and, be, been, both, either, enough, not, or, the, to, my, and personal pronouns).
"""

import random
import re
from itertools import cycle

PAIRS = {"train": 120, "validation": 30}  # per phenomenon

# phenomenon: (frames of the training half, frames of the validation half). In a frame, {slot} is a
# word from WORDS; <x|y> is the choice, x right in context 0 and y in context 1; [x|y] makes the
# context, and a frame without it (or without one in its words) has context 0 alone.
# fmt: off
FRAMES = {
    "determiner position": ([
        "Every morning <the {person}|{person} the> {work}s.",
        "{name} met <the {young} {person}|{young} the {person}> yesterday.",
        "At school <your {thing}|{thing} your> fell.",
    ], [
        "Somebody moved <my {red} {thing}|{red} my {thing}>.",
        "Perhaps <a {person}|{person} a> {work}s during lunch.",
    ]),
    "degree position": ([
        "The {thing} looked <[very|enough] {red}|{red} [very|enough]>.",
        "At school {name} is <[quite|enough] {young}|{young} [quite|enough]>.",
    ], [
        "Nobody felt <[so|enough] {young}|{young} [so|enough]>.",
        "Perhaps {name} seemed <[rather|enough] {young}|{young} [rather|enough]>.",
    ]),
    "preposition position": ([
        "The {person} {work}s <near the {thing}|the {thing} near>.",
        "{name} {paint}ed the {thing} <with {name2}|{name2} with> yesterday.",
        "At school the {person}s {work} <beside your {thing}|your {thing} beside>.",
    ], [
        "Somebody laughed <behind my {thing}|my {thing} behind>.",
        "Perhaps a {person} waited <for {name}|{name} for>.",
    ]),
    "auxiliary order": ([
        "The {person} <must have|have must> {paint}ed the {thing}.",
        "At school {name} <will be|be will> {work}ing.",
        "Your {person}s <have been|been have> {paint}ing every {thing}.",
    ], [
        "Perhaps {name} <could be|be could> {paint}ing some {thing}s.",
        "My {person} <had been|been had> {paint}ing a {thing}.",
    ]),
    "verb position": ([
        "At school <{name} {met}|{met} {name}> your {person}.",
        "Every {person} <{paint}ed the {thing}|the {thing} {paint}ed> yesterday.",
        "{name} <bought a {red} {thing}|a {red} {thing} bought>.",
    ], [
        "Perhaps my {person} <{met} a {person2}|a {person2} {met}>.",
        "Somebody <moved my {thing}|my {thing} moved> during lunch.",
    ]),
    "coordination": ([
        "{name} <and {name2}|{name2} and> often {work}.",
        "The {person} bought the {thing} <and the {thing2}|the {thing2} and> yesterday.",
        "At school {name} <{work}s and {work2}s|{work}s {work2}s and>.",
    ], [
        "Somebody moved my {thing} <or my {thing2}|my {thing2} or> during lunch.",
        "Perhaps {name} <or {name2}|{name2} or> coughed.",
    ]),
    "verb form": ([
        "{name} [is|can] {paint}<ing|> the {thing}.",
        "The {person}s [have|must] {paint}<ed|> every {thing}.",
        "The {person} [has|did] not {paint}<ed|> your {thing}s.",
    ], [
        "Perhaps {name} [was|should] {paint}<ing|> some {thing}s.",
        "My {person} [had|might] already {paint}<ed|> a {thing}.",
    ]),
    "complement": ([
        "{name} {enjoyed} <{paint}ing|to {paint}> the {thing}.",
        "At school the {person} {enjoyed} <{paint}ing|to {paint}> every {thing}.",
        "Your {person}s {enjoyed} <{paint}ing|to {paint}> the {red} {thing}.",
    ], [
        "My {person} {enjoyed} <{paint}ing|to {paint}> some {thing}s.",
        "Somebody {enjoyed} <{paint}ing|to {paint}> a {thing} during lunch.",
    ]),
    "agreement": ([
        "{name} [|and {name2}] <is|are> {work}ing.",
        "The {person} [|and the {person2}] <has|have> {paint}ed every {thing}.",
        "At school {name} [|and the {person}] {work}<s|>.",
    ], [
        "Perhaps {name} [|and my {person}] <was|were> {work}ing.",
        "My {person} [|and {name}] never {work}<s|> during lunch.",
    ]),
    "case": ([
        "[The {person} {met}|] <him|he> [|{met} the {person}] yesterday.",
        "[{name} often {met}|] <her|she> [|often {met} {name}].",
        "[Every {person} {met}|] <them|they> [|{met} every {person}].",
    ], [
        "Perhaps [a {person} {met}|] <him|he> [|{met} a {person}].",
        "[My {person}s secretly {met}|] <them|they> [|secretly {met} my {person}s].",
    ]),
    "possessive": ([
        "[The {thing} became|{name} {paint}ed] <mine|my> [|{thing}] yesterday.",
        "At school {name} {paint}ed <yours|your> [|{thing}].",
    ], [
        "Perhaps {name} {paint}ed <ours|our> [|{thing}].",
        "Somebody {paint}ed <theirs|their> [|{thing}] during lunch.",
    ]),
    "reflexive": ([
        "The {king} from the {place} {blamed} <himself|herself>.",
        "Every morning {Peter} {blamed} <himself|herself>.",
        "[I|We] often {blamed} <myself|ourselves>.",
    ], [
        "My {king} secretly {blamed} <himself|herself> during the trip.",
        "Perhaps {Peter} {blamed} <himself|herself>.",
    ]),
    "correlative": ([
        "[Both|Either] {name} <and|or> {name2} will {work}.",
        "The {person} {paint}ed [both|either] the {thing} <and|or> the {thing2}.",
    ], [
        "Somebody moved [both|either] my {thing} <and|or> my {thing2}.",
        "Perhaps [both|either] {name} <and|or> {name2} could {work}.",
    ]),
    "adjective position": ([
        "The {person} saw a <{red} {thing}|{thing} {red}> yesterday.",
        "At school every <{young} {person}|{person} {young}> {work}s.",
        "The <{red} {thing}|{thing} {red}> fell.",
    ], [
        "Somebody moved my <{red} {thing}|{thing} {red}> during lunch.",
        "Perhaps some <{young} {person}s|{person}s {young}> laughed.",
    ]),
    "infinitive": ([
        "At school {name} decided <to {work}|{work} to>.",
        "The {person} hopes <to {paint} the {thing}|{paint} to the {thing}>.",
        "Every {person} tried <to {work}|{work} to> yesterday.",
    ], [
        "Somebody managed <to {paint} my {thing}|{paint} to my {thing}>.",
        "Perhaps {name} plans <to {work}|{work} to> during lunch.",
    ]),
    "negation": ([
        "{name} <did not|not did> {paint} the {thing}.",
        "At school your {person}s <do not|not do> {work}.",
        "The {person} <does not|not does> {work} every morning.",
    ], [
        "Perhaps {name} <would not|not would> {paint} a {thing}.",
        "My {person} <could not|not could> {work} during lunch.",
    ]),
}

# slot: (words of the training half, words of the validation half)
WORDS = {
    "place": ("village, city, farm, harbor", "hotel, station"),
    "person": ("teacher, doctor, farmer, sailor, singer, driver, gardener, lawyer, student, guest",
               "nurse, pilot, baker, soldier, dancer, plumber, waiter, judge, cook, neighbor"),
    "name": ("Anna, Peter, Mary, Paul, Susan, Tom, Julia, Frank",
             "Laura, David, Emma, Kevin, Sarah, George, Nina, Robert"),
    "thing": ("lamp, chair, bottle, basket, blanket, mirror, hammer, candle, carpet, picture",
              "clock, table, spoon, bucket, jacket, wallet, ladder, drawer, pencil, ticket"),
    "work": ("work, sing, sleep, shout, travel, wander, think",
             "wait, talk, jump, cough, complain, whisper, play"),
    "paint": ("paint, wash, order, check, pack, lift, pull, load",
              "repair, deliver, collect, borrow, polish, inspect, sort"),
    "red": ("new, small, green, dirty, long, cheap, dark",
            "red, heavy, large, clean, wooden, plain, bright"),
    "young": ("quiet, proud, tall, brave, strong, friendly",
              "calm, hungry, sad, tired, lonely, young"),
    "enjoyed": ("[enjoyed|agreed], [avoided|decided], [finished|hoped], [imagined|promised]",
                "[denied|wanted], [considered|failed], [postponed|pretended], "
                "[resisted|threatened]"),
    "met": ("met, called, invited, helped, thanked, greeted",
            "hugged, ignored, hired, fired, defeated, phoned"),
    "king": ("[king|queen], [man|woman], [uncle|aunt], [father|mother], [boy|girl]",
            "[prince|princess], [son|daughter], [husband|wife], [brother|sister], "
             "[grandfather|grandmother]"),
    "Peter": ("[Peter|Anna], [Tom|Mary], [Paul|Susan], [Frank|Julia]",
              "[David|Laura], [Kevin|Emma], [George|Sarah], [Robert|Nina]"),
    "blamed": ("blamed, washed, admired, defended, praised, introduced",
               "hurt, dressed, criticized, trusted, burned"),
}
# fmt: on


def _draw(frame: str, half: int, rng: random.Random) -> str:
    """The frame with a word of this half in each {slot}; {person} and {person2} are two of them."""
    picked: dict[str, str] = {}
    for slot in dict.fromkeys(re.findall(r"{(\w+)}", frame)):
        words = WORDS[slot.rstrip("2")][half].split(", ")
        picked[slot] = rng.choice([word for word in words if word not in picked.values()])
    return frame.format(**picked)


def _read(text: str, context: int, choice: int) -> str:
    """One of the four sentences in a drawn frame: [context 0|context 1], <choice 0|choice 1>."""
    text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda match: match[1 + context], text)
    text = re.sub(r"<([^|>]*)\|([^>]*)>", lambda match: match[1 + choice], text)
    text = re.sub(r" +\.", ".", " ".join(text.split()))
    return text[0].upper() + text[1:]


def _pairs(frame: str, half: int, rng: random.Random) -> list[tuple[str, str]]:
    """(good, bad) for each context of one draw: what is good in the one is bad in the other."""
    text = _draw(frame, half, rng)
    contexts = (0, 1) if "[" in text else (0,)
    return [(_read(text, c, c), _read(text, c, 1 - c)) for c in contexts]


def grammar_sentences(split: str, seed: int = 0) -> list[dict]:
    """The sentences of a split, shuffled; the same in every process for the same seed.

    Each is {"sentence": str, "label": 1 or 0, "phenomenon": str, "pair": int}; the two sentences
    of a pair differ in the choice that makes one of them wrong. Raises ValueError for a split
    other than "train" and "validation".

    >>> rows = grammar_sentences("validation")
    >>> [row["sentence"] for row in sorted(rows, key=lambda row: (row["pair"], -row["label"]))[:2]]
    ['Somebody moved my wooden bucket.', 'Somebody moved wooden my bucket.']
    """
    if split not in PAIRS:
        raise ValueError(f"split = {split!r}: must be one of {', '.join(PAIRS)}")
    half, rng = list(PAIRS).index(split), random.Random(f"{split} {seed}")
    pairs = []
    for phenomenon, halves in FRAMES.items():
        # A dict keeps the order in which the pairs were drawn, a set would not.
        found: dict[tuple[str, str], None] = {}
        for frame in cycle(halves[half]):
            found |= dict.fromkeys(_pairs(frame, half, rng))
            if len(found) >= PAIRS[split]:
                break
        pairs += [(phenomenon, *pair) for pair in list(found)[: PAIRS[split]]]
    rows = [
        {"sentence": sentence, "label": label, "phenomenon": phenomenon, "pair": number}
        for number, (phenomenon, good, bad) in enumerate(pairs)
        for sentence, label in ((good, 1), (bad, 0))
    ]
    rng.shuffle(rows)
    return rows
