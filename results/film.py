"""The pictures that show the method first: the film of one run, a still of it, and the drawing.

    python results/film.py

reads the record and the events in results/film (film_events was 20) and writes film.gif, film.png,
schematic_light.svg and schematic_dark.svg beside them. Half a minute on one core.
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from drlora_ref import plotting
from drlora_ref.events import Events
from drlora_ref.experiments.run.records import read_events, read_record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.schedule import BudgetSchedule

FOLDER = Path(__file__).parent / "film"


def of_run(folder: Path) -> tuple[Events, BudgetSchedule]:
    """What plotting.film takes, of the run in a folder."""
    record, events = read_record(folder), read_events(folder)
    if events is None:
        raise ValueError(f"{folder} has no events: run with film_events above 0")
    return events, Settings(**record["parameters"]).schedule(record["total_steps"])


def main() -> None:
    """Write all four."""
    matplotlib.use("Agg")
    plt.rcParams["svg.hashsalt"] = "drlora_ref"  # the same file each time
    film = plotting.film(*of_run(FOLDER))
    film.save(FOLDER / "film.gif", writer="pillow", fps=2)
    film._fig.savefig(FOLDER / "film.png")  # as the last frame has left it
    for dark, name in ((False, "light"), (True, "dark")):
        drawing = plotting.plot_schematic(dark)
        drawing.savefig(FOLDER / f"schematic_{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
