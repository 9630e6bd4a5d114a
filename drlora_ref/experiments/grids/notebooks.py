"""Run a notebook as an experiment: papermill, with its parameters checked first."""

import ast
import difflib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from traitlets.config import Config

from drlora_ref.experiments.run.records import check_output_dir

Value = str | int | float | bool  # of a parameter
LOG = "run.log"  # beside the executed notebook: what its cells printed


def run_notebook(
    notebook: str | Path, output_dir: str | Path, parameters: dict[str, Value]
) -> Path:
    """Execute a notebook with these parameters; returns the executed copy in output_dir.

    What the cells print appears here as they print it, and is kept in output_dir/run.log; a run
    that goes on from a checkpoint adds to that file.
    Raises, before anything runs or is written, what check_parameters raises, and FileExistsError
    (output_dir holds a record, and `overwrite` is not among the parameters). papermill's own
    PapermillExecutionError, if a cell fails, comes after the partly executed copy is saved.
    """
    if "output_dir" in parameters:
        raise ValueError("output_dir is the second argument, not a parameter")
    check_parameters(notebook, parameters)
    overwrite = bool(parameters.get("overwrite"))
    folder = check_output_dir(output_dir, overwrite)
    executed = folder / Path(notebook).name
    given = {**parameters, "output_dir": str(output_dir)}
    print(f"{notebook} starts; what it prints is kept in {folder / LOG}", flush=True)
    with open(folder / LOG, "w" if overwrite else "a", encoding="utf-8") as log:
        _execute(notebook, executed, given, log)
    return executed


def _execute(
    notebook: str | Path, executed: Path, parameters: dict[str, Value], log: TextIO
) -> None:
    # The kernel talks over sockets that are files: nobody on the network can listen, and Jupyter
    # has nothing to warn of. They need a short path, so they cannot be in the output folder.
    with tempfile.TemporaryDirectory(prefix="drlora-") as sockets:
        config = Config(
            KernelManager={"transport": "ipc", "connection_file": f"{sockets}/kernel.json"}
        )
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters,
            kernel_name="python3",
            kernel_manager_class=ThisPython,
            config=config,
            progress_bar=False,  # it would run into the lines that the cells print
            stdout_file=Tee(sys.stdout, log),
            stderr_file=Tee(sys.stderr, log),
        )


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever is installed as `python3` elsewhere."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """What to start, where the name of the kernel would have decided it."""
        return KernelSpec(**get_kernel_dict())


class Tee:
    """A stream that writes to several."""

    def __init__(self, *streams: TextIO):
        self.streams = streams

    def write(self, text: str) -> None:
        """Write to each of them."""
        for stream in self.streams:
            stream.write(text)

    def flush(self) -> None:
        """Flush each of them."""
        for stream in self.streams:
            stream.flush()


def check_parameters(notebook: str | Path, *sets: dict) -> set[str]:
    """Check that a notebook can be given these sets of parameters; returns the names of all it has.

    Raises FileNotFoundError (no such notebook) and ValueError: a parameter that it does not
    declare, of which papermill would only warn, or a value that is a word where the notebook's own
    is none, or the other way round.
    """
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"{notebook}: no such notebook")
    known = papermill.inspect_notebook(str(notebook))
    for parameters in sets:
        check_known(f"{Path(notebook).name} has no parameter", parameters, known)
        for name, value in parameters.items():
            default = literal(known[name]["default"])
            if isinstance(value, str) != isinstance(default, str):
                number = isinstance(value, str) and isinstance(literal(value), float)
                hint = " (YAML reads 1e-3 as a word, and 1.0e-3 as a number)" if number else ""
                raise ValueError(
                    f"{name} = {value!r}: must be like {default!r}, which it is by default{hint}"
                )
    return set(known)


def check_known(problem: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first name that is not known, with the nearest ones or all.

    >>> check_known("no parameter", ["sed"], ["seed", "task"])
    Traceback (most recent call last):
    ValueError: no parameter 'sed': seed?
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known) or sorted(known)
            raise ValueError(f"{problem} {name!r}: {', '.join(near)}?")


def read_yaml(file: str | Path) -> dict:
    """The names and values in a YAML file; FileNotFoundError, or ValueError if it holds no such.

    >>> read_yaml("none.yaml")
    Traceback (most recent call last):
    FileNotFoundError: none.yaml: no such file
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold lines of `name: value`")
    return found


def literal(text: str):
    """The value that a word on the command line, or in a notebook's cell, stands for.

    >>> literal("1e-3"), literal("true"), literal("cola"), literal("'cola'"), literal("")
    (0.001, True, 'cola', 'cola', '')
    """
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text
