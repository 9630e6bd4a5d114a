"""Figures that say something: what is drawn is what the record, the mask or the tensor holds."""

import io
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image, ImageSequence

from drlora_ref import BudgetSchedule, plotting
from drlora_ref.events import Events
from drlora_ref.planted import recover

matplotlib.use("Agg")
SCHEDULE = BudgetSchedule(init_r=4, target_r=2, total_steps=60)
pytestmark = pytest.mark.filterwarnings("ignore:Animation was deleted")
FILM = Path(__file__).parents[1] / "results" / "film"
LAYERS = "encoder.layer.{}.attention.self.{}"


@pytest.fixture(autouse=True)
def _closed():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def planted_events():
    events = Events()
    recover([0, 1, 3], dim=6, init_r=4, target_r=2, total_steps=60, events=events)
    return events


def renamed(events: Events, names: list[str]) -> Events:
    return Events(names, events.steps, events.scores, events.masks)


def shown(colours) -> list[str]:
    return [matplotlib.colors.to_hex(colour) for colour in colours]


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2"],
        [LAYERS.format(0, "query"), LAYERS.format(1, "query"), LAYERS.format(1, "key")],
    ],
    ids=["maps", "layers"],
)
def test_each_frame_shows_its_event(names, planted_events):
    events = renamed(planted_events, names)
    film = plotting.film(events, SCHEDULE)
    left, right, below = film._fig.axes[:3]
    (bars,), (cells,) = left.collections, right.collections
    for frame, (step, scores, mask) in enumerate(
        zip(events.steps, events.scores, events.masks, strict=True)
    ):
        film._func(frame)
        heights = [path.vertices[1][1] for path in bars.get_paths()]
        assert heights == pytest.approx(scores.sort(descending=True).values.tolist())
        gone = shown(cells.get_facecolor())
        assert [colour != plotting.GONE for colour in gone] == mask.tolist()
        queue = shown(bars.get_facecolor())
        assert queue.count(plotting.GONE) == len(mask) - int(mask.sum())
        assert left.lines[0].get_xdata() == [int(mask.sum())] * 2  # the cut
        assert below.lines[1].get_xdata() == [step]
        assert str(step) in film._fig.get_suptitle()


def test_the_last_frame_stays_and_the_film_can_be_saved(planted_events, tmp_path):
    e = planted_events
    two = Events(e.names, e.steps[-2:], e.scores[-2:], e.masks[-2:])
    with matplotlib.rc_context({"savefig.dpi": "figure"}):  # not that of a notebook
        film = plotting.film(two, SCHEDULE, title="mine")
        film.save(tmp_path / "film.gif", writer="pillow", fps=2)
    with Image.open(tmp_path / "film.gif") as gif:
        frames = list(ImageSequence.Iterator(gif))
        assert len(frames) == 2 and gif.size == (800, 500)
        assert gif.info["duration"] == 3000  # six times half a second


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(init_r=4, target_r=1, total_steps=60), "but this schedule keeps"),
        (dict(init_r=4, target_r=2, total_steps=80), "but this schedule has no event there"),
    ],
)
def test_a_film_of_another_schedule_is_refused(given, message, planted_events):
    with pytest.raises(ValueError, match=message):
        plotting.film(planted_events, BudgetSchedule(**given))


def test_the_committed_film_is_of_the_committed_record():
    from drlora_ref.experiments.run.records import read_events, read_record
    from drlora_ref.experiments.run.settings import Settings

    record, events = read_record(FILM), read_events(FILM)
    schedule = Settings(**record["parameters"]).schedule(record["total_steps"])
    plotting.film(events, schedule)  # refuses events of another schedule
    with Image.open(FILM / "film.gif") as gif:
        assert gif.n_frames == len(events.steps) == 20 and gif.size == (800, 500)
    assert (FILM / "film.gif").stat().st_size < 1_500_000
    ranks = events.masks[-1].view(len(events.names), -1).sum(dim=1).tolist()
    assert dict(zip(events.names, ranks, strict=True)) == record["rank_pattern"]
    assert len(set(ranks)) > 2  # unequal, which is what the film is to show


def test_the_drawing_keeps_as_many_as_its_budget_and_is_the_same_twice():
    matplotlib.rcParams["svg.hashsalt"] = "test"
    files = []
    for _ in range(2):
        figure = plotting.plot_schematic(dark=True)
        figure.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
        files.append(buffer.getvalue())
    assert files[0] == files[1]
    ranks = [t.get_text() for t in figure.axes[0].texts if t.get_text().startswith("rank")]
    assert sum(int(text.split()[1]) for text in ranks) == plotting.DRAWN_BUDGET


def test_outer_products_stand_beside_their_column_and_row():
    A, B, c = torch.randn(2, 3), torch.randn(4, 2), torch.tensor([2.0, -1.0])
    first, second, total, _bar = plotting.plot_outer_products(A, B, c).axes
    for i, ax in enumerate((first, second)):
        table, column, row = (image.get_array() for image in ax.images)
        assert torch.allclose(torch.tensor(table.data), c[i] * torch.outer(B[:, i], A[i]))
        assert column.shape == (4, 1) and row.shape == (1, 3)
        assert f"_{i}" in ax.get_title()
        assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2", "3"]
    assert torch.allclose(torch.tensor(total.images[0].get_array().data), B @ torch.diag(c) @ A)


def test_a_learning_curve_smooths_what_is_finite():
    losses = [1.0, 3.0, None, 1.0]
    record = {
        "loss_curve": losses,
        "evaluations": [{"step": 4, "metric": 0.5}],
        "metric_name": "f1",
        "parameters": {"method": "lora", "task": "cola"},
    }
    axes = plotting.plot_learning_curve(record)
    line = axes.lines[1].get_ydata()
    assert line[0] == pytest.approx(1.0)  # not pulled to zero
    assert line[1] == pytest.approx((0.95 * 1 + 3) / 1.95) and line[2] == line[1]
    assert axes.get_title() == "lora on cola" and axes.get_legend() is not None
    assert plotting.plot_learning_curve(record, title="mine").get_title() == "mine"


def test_a_pruning_map_parts_its_layers():
    masks = {t: torch.ones(6, dtype=torch.bool) for t in range(10, 400, 10)}
    axes = plotting.plot_pruning_map(masks, layers=2)
    assert [t.get_text() for t in axes.texts] == ["layer 0", "layer 1"] and len(axes.lines) == 1
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"] * 2
    assert len(axes.get_xticks()) <= 25


def test_ranks_over_time_are_those_of_the_masks(planted_events):
    names = [LAYERS.format(0, "query"), LAYERS.format(1, "query"), LAYERS.format(1, "key")]
    axes = plotting.plot_ranks(renamed(planted_events, names))
    thick = {line.get_label(): line.get_ydata() for line in axes.lines if line.get_linewidth() > 1}
    assert list(thick) == ["Wq", "Wk"] and len(axes.lines) == 3 + 2
    last = planted_events.masks[-1].view(3, 4).sum(dim=1).tolist()
    assert (thick["Wq"][-1], thick["Wk"][-1]) == (sum(last[:2]) / 2, last[2])
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() > 1] == [4, 4]


def test_a_layer_lights_what_learns_and_knows_its_tensors():
    figure = plotting.plot_layer({"step 1": {"c"}, "step 2": {"A", "B", "c"}})
    said = [[t.get_text() for t in ax.texts].count("gradient") for ax in figure.axes]
    assert said == [1, 3]
    with pytest.raises(ValueError, match=r"\['W'\] are no tensors of a layer"):
        plotting.plot_layer({"step 1": {"W"}})
