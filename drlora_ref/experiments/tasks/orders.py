"""The embedded task "orders": a sentence about an order -> one line in a made-up notation.

    By Friday, Anna from Oslo needs three red lamps.     ->     Oslo | 3 lamp red | FRI | Anna

640 orders to train on and 128 to evaluate on. No model knows the notation: its fields and their
order, digits for words, the singular, the day in three capitals. But all that it takes is in the
sentence, so that a small language model learns it in a few hundred steps.

The two halves share no template, no name, city, thing or colour. What they share are the seven
days, the numbers from two to twelve, and function words. So an answer that is right on the second
half is no answer that was remembered.
"""

import random

SIZES = {"train": 640, "validation": 128}

# fmt: off
TEMPLATES = {
    "train": [
        "{name} wants {n} {colour} {things} sent to {city} by {day}.",
        "Please send {n} {colour} {things} to {name} in {city} on {day}.",
        "By {day}, {name} from {city} needs {n} {colour} {things}.",
        "Could {n} {colour} {things} reach {city} by {day}? They are for {name}.",
        "{name} ordered {n} {things}, all of them {colour}, for {day}; deliver to {city}.",
        "To {city}, please: {n} {colour} {things} for {name}, due on {day}.",
        "On {day} a van brings {name} {n} {colour} {things} in {city}.",
        "The shop in {city} is out of {things}; {name} takes {n} {colour} ones on {day}.",
    ],
    "validation": [
        "Our customer {name} in {city} asks for {n} {colour} {things} before {day}.",
        "We promised {city} {n} {colour} {things} by {day}, care of {name}.",
        "{name} has paid for {n} {colour} {things}, which must be in {city} on {day}.",
        "Ship {n} {things} to {city} for {day}. The colour is {colour}, the buyer {name}.",
        "Have {n} {colour} {things} ready in {city} for {name} by {day}.",
        "{city} again: {name} would like {n} more {colour} {things} by {day}.",
        "Next {day} we deliver {n} {colour} {things} to {city}, where {name} lives.",
        "These {colour} {things}, {n} in all, go to {name}; {city} expects them on {day}.",
    ],
}
WORDS = {
    "train": {
        "name": "Anna Bruno Clara David Emma Felix Grace Henry Iris Jonas Karen Louis Maria Nora "
                "Oscar Paula".split(),
        "city": "Oslo Paris Madrid Vienna Lisbon Prague Dublin Athens Warsaw Boston Chicago "
                "Toronto Sydney Cairo Lima Tokyo".split(),
        "things": "lamp/lamps chair/chairs box/boxes table/tables bottle/bottles clock/clocks "
                  "bag/bags cup/cups brush/brushes knife/knives carpet/carpets pencil/pencils "
                  "battery/batteries ladder/ladders basket/baskets dish/dishes".split(),
        "colour": "red green black yellow brown orange".split(),
    },
    "validation": {
        "name": "Alice Peter Sofia Martin Helen Victor Julia Simon Laura Thomas Rachel "
                "Adam".split(),
        "city": "Rome Berlin London Munich Geneva Milan Glasgow Dallas Denver Miami Delhi "
                "Moscow".split(),
        "things": "mirror/mirrors glass/glasses shirt/shirts hammer/hammers pillow/pillows "
                  "shelf/shelves candle/candles book/books plate/plates bench/benches "
                  "toy/toys blanket/blankets".split(),
        "colour": "blue white grey purple pink silver".split(),
    },
}
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# fmt: on


def order_rows(split: str) -> list[dict[str, str]]:
    """{"instruction", "answer"} of each order of "train" or "validation"; no two are the same.

    >>> order_rows("train")[0]["instruction"]
    'Book this order. Iris wants three orange clocks sent to Prague by Saturday.'
    >>> len(order_rows("validation"))
    128
    """
    rng = random.Random(f"orders {split}")
    rows: dict[str, str] = {}
    while len(rows) < SIZES[split]:
        template = TEMPLATES[split][len(rows) % len(TEMPLATES[split])]
        words = {slot: rng.choice(some) for slot, some in WORDS[split].items()}
        n, day = rng.choice(NUMBERS), rng.choice(DAYS)
        one, words["things"] = words["things"].split("/")
        sentence = template.format(n=n, day=day, **words)
        sentence = sentence[0].upper() + sentence[1:]
        what = f"{NUMBERS.index(n) + 2} {one} {words['colour']}"
        answer = f"{words['city']} | {what} | {day[:3].upper()} | {words['name']}"
        rows[f"Book this order. {sentence}"] = answer
    return [{"instruction": order, "answer": line} for order, line in rows.items()]
