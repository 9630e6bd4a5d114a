"""A notebook's cells run in the tests' own process, where a kernel takes ten seconds to start."""

import contextlib
import linecache
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import nbformat
import torch
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt

from solved import tags


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """What notebooks set for their kernel is set back."""
    dtype, threads, folder = torch.get_default_dtype(), torch.get_num_threads(), os.getcwd()
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_printoptions(profile="default")
            plt.close("all")


def execute(path: Path, given: dict) -> str:
    """Run a notebook's cells with these parameters in this process; returns what they printed.

    It runs in its folder, where `../results` is. Unless a place is given, it writes elsewhere.
    """
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    scope: dict = {"__name__": "__main__"}
    with as_found(), tempfile.TemporaryDirectory() as elsewhere, capture_output() as said:
        matplotlib.use("agg")
        os.chdir(path.parent)
        for i, cell in enumerate(cells):
            name = f"{path.stem}, code cell {i}"
            linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(True), name)
            exec(compile(cell.source, name, "exec"), scope)
            if "parameters" in tags(cell):
                written = {"output_dir", "record_path"} & scope.keys()
                scope |= {name: f"{elsewhere}/{name}" for name in written} | given
            plt.close("all")
    return said.stdout
