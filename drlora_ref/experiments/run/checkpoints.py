"""Everything a run needs to go on after it was killed, in one file that is whole or not there."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drlora_ref.experiments.run.records import UNFINISHED, whole_file


class Checkpoint:
    """The file checkpoint.pt in a run's folder.

    `configuration` is what the run was started with (parameters; hashes of data, model and code;
    device and processes): a checkpoint of another one is refused, not adapted.
    """

    def __init__(self, folder: str | Path, configuration: dict[str, Any]):
        self.path, self.configuration = Path(folder) / "checkpoint.pt", configuration

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; one that is there stays until the new one is on the disk.

        Raises OSError, saying which checkpoint is left, if the new one cannot be written.
        """
        try:
            with whole_file(self.path, overwrite=True) as file:
                torch.save({"configuration": self.configuration, "state": state}, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            left = "the one before it is whole" if self.path.exists() else "there is none before it"
            raise OSError(
                f"{self.path} could not be written ({error}); {left}: make room, then start the "
                "same run again"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """The state that was saved, its tensors on the CPU, or None if there is none.

        Raises ValueError for a damaged file, and for one of another configuration, naming how the
        two differ. Files that a killed run left half-written are removed.
        """
        for leftover in self.path.parent.glob(f"{UNFINISHED}*"):
            leftover.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            there, state = saved["configuration"], saved["state"]
        except Exception as error:  # a cut or altered file fails in as many ways as there are bytes
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}): remove it and the run starts "
                "from its first step"
            ) from error
        names = sorted(there.keys() | self.configuration.keys())
        differ = [n for n in names if there.get(n) != self.configuration.get(n)]
        if differ:
            listed = ", ".join(f"{n}: {there.get(n)!r}" for n in differ)
            here = ", ".join(f"{n}: {self.configuration.get(n)!r}" for n in differ)
            raise ValueError(
                f"{self.path} is of another run ({listed}; now {here}): take another output_dir, "
                "or remove it and start over"
            )
        return state

    def remove(self) -> None:
        """Delete the file: the run has its record."""
        self.path.unlink(missing_ok=True)


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
