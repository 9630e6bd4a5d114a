"""What a run's last model is asked: rows that were held out, and a prediction for every example."""

import hashlib
import json
import math

import numpy as np
import pytest
from tiny_runs import still_model, tiny, without_costs

from drlora_ref.experiments.replicas.many_runs import check_replicas, run_replicas
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.records import read_predictions, read_record, write_record
from drlora_ref.experiments.run.settings import Settings, run_key
from drlora_ref.experiments.tasks.evaluation import _compact
from drlora_ref.experiments.tasks.families import FAMILIES
from drlora_ref.experiments.tasks.glue import load_task, metric

FAMILY_OF = {"cola": "tiny-roberta", "hellaswag": "tiny-roberta", "squad_v2": "tiny-roberta",
             "xsum": "tiny-bart"}  # fmt: skip


def held_out(task: str, **given):
    return FAMILIES[task].load_task(task, "" if task == "grammar" else "generated", **given)


@pytest.mark.parametrize("task", ["grammar", *FAMILY_OF])
def test_the_same_rows_are_held_out_for_every_seed_and_never_trained_on(task):
    whole = held_out(task)
    drawn = [held_out(task, train_size=10, seed=seed, holdout=20) for seed in (0, 1, 2)]
    held = drawn[0].holdout.to_list()
    assert len(held) == 20 and all(data.holdout.to_list() == held for data in drawn)
    assert len({str(data.train.to_list()) for data in drawn}) == 3
    rest = held_out(task, holdout=20).train.to_list()
    text = lambda rows: sorted(map(str, rows))  # noqa: E731
    assert text(rest + held) == text(whole.train.to_list())
    assert all(str(row) in text(rest) for data in drawn for row in data.train.to_list())
    assert {data.fingerprint for data in drawn} == {whole.fingerprint}
    assert held_out(task, holdout=5).holdout.to_list() == held[:5]
    assert whole.holdout is None


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(holdout=64), "train_size = 0 and holdout = 64: cola has 64 training rows"),
        (dict(holdout=20, train_size=45), "train_size = 45 and holdout = 20: cola has 64"),
        (dict(holdout=-1), "holdout = -1"),
    ],
)
def test_more_rows_than_there_are_cannot_be_held_out(given, message):
    with pytest.raises(ValueError, match=message):
        load_task("cola", "generated", **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, record) of a run with ten rows held out."""
    folder = tmp_path_factory.mktemp("held")
    return folder, one_run.run(tiny(folder, holdout=10, max_steps=12))


def test_a_record_holds_the_metric_on_the_rows_held_out_apart(run):
    folder, record = run
    assert record["holdout"].keys() == {"size", "metric", "collapsed"}
    assert record["holdout"]["size"] == 10 and record["data"]["train"] == 54
    assert len(record["evaluations"]) == 3
    assert read_record(folder) == json.loads(json.dumps(record))


def test_predictions_give_the_metrics_of_the_record(run):
    folder, record = run
    kept = read_predictions(folder)
    data = load_task("cola", "generated", holdout=10)
    assert kept["validation_labels"].tolist() == data.validation["validation"]["label"][:]
    assert kept["holdout_labels"].tolist() == data.holdout["label"][:]
    for split, expected in (
        ("validation", record["last"]),
        ("holdout", record["holdout"]["metric"]),
    ):
        found = metric("cola", kept[f"{split}_predictions"], kept[f"{split}_labels"])
        assert found == pytest.approx(expected)
    assert {array.dtype for array in kept.values()} == {np.dtype("int8")}
    content = (folder / "predictions.npz").read_bytes()
    assert record["predictions"] == {
        "file": "predictions.npz",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_classes_are_small_numbers_scores_are_floats_and_nan_is_no_class():
    classes = _compact(np.array([1.0, math.nan]), np.array([0, 1]))
    assert classes.tolist() == [1, -1] and classes.dtype == np.int8
    assert _compact(np.array([200.0]), np.array([200])).dtype == np.int32
    scores = _compact(np.array([1.5, math.nan]), np.array([0.0, 5.0]))
    assert scores.dtype == np.float32 and math.isnan(scores[1])


def test_predictions_that_were_changed_or_removed_are_refused(run, tmp_path):
    folder, record = run
    write_record(record, tmp_path)
    with pytest.raises(ValueError, match=r"predictions.npz is missing: the record"):
        read_predictions(tmp_path)
    (tmp_path / "predictions.npz").write_bytes((folder / "predictions.npz").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"predictions.npz is not the file that the record"):
        read_predictions(tmp_path)
    write_record(record | {"predictions": "predictions.npz"}, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"predictions = 'predictions.npz': must name a file and"):
        read_predictions(tmp_path)
    older = {k: v for k, v in record.items() if k != "predictions"}
    write_record(older, tmp_path, overwrite=True)
    assert read_predictions(tmp_path) == {}


def test_a_run_killed_between_predictions_and_record_ends_in_the_same_two_files(
    run, tmp_path, monkeypatch
):
    folder, record = run
    settings = tiny(tmp_path, holdout=10, max_steps=12)

    def power_cut(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one_run.records, "write_record", power_cut)
        with pytest.raises(KeyboardInterrupt):
            one_run.run(settings)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"predictions.npz", "checkpoint.pt", ".lock"}
    assert without_costs(one_run.run(settings)) == without_costs(record)
    names = ("predictions.npz",)
    assert all((tmp_path / n).read_bytes() == (folder / n).read_bytes() for n in names)


def test_a_run_that_diverged_has_neither(tmp_path):
    record = one_run.run(tiny(tmp_path, learning_rate=1e30, holdout=5))
    assert record["status"] == "diverged"
    assert record["holdout"] is record["predictions"] is record["rank_map"] is None
    assert not (tmp_path / "predictions.npz").exists() and read_predictions(tmp_path) == {}


def test_each_replica_has_its_own_and_they_are_those_of_the_run_alone(tmp_path):
    still_model(tmp_path / "still")
    given = dict(model_name=str(tmp_path / "still"), lora_dropout=0.0, max_steps=12, holdout=10)
    changes = dict(seed=0), dict(seed=1, method="lora"), dict(seed=2, learning_rate=1e30)
    runs = [tiny(tmp_path / f"r{i}", **given, **change) for i, change in enumerate(changes)]
    records = run_replicas(runs)
    for i in (0, 1):
        alone = one_run.run(tiny(tmp_path / f"alone{i}", **given, **changes[i]))
        assert records[i]["holdout"]["metric"] == pytest.approx(alone["holdout"]["metric"])
        mine, theirs = (read_predictions(tmp_path / f"{name}{i}") for name in ("r", "alone"))
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert records[2]["predictions"] is records[2]["holdout"] is None
    assert not (tmp_path / "r2" / "predictions.npz").exists()
    with pytest.raises(ValueError, match="differ in holdout: 10 and 0"):
        check_replicas([runs[0], tiny(tmp_path, **given | {"holdout": 0})])


@pytest.mark.parametrize("task", FAMILY_OF)
def test_every_family_evaluates_the_rows_held_out(task, tmp_path):
    given = dict(max_steps=2, holdout=8, batch_size=4, num_beams=1, max_length=50, stride=8)
    record = one_run.run(tiny(tmp_path, task=task, model_name=FAMILY_OF[task], **given))
    last = {k for k in record["evaluations"][-1] if k not in ("step", "epoch")}
    assert record["holdout"].keys() == last | {"size"} and record["holdout"]["size"] == 8
    assert (record["predictions"] is None) == (task in ("squad_v2", "xsum"))  # texts


def test_newer_parameters_at_their_defaults_leave_a_key_as_it_was():
    plain = Settings(task="cola", method="lora")
    assert run_key(plain, "d", "m") == run_key(plain, "d", "m", "")
    others = [dict(holdout=5), dict(tfinal=0.4), dict(tinit=0.1), dict(penalty="l2"), dict(seed=1)]
    keys = {run_key(Settings(task="cola", method="lora", **o), "d", "m") for o in others}
    assert len(keys | {run_key(plain, "d", "m"), run_key(plain, "d", "m", "map")}) == 7
    assert run_key(Settings(), "d", "m") != run_key(Settings(uniform=True), "d", "m")
