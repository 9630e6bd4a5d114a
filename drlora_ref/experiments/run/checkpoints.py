"""Everything a run needs to go on after it was killed, in one file that is whole or not there."""

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drlora_ref.experiments.given import screen, shown
from drlora_ref.experiments.run.records import CHECKPOINT, whole_file


class Checkpoint:
    """The file checkpoint.pt in a run's folder.

    `configuration` is what the run was started with (parameters; hashes of data, model and code;
    device and processes): a checkpoint of another one is refused, not adapted. `runs` is kept
    beside it and not compared: of a pack of replicas, {key: parameters} of each.
    """

    def __init__(
        self,
        folder: str | Path,
        configuration: dict[str, Any],
        runs: dict[str, dict] | None = None,
    ):
        self.path, self.configuration = Path(folder) / CHECKPOINT, configuration
        self.runs = runs or {}

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; one that is there stays until the new one is on the disk.

        Raises OSError, saying which checkpoint is left, if the new one cannot be written.
        """
        try:
            with whole_file(self.path, overwrite=True) as file:
                torch.save(
                    {"configuration": self.configuration, "runs": self.runs, "state": state}, file
                )
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            if isinstance(error.__context__, KeyboardInterrupt):  # and Ctrl-C as well
                raise error.__context__ from None
            left = "the one before it is whole" if self.path.exists() else "there is none before it"
            raise OSError(
                f"{self.path} could not be written ({error}); {left}: make room, then start the "
                "same run again"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """The state that was saved, its tensors on the CPU, or None if there is none.

        Raises ValueError for a damaged file, and for one of another configuration, naming how the
        two differ.
        """
        if not self.path.exists():
            return None
        try:
            # torch writes a checksum beside every tensor and does not look at it.
            with zipfile.ZipFile(self.path) as archive:
                if bad := archive.testzip():
                    raise zipfile.BadZipFile(f"bits of {bad} have changed")
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            there, state = dict(saved["configuration"]), dict(saved["state"])
        except Exception as error:  # a cut or altered file fails in as many ways as there are bytes
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}): remove it and the run starts "
                "from its first step"
            ) from error
        names = sorted(there.keys() | self.configuration.keys())
        differ = [n for n in names if there.get(n) != self.configuration.get(n)]
        if differ:
            listed = ", ".join(f"{n}: {shown(there.get(n))}" for n in differ)
            here = ", ".join(f"{n}: {shown(self.configuration.get(n))}" for n in differ)
            raise ValueError(
                f"{self.path} is of another run ({screen(f'{listed}; now {here}')}): take another "
                "output_dir, or remove it and start over"
            )
        return state

    def remove(self) -> None:
        """Delete the file: the run has its record."""
        self.path.unlink(missing_ok=True)


def runs_in(path: str | Path) -> dict[str, dict]:
    """{key: parameters} of the replicas whose checkpoint this is; {} for any other file."""
    try:  # mapped: none of its tensors is read
        return dict(torch.load(path, weights_only=True, mmap=True)["runs"])
    except Exception:  # damaged, or of another format: load() is what says so
        return {}


def random_state() -> dict[str, Any]:
    """The states of this process's generators, as torch.load(weights_only=True) reads them."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what random_state() gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    keys = np.array(keys, dtype=np.uint32)
    np.random.set_state((name, keys, *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
