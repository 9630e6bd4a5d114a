"""Packs of replicas that are killed: each is finished as it was begun, whatever the grid is then.

Here a pack is done in this process, and an exception that nothing catches stands for the kill.
"""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import tiny, without_costs

from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.grids.grid import run_grid
from drlora_ref.experiments.replicas.engine import Replicas
from drlora_ref.experiments.replicas.many_runs import run_replicas
from drlora_ref.experiments.run import one_run, records
from drlora_ref.experiments.run.checkpoints import Checkpoint, runs_in
from drlora_ref.experiments.run.engine import OneModel
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.termination import Terminated

GIVEN = dict(data_dir="generated", model_name="tiny-roberta", max_steps=16, deltaT=2,
             checkpoint_every=5, learning_rate=0.01)  # fmt: skip
OWN = GIVEN | {"lora_alpha": 8.0}  # the same, where TINY has something else
KILLS = {  # what is done so many times, and then never again
    "in a step": (Replicas, "optimizer_step", 8),
    "in the last step": (Replicas, "optimizer_step", 15),
    "before the first record": (records, "write_record", 0),
    "after the first record": (records, "write_record", 1),
    "after the second record": (records, "write_record", 2),
    "between predictions and record": (records, "write_predictions", 2),
    "before the checkpoint goes": (Checkpoint, "remove", 0),
}
GROWN = {  # what the grid is when it is called again: seeds, replicas
    "the same": ([0, 1, 2], 3),
    "one seed more": ([0, 1, 2, 3], 3),
    "one seed more, in front": ([7, 0, 1, 2], 3),
    "smaller packs": ([0, 1, 2], 2),
    "single runs": ([0, 1, 2], 1),
    "larger packs": ([0, 1, 2, 3], 5),
    "one seed less": ([1, 2], 3),
    "another first seed": ([1, 2, 7], 2),
}


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def in_this_process(tmp_path, monkeypatch):
    """Grids here do their packs in this process, one after the other."""

    def start(packs):
        for place, pack in enumerate(packs):
            log, failure = tmp_path / "log.err", None
            log.write_text("")
            try:
                processes.ProcessWork()(pack, {})
            except RuntimeError as error:
                failure = error
                log.write_text(f"{error}\n")
            paths = SimpleNamespace(result_pickle=log, stderr=log)
            yield place, SimpleNamespace(paths=paths, exception=lambda failure=failure: failure)

    monkeypatch.setattr(processes, "starter", lambda *given: start)
    monkeypatch.chdir(tmp_path)


def grid(out, seeds=(0, 1, 2), replicas=3, **given) -> int:
    file = Path("grid.yaml")
    vary = {"seed": list(seeds)}
    file.write_text(json.dumps({"parameters": GIVEN | given, "vary": vary}))
    return run_grid(file, out, replicas=replicas)


def records_in(out) -> dict[str, dict]:
    """{folder of a run: its record, without what it took}."""
    return {
        path.parent.name: without_costs(read_record(path))
        for path in Path(out).glob("*/record.json")
    }


def killed(patch, where, name, times, **given) -> None:
    really, done = getattr(where, name), []

    def or_die(*args, **kwargs):
        done.append(name)
        if len(done) > times:
            raise Killed
        return really(*args, **kwargs)

    with patch.context() as until_then:
        until_then.setattr(where, name, or_die)
        with pytest.raises(Killed):
            grid("out", **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a pack of three, and of three single runs, that nobody disturbed."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for replicas in (3, 1):
        runs = [tiny(folder / f"{replicas}-{seed}", seed=seed, **OWN) for seed in (0, 1, 2)]
        made = run_replicas(runs) if replicas > 1 else [one_run.run(run) for run in runs]
        found[replicas] = {record["key"]: without_costs(record) for record in made}
    return found


CASES = [(kill, "the same") for kill in KILLS]
CASES += [(k, g) for k in ("in a step", "after the first record") for g in GROWN if g != "the same"]


@pytest.mark.parametrize("kill, grown", CASES)
def test_a_pack_that_was_killed_is_finished_as_it_was_begun(kill, grown, whole, monkeypatch):
    killed(monkeypatch, *KILLS[kill])
    seeds, replicas = GROWN[grown]
    for folder in Path("out").glob("seed*"):
        (folder / ".unfinished-1234").touch()  # half of a file, of an earlier kill
    assert grid("out", seeds, replicas) == 0
    found = {record["key"]: record for record in records_in("out").values()}
    assert {key: found[key] for key in whole[3]} == whole[3]
    assert len(found) == len({0, 1, 2, *seeds})
    if kill != "before the checkpoint goes":
        assert not [*Path("out").glob("*/checkpoint.pt"), *Path("out").glob("*/.unfinished-*")]
    before = records_in("out")
    assert grid("out", seeds, replicas) == 0 and records_in("out") == before


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_single_run_that_was_killed_goes_on_by_itself(replicas, whole, monkeypatch):
    killed(monkeypatch, OneModel, "optimizer_step", 8, replicas=1)
    assert grid("out", replicas=replicas) == 0
    first = next(r for r in records_in("out").values() if r["seed"] == 0)
    assert first == whole[1][first["key"]]


def test_what_is_read_of_a_pack_is_no_other_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"PK", b"{}", b"x" * 5000):
        path.write_bytes(content)
        assert runs_in(path) == {}
    Checkpoint(tmp_path, {"seed": 0}).save({"step": 3})
    assert runs_in(path) == {} == runs_in(tmp_path / "none.pt")


# --- one of several that fails -----------------------------------------------------------------


def test_a_record_that_cannot_be_written_costs_none_of_the_others(tmp_path, monkeypatch, capsys):
    really = records.write_record

    def full(record, folder, overwrite=False):
        if record["seed"] == 1:
            raise OSError("No space left on device")
        return really(record, folder, overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_record", full)
        assert grid("out") == 1
    assert sorted(r["seed"] for r in records_in("out").values()) == [0, 2]
    assert "2 done, 0 skipped, 0 from other code, 1 failed" in capsys.readouterr().out
    trained = []
    monkeypatch.setattr(Replicas, "optimizer_step", lambda *given: trained.append(given))
    assert grid("out") == 0 and not trained  # from the checkpoint, which was kept
    assert len(records_in("out")) == 3 and not list(Path("out").glob("*/checkpoint.pt"))


def test_a_run_that_cannot_be_set_up_costs_none_of_the_others(capsys):
    cases = [{"seed": 0}, {"seed": 1, "init_r": 33}, {"seed": 2}]
    Path("grid.yaml").write_text(json.dumps({"parameters": GIVEN, "cases": cases}))
    assert run_grid("grid.yaml", "out", replicas=3) == 1
    out = capsys.readouterr().out
    assert "rank 33: " in out and "can have 32 at most" in out
    assert "2 done, 0 skipped, 0 from other code, 1 failed" in out
    assert sorted(record["seed"] for record in records_in("out").values()) == [0, 2]


def test_seeds_that_draw_other_texts_of_squad_are_not_packed(capsys):
    """A text is a window or several: the runs would have batches of unequal size."""
    squad = dict(task="squad_v1", train_size=24, batch_size=4, max_length=64, stride=16)
    vary = {"seed": [0, 1], "score": ["frobenius_share", "abs_c"]}
    Path("grid.yaml").write_text(json.dumps({"parameters": GIVEN | squad, "vary": vary}))
    assert run_grid("grid.yaml", "out", replicas=4) == 0
    assert [record["replicas"] for record in records_in("out").values()] == [2] * 4
    runs = [tiny(f"other{seed}", seed=seed, **OWN | squad) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"differ in seed: 0 and 1; they may differ in method, in"):
        run_replicas(runs)


def test_a_record_of_another_run_is_kept_and_the_others_are_written(tmp_path, monkeypatch):
    killed(monkeypatch, records, "write_record", 1)
    folders = sorted(Path("out").glob("seed*"))
    (folders[2] / "record.json").write_text('{"key": "another"}')
    with pytest.raises(FileExistsError, match=rf"{folders[2]}/record.json holds a record already"):
        run_replicas([tiny(folder, seed=seed, **OWN) for seed, folder in enumerate(folders)])
    assert read_record(folders[2]) == {"key": "another"}
    assert (folders[1] / "record.json").exists() and (folders[0] / "checkpoint.pt").exists()


def test_after_sigterm_a_pack_goes_on_to_the_same_records(whole, monkeypatch):
    step = Replicas.optimizer_step

    def told(self, number, group):
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, group)

    runs = [tiny(f"out/seed{seed}", seed=seed, **OWN) for seed in (0, 1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(Replicas, "optimizer_step", told)
        with pytest.raises(Terminated, match="saved after step 7 of 16"):
            run_replicas(runs)
    found = {record["key"]: without_costs(record) for record in run_replicas(runs)}
    assert found == whole[3]
