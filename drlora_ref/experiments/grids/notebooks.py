"""Run a notebook as an experiment: papermill, with its parameters checked first.

papermill and Jupyter take three seconds to import, so who may not need this file imports it late.
"""

import sys
import tempfile
from pathlib import Path
from typing import TextIO

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from drlora_ref.experiments.given import check_kind, check_known, literal
from drlora_ref.experiments.grids import NotebookError, Value
from drlora_ref.experiments.run.records import check_output_dir

LOG = "run.log"  # beside the executed notebook: what its cells printed


def run_notebook(
    notebook: str | Path, output_dir: str | Path, parameters: dict[str, Value]
) -> Path:
    """Execute a notebook with these parameters; returns the executed copy in output_dir.

    What the cells print appears here as they print it, and is kept in output_dir/run.log; a run
    that goes on from a checkpoint adds to that file.
    Raises, before anything runs or is written, what check_parameters raises, and FileExistsError
    (output_dir holds a record, and `overwrite` is not among the parameters). NotebookError, if a
    cell fails or the kernel dies, comes after the partly executed copy is saved.
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
        try:
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
        except PapermillExecutionError as error:
            raise NotebookError(error.ename, error.evalue) from error
        except DeadKernelError as error:
            raise NotebookError("DeadKernelError", str(error)) from error


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
    declare, of which papermill would only warn, or a value of another kind than the notebook's own.
    """
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"{notebook}: no such notebook")
    known = papermill.inspect_notebook(str(notebook))
    for parameters in sets:
        check_known(f"{Path(notebook).name} has no parameter", parameters, known)
        for name, value in parameters.items():
            check_kind(name, value, default=literal(known[name]["default"]))
    return set(known)
