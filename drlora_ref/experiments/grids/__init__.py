"""Many runs: their file, their processes, and which of them are still to do."""

import sys

Value = str | int | float | bool  # of a parameter


class NotebookError(Exception):
    """A cell of a notebook failed, or its kernel died: `kind` is the error's name there."""

    def __init__(self, kind: str, what: str):
        super().__init__(f"{kind}: {what}")
        self.kind, self.what = kind, what


# notebooks.py imports nbformat, that imports jsonschema, and this one would spend two seconds on a
# grammar of web addresses where that package is installed. No schema of a notebook asks for it.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # so importing it fails
