"""The command line: one run, one notebook as an experiment, or a grid of them.

    python -m drlora_ref.experiments run runs/mine -p task cola -p method lora -p seed 1
    python -m drlora_ref.experiments notebook notebooks/09_a_real_run.ipynb runs/mine \\
        -f notebooks/settings/glue_laptop.yaml -p task cola -p seed 1
    python -m drlora_ref.experiments grid notebooks/grids/smoke_cola.yaml --workers 2

A run's record ends up in the folder, here runs/mine; beside it the executed notebook, its figures
and run.log, which holds what its cells printed.
On several devices: accelerate launch -m drlora_ref.experiments run ...
"""

import argparse
import os
import sys
from dataclasses import fields

from drlora_ref.experiments.given import check_known, literal, read_yaml, screen
from drlora_ref.experiments.grids import NotebookError
from drlora_ref.experiments.run.termination import INTERRUPTED, TERMINATED, Terminated, heard

# What runs is imported where it is used: Ctrl-C meanwhile is one line, too.


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status.

    It is 0; 1 with one line on standard error; INTERRUPTED after Ctrl-C, TERMINATED after SIGTERM.
    """
    try:
        with heard():
            given = _parser().parse_args(arguments)
            return given.do(given)
    except KeyboardInterrupt:
        return _complain(
            "interrupted", "the same command goes on from the last checkpoint", INTERRUPTED
        )
    except Terminated as error:
        return _complain("terminated", error, TERMINATED)
    except NotebookError as error:
        return _complain(error.kind, error.what)
    except (OSError, ValueError, ImportError) as error:
        return _complain(type(error).__name__, error)


def _parser() -> argparse.ArgumentParser:
    from drlora_ref.experiments.run.settings import describe

    parser = argparse.ArgumentParser(prog="python -m drlora_ref.experiments")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser(
        "run",
        help="one run, and its record",
        epilog=f"parameters, with their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(do=_run)
    notebook = commands.add_parser("notebook", help="run a notebook with other parameters")
    notebook.add_argument("notebook")
    notebook.set_defaults(do=_notebook)
    for command in (one, notebook):
        command.add_argument("output_dir")
        command.add_argument("-f", dest="file", help="parameters from a YAML file")
        command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    grid = commands.add_parser("grid", help="many runs, each done once")
    grid.add_argument("file", help="a YAML file as in notebooks/grids")
    grid.add_argument("--out", default="", help="by default runs/ and the file's name")
    grid.add_argument("--workers", type=int, default=1, help="runs at a time")
    grid.add_argument(
        "--replicas", type=literal, default=1, help="runs in one pass; auto: what the memory holds"
    )
    grid.add_argument("--cluster", choices=["local", "slurm"], default="local")
    grid.add_argument("--stale", action="store_true", help="repeat what other code has done")
    grid.add_argument("--dry-run", action="store_true", help="say what there is to do, and stop")
    grid.set_defaults(do=_grid)
    return parser


def _parameters(given: argparse.Namespace) -> dict:
    in_file = read_yaml(given.file) if given.file else {}
    return in_file | {name: literal(value) for name, value in given.p}


def _run(given: argparse.Namespace) -> int:
    from drlora_ref.experiments.run.one_run import run
    from drlora_ref.experiments.run.settings import Settings

    parameters = _parameters(given)
    names = [field.name for field in fields(Settings) if field.name != "output_dir"]
    check_known("a run has no parameter", parameters, names)
    record = run(Settings(**parameters, output_dir=given.output_dir))
    if _is_main_process():
        best = "none" if record["best"] is None else f"{record['best']:.4f}"
        print(f"{record['status']}; best {record['metric_name']}: {best}; in {given.output_dir}")
    return 0


def _notebook(given: argparse.Namespace) -> int:
    from drlora_ref.experiments.grids.notebooks import run_notebook  # three seconds

    executed = run_notebook(given.notebook, given.output_dir, _parameters(given))
    print(f"executed notebook, record and figures: {executed.parent}")
    return 0


def _grid(given: argparse.Namespace) -> int:
    from drlora_ref.experiments.grids.grid import run_grid

    names = ("file", "out", "workers", "cluster", "stale", "dry_run", "replicas")
    return run_grid(**{name: getattr(given, name) for name in names})


def _complain(kind: str, what: object, status: int = 1) -> int:
    if _is_main_process():
        print(f"{kind}: {screen(what)}", file=sys.stderr)
    return status


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # as accelerate launch tells its processes


if __name__ == "__main__":
    sys.exit(main())
