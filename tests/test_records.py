"""A record is written whole, once, and in strict JSON."""

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch

import drlora_ref
from drlora_ref.experiments.run import records
from drlora_ref.experiments.run.records import (
    check_output_dir,
    environment,
    read_record,
    write_record,
)

RECORD = {"task": "cola", "ranks": {"b": 2, "a": [0, 1.5, None, True]}, "note": "naïve"}


def test_record_comes_back_as_written(tmp_path):
    path = write_record(RECORD, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "record.json"
    assert read_record(path) == read_record(path.parent) == RECORD
    assert os.listdir(path.parent) == ["record.json"]


def test_file_is_readable_text_with_sorted_keys(tmp_path):
    text = write_record(RECORD, tmp_path).read_text(encoding="utf-8")
    assert text.startswith('{\n  "note": "naïve",\n  "ranks": {\n    "a": [')
    assert text.endswith("}\n")


def test_output_dir_is_made_and_returned(tmp_path):
    assert check_output_dir(str(tmp_path / "a" / "b")).is_dir()


def test_existing_record_is_refused_by_name_before_any_work(tmp_path):
    write_record(RECORD, tmp_path)
    message = "record.json holds a record already: pass overwrite=True or take another output_dir"
    with pytest.raises(FileExistsError, match=message):
        check_output_dir(tmp_path)
    assert check_output_dir(tmp_path, overwrite=True) == tmp_path


def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_output_dir(tmp_path)


def test_overwrite_replaces_and_nothing_else_does(tmp_path):
    write_record(RECORD, tmp_path)
    with pytest.raises(FileExistsError):
        write_record({"task": "rte"}, tmp_path)
    assert read_record(tmp_path) == RECORD
    write_record({"task": "rte"}, tmp_path, overwrite=True)
    assert read_record(tmp_path) == {"task": "rte"}
    assert os.listdir(tmp_path) == ["record.json"]


def no_links(*args):
    raise OSError(errno.ENOTSUP, "no hard links here")


@pytest.mark.parametrize("link", [os.link, no_links])
def test_of_many_writers_at_once_exactly_one_wins_and_its_record_is_whole(
    tmp_path, monkeypatch, link
):
    monkeypatch.setattr(os, "link", link)
    # All of them have looked and found the folder free.
    monkeypatch.setattr(records, "check_output_dir", lambda folder, overwrite: folder)
    start, won, lost = threading.Barrier(8), [], []

    def write(writer):
        start.wait()
        try:
            write_record({"writer": writer}, tmp_path)
            won.append(writer)
        except FileExistsError as error:
            assert "holds a record already" in str(error)
            lost.append(writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    assert read_record(tmp_path) == {"writer": won[0]}
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    "value, message",
    [
        ({"eval": {"metric": float("nan")}}, "record.eval.metric = nan"),
        ({"losses": [1.0, float("inf")]}, r"record.losses\[1\] = inf"),
        ({"best": np.float64("nan")}, "record.best = nan"),
        ({"steps": np.int64(3)}, "record.steps = .*3.*: not JSON"),
        ({"mask": torch.ones(2)}, "record.mask = .*: not JSON"),
        ({"ranks": {1: 2}}, "record.ranks = .*keys must be words"),
    ],
)
def test_value_that_is_not_json_is_named_and_nothing_is_written(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        write_record(value, tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"task": "co', "no json", '{"metric": NaN}'])
def test_truncated_or_loose_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ValueError, match=r"record.json is not a whole, strict JSON record"):
        read_record(tmp_path)


def test_environment_names_versions_and_device_but_neither_path_nor_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["drlora_ref"] == drlora_ref.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    keys = {
        "python",
        "drlora_ref",
        "torch",
        "transformers",
        "peft",
        "datasets",
        "accelerate",
        "device",
    }
    assert set(found) == keys | {"threads"}
    assert not any(str(value).startswith(("/", "C:\\")) for value in found.values())


def test_environment_names_the_processor_when_the_run_is_on_it():
    assert environment("cpu")["device"] not in ("", "cpu")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_the_record_before_it_and_nothing_half_written(
    tmp_path, full_disk, overwrite
):
    if overwrite:
        write_record({"precious": 1}, tmp_path)
    with full_disk(), pytest.raises(OSError, match="No space left"):
        write_record({"new": 2}, tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"] * overwrite
    assert not overwrite or read_record(tmp_path) == {"precious": 1}
