"""The command line: one run, one notebook as an experiment, or a grid of them.

    python -m drlora_ref.experiments run runs/mine -p task cola -p method lora -p seed 1
    python -m drlora_ref.experiments notebook notebooks/09_a_real_run.ipynb runs/mine \\
        -f notebooks/settings/glue_laptop.yaml -p task cola -p seed 1
    python -m drlora_ref.experiments grid notebooks/grids/smoke_cola.yaml --workers 2
    python -m drlora_ref.experiments gpu --minutes 60

A run's record ends up in the folder, here runs/mine; beside it the executed notebook, its figures
and run.log, which holds what its cells printed.
On several devices: accelerate launch -m drlora_ref.experiments run ...
"""

import argparse
import os
import re
import sys
from dataclasses import fields
from typing import Any, NoReturn

from drlora_ref.experiments.given import check_kind, check_known, literal, read_yaml, screen
from drlora_ref.experiments.grids import NotebookError
from drlora_ref.experiments.run.termination import INTERRUPTED, TERMINATED, Terminated, heard

PARTS = ["check", "benchmark", "queue"]  # of the command gpu, in this order

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


class _Parser(argparse.ArgumentParser):
    """argparse's, which complains in one line; a value may begin with a minus, as -1e-3 does."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-(inf|nan)$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        if "expected 2 arguments" in message:
            message += ", as in -p seed 1"
        self.exit(2, f"{self.prog}: {screen(message)}; --help says more\n")


def _parser() -> argparse.ArgumentParser:
    from drlora_ref.experiments.run.settings import describe

    parser = _Parser(prog="python -m drlora_ref.experiments")
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
    gpu = commands.add_parser("gpu", help="all for a GPU: check, measure, work through the queue")
    gpu.add_argument("part", nargs="?", choices=[*PARTS, "pack"], help="one part only")
    gpu.add_argument("out", nargs="?", default="", help="folder of results (pack: of the pieces)")
    gpu.add_argument("--minutes", type=literal, default=30, help="for the queue")
    gpu.add_argument("--queue", default="notebooks/grids/queue.yaml", help="a file like this one")
    gpu.add_argument("--model", default="", help="in place of roberta-base, else mpnet-base")
    gpu.add_argument("--data-dir", default="", help="a folder in the original format")
    gpu.add_argument("--dry-run", action="store_true", help="say what is left, and what it takes")
    gpu.set_defaults(do=_gpu)
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


def _gpu(given: argparse.Namespace) -> int:
    from drlora_ref.experiments import gpu

    if given.part == "pack":
        from drlora_ref.experiments.gpu.pack import pack

        pack(given.out or ".gpu", given.model, given.data_dir)
        return 0
    parts = [given.part] if given.part else PARTS
    if "queue" in parts:
        check_kind("minutes", given.minutes, default=30.0)
        from drlora_ref.experiments.gpu.queue import check_minutes

        if not given.dry_run:
            check_minutes(given.minutes)
    if not gpu.has_gpu():
        print(gpu.NO_GPU.format(" ".join(["gpu", *([given.part] if given.part else [])])))
        return 0 if parts == ["check"] else 1
    return _on_gpu(given, parts)


def _on_gpu(given: argparse.Namespace, parts: list[str]) -> int:
    from pathlib import Path

    from drlora_ref.experiments.gpu import benchmark, check, queue

    out = Path(given.out or "results/gpu")
    if "check" in parts and check.check():
        return _complain(
            "failed", "the checks above, so nothing else was done; `gpu queue` does it all the same"
        )
    if "benchmark" in parts:
        name = queue.choose_encoder(given.model)
        print(benchmark.table(benchmark.benchmark(out, name, data_dir=given.data_dir)))
    if "queue" not in parts:
        return 0
    places = given.queue, out, given.minutes, given.model, given.data_dir
    return queue.work(*places, dry_run=given.dry_run)


def _complain(kind: str, what: object, status: int = 1) -> int:
    if _is_main_process():
        print(f"{kind}: {screen(what)}", file=sys.stderr)
    return status


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # as accelerate launch tells its processes


if __name__ == "__main__":
    sys.exit(main())
