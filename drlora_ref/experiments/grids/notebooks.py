"""Run a notebook as an experiment: papermill, with its parameters checked first."""

import sys
from pathlib import Path

import papermill

from drlora_ref.experiments.given import check_kind, check_known, literal
from drlora_ref.experiments.run.records import check_output_dir


def run_notebook(notebook: str | Path, output_dir: str | Path, parameters: dict) -> Path:
    """Execute a notebook with these parameters; returns the executed copy in output_dir.

    Raises, before anything runs or is written, what check_parameters raises, and FileExistsError
    (output_dir holds a record, and `overwrite` is not among the parameters). papermill's own
    PapermillExecutionError, if a cell fails, comes after the partly executed copy is saved.
    """
    if "output_dir" in parameters:
        raise ValueError("output_dir is the second argument, not a parameter")
    check_parameters(notebook, parameters)
    folder = check_output_dir(output_dir, overwrite=bool(parameters.get("overwrite")))
    executed = folder / Path(notebook).name
    papermill.execute_notebook(
        str(notebook),
        str(executed),
        {**parameters, "output_dir": str(output_dir)},
        kernel_name="python3",
        progress_bar=sys.stderr.isatty(),
    )
    return executed


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
