"""The loop of real runs: it equals the page-long one, resumes, and spreads over processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from drlora_ref.experiments.run import one_run as runs
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.loop import Loop
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import loss_weight, share
from drlora_ref.train import train

# Thirty steps, an evaluation every fourth: 64 generated sentences in batches of 16.
TINY = Settings(
    task="cola",
    data_dir="generated",
    model_name="tiny-roberta",
    max_steps=30,
    deltaT=3,
    checkpoint_every=5,
    lora_alpha=64,
    learning_rate=1e-2,
)
# What a run that went on after it was killed may have otherwise than one that never stopped.
TIMES = ("seconds", "evaluation_seconds")


def tiny(folder, **given) -> Settings:
    return dataclasses.replace(TINY, output_dir=str(folder), **given)


def without_times(record: dict) -> dict:
    parameters = {k: v for k, v in record["parameters"].items() if k != "output_dir"}
    return {k: v for k, v in record.items() if k not in TIMES} | {"parameters": parameters}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> dict:
    """The record of a run that nobody disturbed."""
    return runs.run(tiny(tmp_path_factory.mktemp("whole")))


def test_the_loop_takes_the_steps_of_the_page_long_one(tmp_path, whole_run):
    job = runs.set_up(tiny(tmp_path))
    evaluate, settings = job.inputs.evaluate, job.settings
    torch.manual_seed(0)  # set_up seeds first, then draws the head and the adapters
    job = runs.set_up(tiny(tmp_path))
    record = train(
        job.prepared.model,
        job.inputs.train,
        job.inputs.collate,
        evaluate,
        job.schedule,
        job.prepared.allocator,
        dem_weight=settings.dem_weight,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    assert record["loss_curve"] == pytest.approx(whole_run["loss_curve"], abs=2e-5)
    assert record["budget_curve"] == whole_run["budget_curve"]
    assert record["rank_pattern"] == whole_run["rank_pattern"]
    assert [e["step"] for e in record["evaluations"]] == [4, 8, 12, 16, 20, 24, 28, 30]
    for mine, theirs in zip(record["evaluations"], whole_run["evaluations"], strict=True):
        assert mine["metric"] == pytest.approx(theirs["metric"], abs=1e-6)


def test_a_run_leaves_its_record_and_no_checkpoint(tmp_path):
    record = runs.run(tiny(tmp_path, max_steps=8))
    assert read_record(tmp_path) == json.loads(json.dumps(record))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"record.json", ".lock"}
    assert record["steps"] == 8 and record["parameters"]["task"] == "cola"
    assert record["peak_memory_mib"] is None
    with pytest.raises(FileExistsError, match="holds a record already"):
        runs.run(tiny(tmp_path, max_steps=8))


# Each kills its own process for good (SIGKILL), at another moment.
KILLS = {
    "between two steps": """
        step = Loop._after
        def after(self):
            step(self)
            if self.step == 13: kill()
        Loop._after = after""",
    "half-way through writing a checkpoint": """
        import io
        save, saved = torch.save, []
        def half(state, file):
            saved.append(0)
            if len(saved) < 4: return save(state, file)
            save(state, whole := io.BytesIO())
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            kill()
        torch.save = half""",
    "between the record and the end": """
        Checkpoint.remove = lambda self: kill()""",
}
KILLED = """
import os, signal, sys, textwrap, torch
from drlora_ref.experiments.run import one_run as runs
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.loop import Loop
from drlora_ref.experiments.run.settings import Settings
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
exec(textwrap.dedent(sys.argv[2]))
runs.run(Settings(**eval(sys.argv[1])))
"""


def start(settings: Settings, code: str) -> subprocess.Popen:
    words = [sys.executable, "-c", KILLED, repr(dataclasses.asdict(settings)), code.strip("\n")]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_and_ends_in_the_same_record(tmp_path, whole_run):
    processes = {
        moment: start(tiny(tmp_path / moment), code) for moment, code in KILLS.items()
    }  # side by side: starting up is most of it
    for moment, process in processes.items():
        _, error = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, error
        folder, settings = tmp_path / moment, tiny(tmp_path / moment)
        if moment.startswith("between the record"):
            assert without_times(read_record(folder)) == without_times(whole_run)
            with pytest.raises(FileExistsError):
                runs.run(settings)
            continue
        half_written = list(folder.glob(".unfinished-*"))
        assert bool(half_written) == moment.startswith("half-way")
        step = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["position"][0]
        assert 0 < step < 30
        record = runs.run(settings)
        assert without_times(record) == without_times(whole_run), moment
        assert not list(folder.glob(".unfinished-*"))


def test_a_run_killed_from_outside_goes_on_and_ends_in_the_same_record(tmp_path, whole_run):
    process = start(tiny(tmp_path), "")
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.wait()
    if not (tmp_path / "record.json").exists():  # it may just have finished
        runs.run(tiny(tmp_path))
    assert without_times(read_record(tmp_path)) == without_times(whole_run)


@pytest.mark.parametrize("method", ["lora", "adalora", "h-adapter", "full"])
def test_every_kind_of_method_goes_on_where_it_was(tmp_path, method):
    """Cut by an exception, in the third evaluation; the folder is all that the second run has."""
    given = dict(method=method, max_steps=16, init_r=3, dem_weight=0.0)
    whole = runs.run(tiny(tmp_path / "whole", **given))
    settings = tiny(tmp_path / "cut", **given)
    job, calls = runs.set_up(settings), []

    def power_cut(model):
        calls.append(model)
        if len(calls) == 4:  # the first is before training
            raise KeyboardInterrupt
        return inputs.evaluate(model)

    inputs = job.inputs
    with pytest.raises(KeyboardInterrupt):
        runs.train(dataclasses.replace(job, inputs=inputs._replace(evaluate=power_cut)))
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    assert without_times(runs.run(settings)) == without_times(whole)


def test_accumulated_batches_with_dem_are_one_large_batch(tmp_path):
    """No dropout and a DEM that weighs: added once, not once a micro-batch."""

    def losses(name, **given):
        still = dict(lora_dropout=0.0, dem_weight=5.0, max_steps=12)
        job = runs.set_up(tiny(tmp_path / name, **still, **given))
        for module in job.prepared.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return runs.train(job)["loss_curve"]

    large = losses("large", batch_size=16, grad_accumulation=1)
    small = losses("small", batch_size=4, grad_accumulation=4)
    assert small == pytest.approx(large, abs=2e-4)


def test_two_processes_train_as_one(tmp_path):
    """Over gloo: same batches, same gradients, same masks on both."""
    folder = tmp_path / "model"
    still_model(folder)
    given = dict(model_name=str(folder), lora_dropout=0.0, max_steps=12)
    settings = tiny(tmp_path / "two", **given)
    words = [word for k, v in dataclasses.asdict(settings).items() for word in ("-p", k, repr(v))]
    del words[words.index("output_dir") - 1 : words.index("output_dir") + 2]
    # What `accelerate launch --multi_gpu` runs underneath; it has no such launcher for a CPU alone.
    launch = "torch.distributed.run --standalone --nproc_per_node 2 -m drlora_ref.experiments run"
    command = [sys.executable, "-m", *launch.split(), settings.output_dir, *words]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = read_record(tmp_path / "two"), runs.run(tiny(tmp_path / "one", **given))
    assert two["environment"]["processes"] == 2
    assert two["loss_curve"] == pytest.approx(one["loss_curve"], abs=1e-4)
    assert two["budget_curve"] == one["budget_curve"]
    assert two["rank_pattern"] == one["rank_pattern"]


def still_model(folder: Path) -> None:
    """tiny-roberta without dropout, saved: two processes draw other random numbers than one."""
    from transformers import AutoModel, AutoTokenizer

    from drlora_ref.experiments.sources.models import resolve_model

    path = resolve_model("tiny-roberta").path
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    AutoModel.from_pretrained(path, **still).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)


def test_a_batch_smaller_than_the_processes_is_shared_with_weight_zero():
    batch = {"input_ids": torch.arange(2).unsqueeze(1), "labels": torch.tensor([1, 0])}
    shares = [share(batch, rank, processes=3) for rank in range(3)]
    assert [weight for _, weight in shares] == [1, 1, 0]
    assert all(len(mine["labels"]) == 1 for mine, _ in shares)


def test_a_summary_weighs_its_tokens_and_an_answer_weighs_one():
    assert (
        loss_weight({"start_positions": torch.tensor([3, 4]), "end_positions": torch.ones(2)}) == 2
    )
    assert loss_weight({"labels": torch.tensor([[4, -100], [5, 6]])}) == 3


def test_a_run_that_diverges_ends_with_a_record_that_says_so(tmp_path):
    record = runs.run(tiny(tmp_path, learning_rate=1e30))
    assert record["status"] == "diverged" and record["flagged_at"] <= record["steps"] < 30
    assert None in record["loss_curve"] and record["best"] is None


def test_health_is_read_once_and_numbered_from_the_first_step():
    loop = object.__new__(Loop)
    loop.health, loop.unread = [[1.0, 1.0]] * 7, [torch.ones(2), torch.tensor([float("nan"), 1])]
    assert loop._read_health() == 9
    assert len(loop.health) == 9 and loop.unread == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 1e-3}, r"of another run \(learning_rate: 0.01; now learning_rate: 0.0"),
        ({"method": "lora"}, r"method: 'drlora'; now method: 'lora'"),
        ({"max_steps": 29}, "max_steps: 30"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, change, message):
    cut = cut_run(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        runs.run(dataclasses.replace(cut, **change))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    cut = cut_run(tmp_path)
    monkeypatch.setattr(runs, "code_hash", lambda: "changed")
    with pytest.raises(ValueError, match=r"of another run \(code: '\w{12}'; now code: 'changed'\)"):
        runs.run(cut)


def test_no_checkpoint_is_written_once_a_loss_is_not_finite(tmp_path, monkeypatch):
    def save(self, state):
        saved.append(state)

    saved = []
    monkeypatch.setattr(Checkpoint, "save", save)
    record = runs.run(tiny(tmp_path, learning_rate=1e30, checkpoint_every=1))
    assert record["status"] == "diverged" and len(saved) == record["flagged_at"] - 1


def test_a_run_that_another_process_finished_meanwhile_is_not_run_again(tmp_path):
    job = runs.set_up(tiny(tmp_path))
    (tmp_path / "record.json").write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match="holds a record already"):
        runs.train(job)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_moved_run_goes_on_in_its_new_folder(tmp_path, whole_run):
    cut_run(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert without_times(runs.run(tiny(tmp_path / "there"))) == without_times(whole_run)


def cut_run(folder) -> Settings:
    """A run that left a checkpoint and no record."""
    job = runs.set_up(tiny(folder))

    def power_cut(model):
        if (Path(folder) / "checkpoint.pt").exists():
            raise KeyboardInterrupt
        return job.inputs.evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        runs.train(dataclasses.replace(job, inputs=job.inputs._replace(evaluate=power_cut)))
    return job.settings


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_checkpoint_is_named_and_left_where_it_is(tmp_path, left):
    checkpoint = Checkpoint(tmp_path, {"seed": 0})
    checkpoint.save({"weights": torch.ones(1000)})
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[:left])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .*: remove it and"):
        checkpoint.load()
    assert checkpoint.path.read_bytes() == whole[:left]


def test_a_checkpoint_never_runs_code_when_it_is_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"configuration": {}, "state": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint(tmp_path, {}).load()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, full_disk, earlier):
    checkpoint = Checkpoint(tmp_path, {})
    if earlier:
        checkpoint.save({"step": 5})
    left = "the one before it is whole" if earlier else "there is none before it"
    with full_disk(), pytest.raises(OSError, match=rf"could not be written .*{left}: make room"):
        checkpoint.save({"step": 10, "weights": torch.ones(100_000)})
    assert checkpoint.load() == ({"step": 5} if earlier else None)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    job = runs.set_up(tiny(tmp_path))
    with (
        runs.claim(tmp_path),
        pytest.raises(BlockingIOError, match="in use by another process"),
    ):
        runs.train(job)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"learning_rate": "high"}, "learning_rate = 'high': expected a number, as 0.002"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: must be above 0"),
        ({"batch_size": 16.0}, "batch_size = 16.0: expected a whole number, as 16"),
        ({"overwrite": 1}, "overwrite = 1: expected true or false, as False"),
        ({"warmup": 1.0}, "warmup = 1.0: must be at least 0 and less than 1"),
        ({"precision": "fp16"}, "precision = 'fp16': must be auto, fp32 or bf16"),
        ({"task": "COLA"}, "unknown task 'COLA' .nearest: cola"),
        ({"method": "dora"}, "unknown method 'dora'"),
        ({"dem_weight": float("nan")}, "dem_weight = nan: must be at least 0"),
    ],
)
def test_a_setting_that_cannot_be_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_whole_numbers_will_do_where_real_ones_are_meant():
    assert Settings(lora_alpha=8) == Settings(lora_alpha=8.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"task": "xsum"}, "roberta models have no head for Seq2SeqLM"),
        ({"target_r": 4}, "target_r = 4 is above init_r = 3"),
        ({"train_size": 65}, "cola has 64 training rows"),
        ({"max_length": 4000}, "max_length = 4000: must be 1 to 512"),
    ],
)
def test_an_impossible_run_is_refused_before_any_training(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        runs.set_up(tiny(tmp_path, **given))
    assert not list(tmp_path.iterdir())


def test_an_accelerator_can_be_made_again_with_the_same_precision():
    assert isinstance(runs.make_accelerator("fp32"), Accelerator)
    assert runs.make_accelerator("auto").mixed_precision == "no" or torch.cuda.is_available()
