"""The embedded task: minimal pairs of English grammar, acceptable (1) or not (0)."""

import random
import re

SIZES = {"train": 80, "validation": 20}

# [a|b] sets the context, <a|b> is the word under test; {name} is a word of that class.
FRAMES = {
    "agreement": (
        [
            "The {person}[|s] {sing}<s|> every morning.",
            "At school our {person}[|s] {sing}<s|>, but nobody else does.",
            "{name} knows that the {person}[|s] often {sing}<s|>.",
        ],
        [
            "My {person}[|s] never {sing}<s|> during lunch.",
            "When the {person}[|s] {sing}<s|>, {name} leaves.",
        ],
    ),
    "attractor": (
        [
            "The {thing}[|s] near the {thing2}s <is|are> {new}.",
            "The {thing}[|s] beside the {thing2} <was|were> {new} yesterday.",
            "The {person}[|s] who helped the {person2}s <has|have> arrived.",
        ],
        [
            "A month ago the {thing}[|s] behind the {thing2}s <was|were> {new}.",
            "Perhaps the {person}[|s] from the {place}s <is|are> asleep.",
        ],
    ),
    "determiner": (
        [
            "{name} bought <this|these> {thing}[|s] yesterday.",
            "<That|Those> {thing}[|s] fell to the floor.",
            "The {person} painted <that|those> {new} {thing}[|s].",
        ],
        [
            "Somebody left <this|these> {thing}[|s] behind.",
            "Without <that|those> {thing}[|s], {name} felt lost.",
        ],
    ),
    "reflexive": (
        [
            "The {kin} {blamed} <himself|herself> again.",
            "At school {couple} {blamed} <himself|herself>.",
            "[I|We] never {blamed} <myself|ourselves>.",
        ],
        [
            "My {kin} clearly {blamed} <himself|herself> during the trip.",
            "[He|They] secretly {blamed} <himself|themselves>.",
        ],
    ),
    "verb form": (
        [
            "{name} [is|can] {paint}<ing|> the {thing}.",
            "The {person}s [have|must] {paint}<ed|> every {thing}.",
            "The {person} [has|did] not {paint}<ed|> our {thing}s.",
        ],
        [
            "Perhaps {name} [was|should] {paint}<ing|> some {thing}s.",
            "My {person} [had|might] already {paint}<ed|> a {thing}.",
        ],
    ),
    "polarity": (
        [
            "{name} [did not|] {paint}[|ed], and <neither|so> did {name2}.",
            "The {person} [cannot|can] {sing}, and <neither|so> can the {person2}.",
            "The {person} [did not|] {paint}[|ed], and {name} [did not|] {paint}[|ed] <either|too>.",
        ],
        [
            "My {person}s [will not|will] {sing}, and <neither|so> will {name}.",
            "{name} [would not|would] {sing}, and my {person} [would not|would] {sing} <either|too>.",
        ],
    ),
    "inversion": (
        [
            "[|{name} knows] when <will the {person}|the {person} will> {sing}[?|.]",
            "[|We remember] where <can our {person}s|our {person}s can> {sing}[?|.]",
            "[|The {person} said] what <is {name}|{name} is> {paint}ing[?|.]",
        ],
        [
            "[|Somebody explained] why <should {name}|{name} should> {sing}[?|.]",
            "[|My {person} forgot] how <could a {person2}|a {person2} could> {paint} the {thing}[?|.]",
        ],
    ),
    "order": (
        [
            "The {thing} looked <[very|enough] {new}|{new} [very|enough]>.",
            "The <{new} {thing}|{thing} {new}> fell to the floor.",
            "{name} gave <the {person} a {thing}|a {thing} the {person}> yesterday.",
        ],
        [
            "Nobody felt <[very|enough] {calm}|{calm} [very|enough]>.",
            "Somebody moved my <{new} {thing}|{thing} {new}>.",
        ],
    ),
    "argument": (
        [
            "The {person} {greet} the {person2}.",
            "At school {name} {greet} our {person}s.",
            "{name} often {greet} {name2}.",
        ],
        [
            "My {person} secretly {greet} {name}.",
            "Somebody {greet} a {person} during lunch.",
        ],
    ),
    "complement": (
        [
            "{name} {enjoyed} <{paint}ing|to {paint}> the {thing}.",
            "The {person} {enjoyed} <{paint}ing|to {paint}> with {name}.",
            "Every {person} {enjoyed} <{paint}ing|to {paint}> yesterday.",
        ],
        [
            "My {person}s {enjoyed} <{paint}ing|to {paint}> some {thing}s.",
            "Somebody {enjoyed} <{paint}ing|to {paint}> it during lunch.",
        ],
    ),
    "quantifier": (
        [
            "We did not buy <much|many> [{rice}|{thing}s].",
            "The {person} wasted too <much|many> [{rice}|{thing}s].",
            "How <much|many> [{rice}|{thing}s] did {name} see?",
        ],
        [
            "My {person} keeps so <much|many> [{rice}|{thing}s] indoors.",
            "Nobody needs as <much|many> [{rice}|{thing}s] as {name}.",
        ],
    ),
    "case": (
        [
            "[The {person} {met}|] <him|he> [|{met} the {person}] yesterday.",
            "[{name} often {met}|] <her|she> [|often {met} {name}].",
            "[Every {person} {met}|] <them|they> [|{met} every {person}].",
        ],
        [
            "Perhaps [a {person} {met}|] <him|he> [|{met} a {person}].",
            "[My {person}s secretly {met}|] <them|they> [|secretly {met} my {person}s].",
        ],
    ),
    "comparative": (
        [
            "The {thing} was [as|] {new}<|er> [as|than] the {thing2}.",
            "{name} bought a {thing} [as|] {new}<|er> [as|than] yours.",
            "This {thing} looked [as|] {new}<|er> [as|than] that {thing2}.",
        ],
        [
            "Nobody moved a {thing} [as|] {new}<|er> [as|than] mine.",
            "My {thing}s seem [as|] {new}<|er> [as|than] any {thing2}.",
        ],
    ),
    "article": (
        [
            "{name} bought <a|an> [{thing}|{apple}] yesterday.",
            "<A|An> [{thing}|{apple}] fell to the floor.",
            "The {person} has <a|an> [{thing}|{apple}] and two {thing2}s.",
        ],
        [
            "Somebody left <a|an> [{thing}|{apple}] behind.",
            "Perhaps {name} needs <a|an> [{thing}|{apple}] during the trip.",
        ],
    ),
    "adverb": (
        [
            "The [|{person}] {quiet}<|ly> [{person}|] laughed.",
            "{name} met the [|{person}s who] {quiet}<|ly> [{person}s who|] worked.",
            "Every [|{person}] {quiet}<|ly> [{person}|] opened the door.",
        ],
        [
            "My [|{person}] {quiet}<|ly> [{person}|] coughed during lunch.",
            "Perhaps a [|{person}] {quiet}<|ly> [{person}|] moved it.",
        ],
    ),
}

WORDS = {
    "person": (
        "teacher, doctor, farmer, sailor, singer, driver, gardener, lawyer, student, guest",
        "nurse, pilot, baker, soldier, dancer, plumber, waiter, judge, cook, neighbor",
    ),
    "name": (
        "Anna, Peter, Mary, Paul, Susan, Tom, Julia, Frank",
        "Laura, David, Emma, Kevin, Sarah, George, Nina, Robert",
    ),
    "thing": (
        "lamp, chair, bottle, basket, blanket, mirror, hammer, candle, carpet, picture",
        "clock, table, spoon, bucket, jacket, wallet, ladder, drawer, pencil, ticket",
    ),
    "place": ("a, b", "hotel, village, garden, station"),
    "sing": (
        "sing, smile, sleep, travel, swim, work, shout, wander",
        "dance, wait, talk, laugh, complain, snore, jump, run",
    ),
    "new": (
        "new, old, cheap, small, long, clean, dark, short",
        "soft, light, warm, bright, thick, strong, cold, smooth",
    ),
    "calm": ("quiet, proud", "calm, hungry, sad, tired, lonely"),
    "kin": (
        "[king|queen], [man|woman], [uncle|aunt], [father|mother], [boy|girl]",
        "[prince|princess], [son|daughter], [husband|wife], [brother|sister]",
    ),
    "couple": ("[Peter|Anna], [Tom|Mary], [Paul|Susan], [Frank|Julia]", "a, b"),
    "blamed": (
        "blamed, washed, admired, defended, praised",
        "hurt, dressed, criticized, trusted, burned",
    ),
    "paint": (
        "paint, wash, pull, open, order, check, help, cook",
        "repair, lift, deliver, collect, polish, borrow, count, hand",
    ),
    "greet": (
        "[praised|apologized] <|to>, [greeted|smiled] <|at>, [obeyed|listened] <|to>, "
        "[thanked|argued] <|with>, [rescued|stared] <|at>, [trusted|relied] <|on>",
        "[ignored|replied] <|to>, [blamed|glanced] <|at>, [hired|chatted] <|with>, "
        "[defeated|belonged] <|to>, [hugged|waited] <|for>, [fired|depended] <|on>",
    ),
    "enjoyed": (
        "[enjoyed|refused], [avoided|decided], [finished|hoped], [imagined|promised]",
        "[denied|agreed], [considered|wanted], [postponed|failed], [resisted|pretended]",
    ),
    "rice": (
        "rice, water, sugar, furniture, luggage, sand",
        "milk, butter, money, honey, flour, equipment",
    ),
    "met": (
        "met, called, invited, helped, thanked",
        "hugged, ignored, hired, fired, defeated, phoned",
    ),
    "apple": (
        "apple, egg, onion, orange, umbrella, envelope, artist",
        "oven, owl, anchor, arrow, engineer, eagle, iron",
    ),
    "quiet": (
        "quiet, careful, proud, brave, nervous, polite",
        "silent, loud, clever, eager, cheerful, patient, wise",
    ),
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
    half = list(SIZES).index(split)
    rng = random.Random(f"{split} {seed}")
    rows, seen, pair = [], set(), 0
    for phenomenon, halves in FRAMES.items():
        frames, n, k = halves[half], 0, 0
        while n < SIZES[split]:
            frame = frames[k % len(frames)]
            k += 1
            if k > 20000:
                break
            text = _fill(frame, half, rng)
            contexts = (0, 1) if "[" in text else (0,)
            new = [(_read(text, c, f), int(c == f)) for c in contexts for f in (c, 1 - c)]
            if any(s in seen for s, _ in new):
                continue
            seen.update(s for s, _ in new)
            for i, (s, l) in enumerate(new):
                rows.append(
                    {"sentence": s, "label": l, "phenomenon": phenomenon, "pair": pair + i // 2}
                )
            pair += len(contexts)
            n += len(contexts)
    rng.shuffle(rows)
    return rows
