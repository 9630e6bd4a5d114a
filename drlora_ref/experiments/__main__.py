"""Run a notebook as an experiment: papermill, with its parameters checked first.

    python -m drlora_ref.experiments notebook notebooks/09_a_real_run.ipynb runs/mine \\
        -f notebooks/settings/glue_laptop.yaml -p task cola -p seed 1

The executed notebook, the record and the figures end up in the folder, here runs/mine.
"""

import argparse
import ast
import difflib
import sys
from pathlib import Path

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from drlora_ref.experiments.records import check_output_dir


def run_notebook(notebook: str | Path, output_dir: str | Path, parameters: dict) -> Path:
    """Execute a notebook with these parameters; returns the executed copy in output_dir.

    Raises, before anything runs or is written: FileNotFoundError (no such notebook), ValueError (a
    parameter that it does not declare: papermill would only warn), FileExistsError (output_dir
    holds a record, and `overwrite` is not among the parameters). papermill's own
    PapermillExecutionError, if a cell fails, comes after the partly executed copy is saved.
    """
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"{notebook}: no such notebook")
    known = papermill.inspect_notebook(str(notebook))
    if "output_dir" in parameters:
        raise ValueError("output_dir is the second argument, not a parameter")
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known) or sorted(known)
            raise ValueError(f"{Path(notebook).name} has no parameter {name!r}: {', '.join(near)}?")
        default = literal(known[name]["default"])
        # YAML reads 1e-3 as a word (it wants 1.0e-3): say so here, not in the middle of the run.
        if isinstance(value, str) != isinstance(default, str):
            raise ValueError(
                f"{name} = {value!r}: must be like {default!r}, which it is by default"
            )
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


def literal(text: str):
    """The value that a word on the command line, or in a notebook's cell, stands for.

    >>> literal("1e-3"), literal("true"), literal("cola"), literal("'cola'"), literal("")
    (0.001, True, 'cola', 'cola', '')
    """
    try:
        return ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m drlora_ref.experiments")
    command = parser.add_subparsers(required=True).add_parser("notebook", help="run a notebook")
    command.add_argument("notebook")
    command.add_argument("output_dir")
    command.add_argument("-f", dest="file", help="parameters from a YAML file")
    command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    given = parser.parse_args(arguments)
    try:
        parameters = yaml.safe_load(Path(given.file).read_text()) if given.file else {}
        parameters |= {name: literal(value) for name, value in given.p}
        executed = run_notebook(given.notebook, given.output_dir, parameters)
    except PapermillExecutionError as error:
        print(f"{error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    except (OSError, ValueError, ImportError, DeadKernelError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"executed notebook, record and figures: {executed.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
