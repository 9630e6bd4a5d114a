"""What the notebooks say about themselves: claims that are only observed, hints, versions."""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = "torch transformers peft datasets numpy scipy pandas matplotlib".split()


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


@contextmanager
def hint(words: str) -> Iterator[None]:
    """Add a hint to every assert inside that fails: for the check of an exercise.

    >>> with hint("count the matrices first"):
    ...     assert 6 * 12 == 75
    Traceback (most recent call last):
    AssertionError: Hint: count the matrices first
    """
    try:
        yield
    except AssertionError as error:
        said = f" ({error})" if str(error) else ""
        error.args = (f"Hint: {words}{said}",)
        raise


def versions() -> str:
    """Python, this package, and those of PACKAGES that are imported by now, with their versions.

    >>> versions().startswith("Python 3") and "drlora-ref" in versions()
    True
    """
    imported = ["drlora-ref", *(name for name in PACKAGES if name in sys.modules)]
    of_each = [f"{name} {importlib.metadata.version(name)}" for name in imported]
    return ", ".join([f"Python {platform.python_version()}", *of_each])
