"""The embedded task "grammar": minimal pairs of English, labelled acceptable (1) or not (0)."""

import random
import re
from itertools import cycle

PAIRS = {"train": 120, "validation": 30}  # per phenomenon

# phenomenon: (frames of the training half, frames of the validation half)
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
        "Perhaps {name} seemed <[too|enough] {young}|{young} [too|enough]>.",
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
        "The {king} {blamed} <himself|herself> yesterday.",
        "At school {Peter} {blamed} <himself|herself>.",
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
        "{name} bought [a|] <{red} [{thing}|something]|[{thing}|something] {red}> yesterday.",
        "The {person} was [the|] <{young} [{person2}|someone]|[{person2}|someone] {young}>.",
    ], [
        "Perhaps {name} found [my|] <{red} [{thing}|nothing]|[{thing}|nothing] {red}>.",
        "[My|] <{young} [{person}|somebody]|[{person}|somebody] {young}> laughed.",
    ]),
}

WORDS = {
    "person": ("teacher, doctor, farmer, sailor, singer, driver, gardener, lawyer, student, guest",
               "nurse, pilot, baker, soldier, dancer, plumber, waiter, judge, cook, neighbor"),
    "name": ("Anna, Peter, Mary, Paul, Susan, Tom, Julia, Frank",
             "Laura, David, Emma, Kevin, Sarah, George, Nina, Robert"),
    "thing": ("lamp, chair, bottle, basket, blanket, mirror, hammer, candle, carpet, picture",
              "clock, table, spoon, bucket, jacket, wallet, ladder, drawer, pencil, ticket"),
    "work": ("work, sing, sleep, shout, travel, wander, think",
             "wait, talk, jump, cough, complain, whisper, play"),
    "paint": ("paint, wash, order, check, pack, lift, pull, want",
              "repair, deliver, collect, borrow, polish, inspect, sort"),
    "red": ("new, small, green, dirty, long, cheap, dark",
            "red, heavy, large, clean, round, plain, bright"),
    "young": ("quiet, proud, tall, brave, strong, friendly",
              "calm, hungry, sad, tired, lonely, young"),
    "enjoyed": ("[enjoyed|agreed], [avoided|decided], [finished|hoped], [imagined|promised]",
                "[denied|wanted], [considered|failed], [postponed|pretended], [resisted|threatened]"),
    "met": ("met, called, invited, helped, thanked, greeted",
            "hugged, ignored, hired, fired, defeated, phoned"),
    "king": ("[king|queen], [man|woman], [uncle|aunt], [father|mother], [boy|girl]",
            "[prince|princess], [son|daughter], [husband|wife], [brother|sister], [grandfather|grandmother]"),
    "Peter": ("[Peter|Anna], [Tom|Mary], [Paul|Susan], [Frank|Julia]",
              "[David|Laura], [Kevin|Emma], [George|Sarah], [Robert|Nina]"),
    "blamed": ("blamed, washed, admired, defended, praised, introduced",
               "hurt, dressed, criticized, trusted, burned"),
}


def _fill(frame, half, rng):
    picked = {}
    for slot in dict.fromkeys(re.findall(r"{(\w+)}", frame)):
        words = WORDS[slot.rstrip("2")][half].split(", ")
        picked[slot] = rng.choice([word for word in words if word not in picked.values()])
    return frame.format(**picked)


def _read(text, context, fill):
    text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda m: m[1 + context], text)
    text = re.sub(r"<([^|>]*)\|([^>]*)>", lambda m: m[1 + fill], text)
    text = re.sub(r" +([.,?])", r"\1", " ".join(text.split()))
    return text[0].upper() + text[1:]


def grammar_sentences(split, seed=0):
    """Rows."""
    half = list(PAIRS).index(split)
    rng = random.Random(f"{split} {seed}")
    rows, seen = [], set()
    for phenomenon, halves in FRAMES.items():
        last = len(rows) + 2 * PAIRS[split]
        for frame in cycle(halves[half]):
            text = _fill(frame, half, rng)
            contexts = (0, 1) if "[" in frame else (0,)
            pairs = [[_read(text, c, c), _read(text, c, 1 - c)] for c in contexts]
            if seen.isdisjoint(sum(pairs, [])):
                for pair in pairs:
                    for s, label in zip(pair, (1, 0)):
                        rows.append({"sentence": s, "label": label, "phenomenon": phenomenon, "pair": len(rows) // 2})
                seen.update(sum(pairs, []))
            if len(rows) >= last:
                break
    rng.shuffle(rows)
    return rows
