"""What a film is made of: scores and masks at pruning events, kept by a run or by a loop."""

import pytest
import torch
from conftest import layers_of_two_shapes
from tiny_runs import tiny, without_costs

from drlora_ref import BudgetSchedule, RankAllocator
from drlora_ref.events import Events, evenly_spread
from drlora_ref.experiments.replicas.many_runs import can_be_replica, check_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.records import read_events, write_record
from drlora_ref.experiments.run.settings import Settings, run_key


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, one_run.run(tiny(folder, film_events=3))


def test_a_run_keeps_what_its_record_says(whole_run):
    folder, record = whole_run
    events = read_events(folder)
    curve = dict(record["budget_curve"])
    assert len(events.steps) == 3 and set(events.steps) <= curve.keys()
    assert [events.steps[0], events.steps[-1]] == [min(curve), max(curve)]
    assert [int(mask.sum()) for mask in events.masks] == [curve[t] for t in events.steps]
    per_matrix = events.masks[-1].view(len(events.names), -1).sum(dim=1).tolist()
    assert dict(zip(events.names, per_matrix, strict=True)) == record["rank_pattern"]
    for scores, mask in zip(events.scores, events.masks, strict=True):
        assert scores.dtype == torch.float32
        assert mask.all() or scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("dies_after", ["first event", "last event"])
def test_a_run_that_was_killed_leaves_the_same_file(dies_after, whole_run, tmp_path, monkeypatch):
    folder, record = whole_run
    at = read_events(folder).steps[0 if dies_after == "first event" else -1]
    settings = tiny(tmp_path, film_events=3, checkpoint_every=at)
    ready = one_run.set_up(settings)
    allocate = ready.prepared.allocator.step

    def power_cut(step):
        if step == at + 1:
            raise KeyboardInterrupt
        allocate(step)

    with monkeypatch.context() as patch:
        patch.setattr(ready.prepared.allocator, "step", power_cut)
        with pytest.raises(KeyboardInterrupt):
            one_run.train(ready)
    assert not (tmp_path / "events.npz").exists()
    again = one_run.run(settings)
    assert again["events"] == record["events"]
    assert (tmp_path / "events.npz").read_bytes() == (folder / "events.npz").read_bytes()
    assert without_costs(again)["rank_pattern"] == record["rank_pattern"]


def test_events_change_nothing_else_and_belong_to_the_record(whole_run, tmp_path):
    _, record = whole_run
    plain = one_run.run(tiny(tmp_path))
    assert plain["loss_curve"] == record["loss_curve"] and plain["events"] is None
    assert read_events(tmp_path) is None and not (tmp_path / "events.npz").exists()
    write_record(record, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"events.npz is missing: the record"):
        read_events(tmp_path)


def test_a_run_that_diverged_before_its_first_event_keeps_none(tmp_path):
    record = one_run.run(tiny(tmp_path, learning_rate=1e30, film_events=3))
    assert record["status"] == "diverged" and record["events"] is None
    assert not (tmp_path / "events.npz").exists()


def test_who_keeps_events_runs_singly_and_has_scores():
    with pytest.raises(ValueError, match="film_events = 5: a film shows one queue"):
        Settings(film_events=5, uniform=True)
    kept = Settings(film_events=5)
    assert not can_be_replica(kept)
    with pytest.raises(ValueError, match="film_events = 5: replicas keep no events"):
        check_replicas([Settings(), kept])
    for method in ("lora", "adalora", "prune-once", "full"):
        with pytest.raises(ValueError, match=f"film_events = 5: only drlora .* not {method}"):
            Settings(method=method, film_events=5, init_r=3)
    plain = Settings()
    assert run_key(kept, "d", "m") != run_key(plain, "d", "m")
    assert run_key(Settings(film_events=0), "d", "m") == run_key(plain, "d", "m")


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("given", [dict(deltaT=1), dict(tinit=0, tfinal=0), dict(deltaT=1000)])
def test_events_are_spread_from_the_first_to_the_last(most, given):
    schedule = BudgetSchedule(3, 2, 60, **given)
    events = [t for t in range(1, 61) if schedule.prunes_at(t)]
    kept = evenly_spread(schedule, most)
    assert kept == sorted(set(kept)) and set(kept) <= set(events)
    assert len(kept) == min(most, len(events)) and kept[-1] == events[-1]
    assert most == 1 or kept[0] == events[0]


def test_a_loop_of_ones_own_can_keep_them():
    model, events = layers_of_two_shapes(), Events()
    for layer in model:
        layer.lora_c.grad = torch.ones_like(layer.lora_c)
    allocator = RankAllocator(model, BudgetSchedule(3, 1, 4, tinit=1, tfinal=1, deltaT=1))
    for step in range(1, 5):
        allocator.step(step)
        if allocator.schedule.prunes_at(step):
            events.add(step, allocator)
    assert events.steps == [1, 2, 3] and events.names == list(allocator.layers)
    kept = [int(mask.sum()) for mask in events.masks]
    assert kept[-1] == 4 and kept == sorted(kept, reverse=True)
    assert not torch.equal(events.scores[0], events.scores[-1])  # copies, not one tensor
