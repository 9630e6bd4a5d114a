"""Claims of the notebooks that are observed, not proven: they hold with the numbers in them."""


def observed(claim: str, holds: object) -> None:
    """Print whether a claim holds with the parameters that the notebook was given.

    What must hold with any parameters is an assert. What was only seen goes through here, so that a
    notebook with other parameters says which of its claims they change, and goes on. The tests
    compare these lines with those of the committed notebook.

    >>> observed("one half is less than two thirds", 1 / 2 < 2 / 3)
    seen: one half is less than two thirds
    >>> observed("every number is even", all(n % 2 == 0 for n in (2, 3)))
    not seen with these parameters: every number is even
    """
    print(f"{'seen' if holds else 'not seen with these parameters'}: {claim}")
