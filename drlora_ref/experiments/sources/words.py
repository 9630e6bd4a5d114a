"""The closed vocabulary of the generated data sets, and the sentences that all of them use.

A generated set is tiny and in the format of a real one, so that the same code reads it, trains on
it and evaluates on it without a network. Nothing can be learned about the method from it. The files
themselves are written in tasks/: GLUE's in glue_generated.py, the others beside what reads them.
"""

import random

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas".split()
CITIES = "Paris Rome Oslo Berlin Madrid Vienna Lisbon Prague Dublin Athens".split()
THINGS = "box chair lamp book table bottle coat clock bag cup".split()
COLOURS = "red blue green black white yellow".split()
VERBS = "bought found lost sold painted carried".split()
GOOD, BAD = "good great fine warm lovely".split(), "bad dull poor cold awful".split()
OTHERS = """
    a an the in on at of to and or not is was has does did it he she that this there who where what
    which whose live lives lived city house friend friends film story day year today yesterday one
    two three four five six seven eight nine ten man woman people said says went go because but so
    then with by for from no yes true false . , ? ! ' s new old big small near far very more less
    his her their report reports market opened closed won late early morning evening were are be
    been will left right put take took into out under over boxes _
""".split()


def vocabulary() -> list[str]:
    """Every word that the generated sets use, in a fixed order."""
    lists = (NAMES, CITIES, THINGS, COLOURS, VERBS, GOOD, BAD, OTHERS)
    words = [word for words in lists for word in words]
    return sorted({*words, *(word.capitalize() for word in words)})


def fact(rng: random.Random) -> str:
    """One sentence in which every content word matters."""
    return (
        f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(COLOURS)} {rng.choice(THINGS)} "
        f"in {rng.choice(CITIES)}"
    )


def other_fact(sentence: str, rng: random.Random) -> str:
    """The same sentence about somebody else."""
    first, rest = sentence.split(" ", 1)
    return f"{rng.choice([name for name in NAMES if name != first])} {rest}"
