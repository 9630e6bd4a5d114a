"""Run a notebook as an experiment: papermill, with its parameters checked first.

papermill and Jupyter take three seconds to import, so who may not need this file imports it late.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from drlora_ref.experiments.given import check_kind, check_known, literal, place, screen
from drlora_ref.experiments.grids import NotebookError, Value
from drlora_ref.experiments.run.checkpoints import CHECKPOINT
from drlora_ref.experiments.run.records import (
    FINISHES,
    LOG,
    NOTEBOOK,
    Pending,
    check_output_dir,
    output_place,
    whole_file,
)
from drlora_ref.experiments.run.termination import Hearing

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it logs, it also raises


def run_notebook(
    notebook: str | Path, output_dir: str | Path, parameters: dict[str, Value]
) -> Path:
    """Execute a notebook with these parameters; returns the executed copy in output_dir.

    What the cells print appears here as they print it, and is kept in output_dir/run.log; a run
    that goes on from a checkpoint adds to that file. Killed after the notebook has written its
    record, the same call finishes the notebook, and keeps that record.
    Raises, before anything runs or is written, what check_parameters raises, and FileExistsError
    (output_dir holds a record, and `overwrite` is not among the parameters; or where the copy is to
    be is the notebook itself, or something that this function has not written). NotebookError, if a
    cell fails or the kernel dies, and Terminated after SIGTERM, come after the partly executed copy
    is saved.
    """
    if "output_dir" in parameters:
        raise ValueError("output_dir is the second argument, not a parameter")
    notebook, folder = place(notebook), output_place(output_dir)
    known = check_parameters(notebook, parameters)
    overwrite, executed = bool(parameters.get("overwrite")), folder / notebook.name
    _check_free(executed, notebook)
    asked = [notebook.name, {k: v for k, v in parameters.items() if k != "overwrite"}]
    if "output_dir" in known:
        parameters = {**parameters, "output_dir": str(folder)}
    pending = Pending(folder)
    finishes = pending.given() == asked
    check_output_dir(folder, overwrite or finishes)
    if not finishes:
        pending.begin(asked)
    done = "its record is there, the rest is done again" if finishes else "starts"
    print(f"{notebook}: {done}; what it prints is kept in {folder / LOG}", flush=True)
    variables = {NOTEBOOK: folder} | ({FINISHES: folder} if finishes else {})
    with (
        open(folder / LOG, "w" if overwrite and not finishes else "a", encoding="utf-8") as log,
        _in_environment({name: str(path.resolve()) for name, path in variables.items()}),
    ):
        try:
            _execute(notebook, executed, parameters, log)
        except BaseException:
            if pending.given() is None:
                pending.end()
            raise
    if pending.given():
        (folder / CHECKPOINT).unlink(missing_ok=True)
    pending.end()
    return executed


def _check_free(executed: Path, notebook: Path) -> None:
    """Raise FileExistsError unless nothing is there, or what an earlier call has written."""
    if not os.path.lexists(executed):
        return
    if executed.exists() and executed.samefile(notebook):
        raise FileExistsError(f"{executed} is the notebook itself: take another output_dir")
    with suppress(Exception):  # whatever cannot be read is not ours
        if "papermill" in nbformat.read(executed, 4).metadata and not executed.is_symlink():
            return
    raise FileExistsError(f"{executed} was not written by this command: move it away first")


@contextmanager
def _in_environment(variables: dict[str, str]) -> Iterator[None]:
    """The kernel that is started within inherits these."""
    before = {name: os.environ.get(name) for name in (NOTEBOOK, FINISHES)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _execute(notebook: Path, executed: Path, given: dict[str, Value], log: TextIO) -> None:
    # The kernel talks over sockets that are files: nobody on the network can listen, and Jupyter
    # has nothing to warn of. They need a short path, so they cannot be in the output folder. The
    # copy is written beside them until it is whole.
    with tempfile.TemporaryDirectory(prefix="drlora-") as folder:
        connection = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        unfinished = Path(folder, "unfinished.ipynb")
        try:
            _heeding_signals(
                folder,
                input_path=_literally(notebook),
                output_path=_literally(unfinished),
                parameters=given,
                kernel_name="python3",
                kernel_manager_class=ThisPython,
                config=Config(KernelManager=connection),
                progress_bar=False,  # it would run into the lines that the cells print
                stdout_file=Tee(sys.stdout, log),
                stderr_file=Tee(sys.stderr, log),
            )
        except PapermillExecutionError as error:
            raise NotebookError(error.ename, error.evalue) from error
        except DeadKernelError as error:
            raise NotebookError("DeadKernelError", str(error)) from error
        finally:
            if unfinished.exists():
                _keep(unfinished, executed, given)


def _literally(path: Path) -> str:
    """papermill fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _heeding_signals(folder: str, **given: object) -> None:
    """papermill.execute_notebook, in a thread: so the signals are for this one to answer.

    SIGTERM goes on to the kernel, where a run saves its checkpoint; Ctrl-C ends the kernel.
    """
    with ThreadPoolExecutor(1) as pool, Hearing() as hearing:
        future, sent = pool.submit(papermill.execute_notebook, **given), 0
        try:
            while not wait([future], timeout=0.2).done:
                if hearing.told and not sent:
                    sent = _tell_kernel(folder, signal.SIGTERM)
        except BaseException:
            while not wait([future], timeout=0.2).done:  # the kernel may just be starting
                _tell_kernel(folder, signal.SIGKILL)
            raise
        if hearing.told and (problem := future.exception()):
            saved = problem.evalue if isinstance(problem, PapermillExecutionError) else ""
            hearing.answer(saved or "SIGTERM: there was no run whose checkpoint could be saved")
        future.result()


def _tell_kernel(folder: str, number: int) -> int:
    """Send a signal to the kernel whose sockets are in the folder, if there is one already."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any(folder in word for word in process.cmdline()):
                process.send_signal(number)
                return 1
    return 0


def _keep(unfinished: Path, executed: Path, given: dict[str, Value]) -> None:
    """Write the executed copy, with the last names in place of absolute paths."""
    book = nbformat.read(unfinished, 4)
    book.metadata.papermill.update(input_path=executed.name, output_path=executed.name)
    text = nbformat.writes(book)
    paths = [word for word in given.values() if isinstance(word, str) and Path(word).is_absolute()]
    for path in sorted(paths, key=len, reverse=True):
        # As it stands in an output, and as papermill writes it into the cell of parameters.
        for spelt in (path, path.encode("unicode_escape").decode()):
            both = (json.dumps(word, ensure_ascii=False)[1:-1] for word in (spelt, Path(path).name))
            text = text.replace(*both)
    with whole_file(executed, overwrite=True) as file:
        file.write(text.encode())


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever is installed as `python3` elsewhere."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """What to start, where the name of the kernel would have decided it."""
        # A kernel that is interrupted on its way out would log that as an error.
        return KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]))


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
    if not place(notebook).is_file():
        raise FileNotFoundError(f"{notebook}: no such notebook")
    try:
        known = papermill.inspect_notebook(_literally(place(notebook)))
    except Exception as error:  # whatever a file may hold that is none
        reason = f"{type(error).__name__}: {' '.join(screen(error).split())}"
        raise ValueError(f"{notebook} is no notebook that can be run ({reason})") from None
    for parameters in sets:
        check_known(f"{Path(notebook).name} has no parameter", parameters, known)
        for name, value in parameters.items():
            check_kind(name, value, default=literal(known[name]["default"]))
    return set(known)
