"""Many runs: their file, their processes, and which of them are still to do."""

Value = str | int | float | bool  # of a parameter


class NotebookError(Exception):
    """A cell of a notebook failed, or its kernel died: `kind` is the error's name there."""

    def __init__(self, kind: str, what: str):
        super().__init__(f"{kind}: {what}")
        self.kind, self.what = kind, what
