"""The loop of real runs: it equals the page-long one, resumes, and spreads over processes."""

import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_runs import still_model, tiny, without_costs
from torch import multiprocessing as mp

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.run import checkpoints, loop, one_run
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.loop import History
from drlora_ref.experiments.run.records import Record, read_events, read_record
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.run.termination import Terminated
from drlora_ref.experiments.sources.models import resolve_model
from drlora_ref.experiments.tasks.data import loss_weight, share
from drlora_ref.experiments.tasks.glue_generated import write_glue
from drlora_ref.train import train


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> dict:
    """The record of a run that nobody disturbed."""
    return one_run.run(tiny(tmp_path_factory.mktemp("whole")))


def test_the_loop_takes_the_steps_of_the_page_long_one(tmp_path, whole_run):
    ready = one_run.set_up(tiny(tmp_path))
    settings = ready.settings
    record = train(
        ready.prepared.model,
        *ready.inputs[:3],
        ready.schedule,
        ready.prepared.allocator,
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
    record = one_run.run(tiny(tmp_path, max_steps=8))
    assert read_record(tmp_path) == json.loads(json.dumps(record))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"record.json", "predictions.npz", ".lock"}
    assert record["steps"] == 8 and record["parameters"]["task"] == "cola"
    assert len(record["gradient_norm_curve"]) == 8 and min(record["gradient_norm_curve"]) > 0
    assert 50 < record["peak_memory_mib"] < 50_000  # of the whole process
    head = 32 * 32 + 32 + 32 * 2 + 2
    components = 12 * 3 + 2 * 3 * 2 * (4 * (32 + 32) + 2 * (32 + 64)) // 2
    assert record["trained_bytes"] == 4 * (head + components)
    assert set(record) == set(Record.__annotations__) - {"replicas", "capture"}
    with pytest.raises(FileExistsError, match="holds a record already"):
        one_run.run(tiny(tmp_path, max_steps=8))


# Each kills its own process for good (SIGKILL), at another moment of the run that is `ready`.
KILLS = {
    "between two steps": """
        allocate = ready.prepared.allocator.step
        def and_die(step):
            allocate(step)
            if step == 13: kill()
        ready.prepared.allocator.step = and_die""",
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
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.checkpoints import Checkpoint
from drlora_ref.experiments.run.settings import Settings
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
children = []
for settings, code in eval(sys.argv[1]):
    if not (child := os.fork()):  # what is imported need not be imported again
        ready = one_run.set_up(Settings(**settings))
        exec(textwrap.dedent(code))
        one_run.write(ready, one_run.train(ready))
        os._exit(0)
    children.append(child)
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], file=sys.stderr)
"""


def start(*runs: tuple[Settings, str]) -> subprocess.Popen:
    """Runs in processes of their own, beside each other; their exit codes go to stderr."""
    given = [(dataclasses.asdict(settings), code.strip("\n")) for settings, code in runs]
    words = [sys.executable, "-c", KILLED, repr(given)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_and_ends_in_the_same_record(tmp_path, whole_run):
    """Killed by itself at each of these moments, and from outside after its first checkpoint."""
    outside = tmp_path / "outside"
    runs = [(tiny(tmp_path / moment), code) for moment, code in KILLS.items()]
    process = start(*runs, (tiny(outside), ""))
    while not (outside / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    max(psutil.Process(process.pid).children(), key=lambda child: child.pid).kill()
    error = process.communicate(timeout=300)[1]
    assert error.split()[-len(runs) - 1 : -1] == [str(-signal.SIGKILL)] * len(runs), error
    if not (outside / "record.json").exists():  # it may just have finished
        one_run.run(tiny(outside))
    assert without_costs(read_record(outside)) == without_costs(whole_run)
    for moment in KILLS:
        folder, settings = tmp_path / moment, tiny(tmp_path / moment)
        if moment.startswith("between the record"):
            assert without_costs(read_record(folder)) == without_costs(whole_run)
            with pytest.raises(FileExistsError):
                one_run.run(settings)
            continue
        half_written = list(folder.glob(".unfinished-*"))
        assert bool(half_written) == moment.startswith("half-way")
        step = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"]
        assert 0 < step < 30
        record = one_run.run(settings)
        assert without_costs(record) == without_costs(whole_run), moment
        assert not list(folder.glob(".unfinished-*"))


KINDS = {name: dict(method=name) for name in ("lora", "adalora", "prune-once", "h-adapter", "full")}
KINDS |= {f"drlora, {score}": dict(score=score) for score in ("output_norm", "loss_sensitivity")}
KINDS["drlora, uniform"] = dict(uniform=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_method_goes_on_where_it_was(tmp_path, kind):
    """Cut by an exception, in the third evaluation; the folder is all that the second run has."""
    given = KINDS[kind] | dict(max_steps=16, init_r=3, dem_weight=0.0)
    whole = one_run.run(tiny(tmp_path / "whole", **given))
    settings = tiny(tmp_path / "cut", **given)
    ready, calls = one_run.set_up(settings), []

    def power_cut(model):
        calls.append(model)
        if len(calls) == 4:  # the first is before training
            raise KeyboardInterrupt
        return inputs.evaluate(model)

    inputs = ready.inputs
    with pytest.raises(KeyboardInterrupt):
        one_run.train(dataclasses.replace(ready, inputs=inputs._replace(evaluate=power_cut)))
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    assert without_costs(one_run.run(settings)) == without_costs(whole)


def test_accumulated_batches_with_dem_are_one_large_batch(tmp_path):
    """No dropout and a DEM that weighs: added once, not once a micro-batch."""

    def losses(name, **given):
        still = dict(lora_dropout=0.0, dem_weight=5.0, max_steps=12)
        ready = one_run.set_up(tiny(tmp_path / name, **still, **given))
        for module in ready.prepared.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return one_run.train(ready).history.losses

    large = losses("large", batch_size=16, grad_accumulation=1)
    small = losses("small", batch_size=4, grad_accumulation=4)
    assert small == pytest.approx(large, abs=2e-4)


def one_of_two(rank: int, port: int, commands: list[list[str]]) -> None:
    """Commands as torchrun would start them, but for the seconds in which they import."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)  # a thread of OpenMP's does not outlive a fork
    AcceleratorState._reset_state(True)  # what this process was before it was forked
    for words in commands:
        assert main(words) == 0
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """Over gloo: same batches, same gradients, same masks on both; one pair trains every score.

    Every other step has a batch of one row: the second process fills up with a row that must not
    count, in no score either.
    """
    still_model(tmp_path / "model")
    given = dict(
        model_name=str(tmp_path / "model"), lora_dropout=0.0, max_steps=12, film_events=9,
        train_size=25, batch_size=8, grad_accumulation=2,
    )  # fmt: skip
    commands = []
    for score in ("frobenius_share", "output_norm", "loss_sensitivity"):
        settings = dataclasses.asdict(tiny(tmp_path / score, **given, score=score))
        output_dir = settings.pop("output_dir")
        words = [word for k, v in settings.items() for word in ("-p", k, repr(v))]
        commands.append(["run", output_dir, *words])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.start_processes(one_of_two, (port, commands), nprocs=2, start_method="fork")
    for score in ("frobenius_share", "output_norm", "loss_sensitivity"):
        two = read_record(tmp_path / score)
        one = one_run.run(tiny(tmp_path / f"one {score}", **given, score=score))
        assert two["environment"]["processes"] == 2
        assert two["loss_curve"] == pytest.approx(one["loss_curve"], abs=1e-4), score
        assert two["budget_curve"] == one["budget_curve"], score
        assert two["rank_pattern"] == one["rank_pattern"], score
        scores = (read_events(tmp_path / name).scores for name in (score, f"one {score}"))
        torch.testing.assert_close(*map(torch.stack, scores), rtol=1e-3, atol=1e-5)


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
    record = one_run.run(tiny(tmp_path, learning_rate=1e30))
    assert record["status"] == "diverged" and record["flagged_at"] <= record["steps"] < 30
    assert None in record["loss_curve"] and record["best"] is None


def test_a_history_names_the_first_step_that_was_not_finite_and_keeps_all():
    history = History()
    history.add([[1.0, 1.0]] * 7)
    assert history.flagged_at is None
    history.add([[1.0, 1.0], [float("nan"), 1.0], [1.0, float("inf")]])
    assert history.flagged_at == 9 and len(history.losses) == len(history.norms) == 10


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
        one_run.run(dataclasses.replace(cut, **change))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    cut = cut_run(tmp_path)
    monkeypatch.setattr(one_run, "code_hash", lambda: "changed")
    with pytest.raises(ValueError, match=r"of another run \(code: '\w{12}'; now code: 'changed'\)"):
        one_run.run(cut)


def test_no_checkpoint_is_written_once_a_loss_is_not_finite(tmp_path, monkeypatch):
    def save(self, state):
        saved.append(state)

    saved = []
    monkeypatch.setattr(Checkpoint, "save", save)
    record = one_run.run(tiny(tmp_path, learning_rate=1e30, checkpoint_every=1))
    assert record["status"] == "diverged" and len(saved) == record["flagged_at"] - 1


def test_a_run_that_another_process_finished_meanwhile_is_not_run_again(tmp_path):
    ready = one_run.set_up(tiny(tmp_path))
    (tmp_path / "record.json").write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match="holds a record already"):
        one_run.train(ready)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_moved_run_goes_on_in_its_new_folder(tmp_path, whole_run):
    cut_run(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert without_costs(one_run.run(tiny(tmp_path / "there"))) == without_costs(whole_run)


def cut_run(folder, **given) -> Settings:
    """A run that left a checkpoint and no record."""
    ready = one_run.set_up(tiny(folder, **given))

    def power_cut(model):
        if (Path(folder) / "checkpoint.pt").exists():
            raise KeyboardInterrupt
        return ready.inputs.evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        one_run.train(dataclasses.replace(ready, inputs=ready.inputs._replace(evaluate=power_cut)))
    return ready.settings


def test_a_checkpoint_of_which_any_bit_changed_is_damaged_or_the_same(tmp_path, whole_run):
    """A flip in every hundredth of the file: refused in one line, or it decides nothing."""
    settings = cut_run(tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole, checkpoint = path.read_bytes(), Checkpoint(tmp_path, configuration_of(path))
    before, accepted = flattened(checkpoint.load()), []
    for part in range(100):
        place = part * len(whole) // 100
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << part % 8)]) + whole[place + 1 :]
        )
        try:
            after = flattened(checkpoint.load())
        except ValueError as error:
            assert "is damaged (" in str(error) and "\n" not in str(error)
        else:
            accepted.append(place)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(accepted) < 30  # what torch leaves between its tensors
    path.write_bytes(whole)
    assert without_costs(one_run.run(settings)) == without_costs(whole_run)


def configuration_of(path) -> dict:
    return torch.load(path, weights_only=True)["configuration"]


def flattened(value) -> list[torch.Tensor]:
    """Every number and every tensor in a state, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in flattened(item)]
    return [value if isinstance(value, torch.Tensor) else torch.tensor(hash(value))]


OTHER_FILES = {
    "dropout": ("config.json", "hidden_dropout_prob", 0.3, "config.json"),
    "epsilon": ("config.json", "layer_norm_eps", 0.1, "config.json"),
    "activation": ("config.json", "hidden_act", "relu", "config.json"),
    "tokenizer": ("tokenizer_config.json", "model_max_length", 200, "tokenizer"),
    "a token": ("tokenizer.json", "truncation", None, "tokenizer"),
}


@pytest.mark.parametrize("change", OTHER_FILES)
def test_a_run_does_not_go_on_with_other_files_of_its_model(change, tmp_path):
    file, name, value, named = OTHER_FILES[change]
    model = shutil.copytree(resolve_model("tiny-roberta").path, tmp_path / "model")
    cut = cut_run(tmp_path / "run", model_name=str(model))
    held = json.loads((model / file).read_text())
    if change == "a token":  # two words change places
        vocab = held["model"]["vocab"]
        vocab["Paris"], vocab["Rome"] = vocab["Rome"], vocab["Paris"]
    else:
        assert held[name] != value
        held[name] = value
    (model / file).write_text(json.dumps(held))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"of another run \({named}: '\w{{12}}'; now {named}: '"):
        one_run.run(cut)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_run_that_goes_on_with_other_versions_names_both(tmp_path, monkeypatch, capsys):
    cut = cut_run(tmp_path)
    before = one_run.records.environment("cpu")
    monkeypatch.setattr(
        loop, "environment", lambda device: before | {"torch": "99.0", "threads": 64}
    )
    record = one_run.run(cut)
    (earlier,) = record["earlier_environments"]
    assert earlier == {"until_step": 5, **before}
    said = f"goes on after step 5, until then torch {before['torch']}, now 99.0, threads"
    assert said in capsys.readouterr().out
    assert read_record(tmp_path)["earlier_environments"] == [earlier]


def test_no_absolute_path_reaches_a_record(tmp_path):
    place = tmp_path / "some body"
    folder = shutil.copytree(resolve_model("tiny-roberta").path, place / "model")
    write_glue("cola", place / "glue")
    given = dict(data_dir=str(place / "glue"), model_name=str(folder), max_steps=4)
    record = one_run.run(tiny(place / "out", **given))
    text = (place / "out" / "record.json").read_text()
    assert str(tmp_path) not in text and read_record(place / "out") == json.loads(
        json.dumps(record)
    )
    names = {name: record["parameters"][name] for name in ("data_dir", "model_name", "output_dir")}
    assert names == {"data_dir": "glue", "model_name": "model", "output_dir": "out"}
    assert record["data"]["source"] == "GLUE folder glue"


# --- SIGTERM -----------------------------------------------------------------------------------


def told_at(ready, step: int, number=signal.SIGTERM) -> None:
    """Let this process be told to end while the step is taken."""
    collate, calls = ready.inputs.collate, []

    def told(rows):
        calls.append(rows)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return collate(rows)

    return dataclasses.replace(ready, inputs=ready.inputs._replace(collate=told))


@pytest.mark.parametrize("step", [1, 7, 12, 29])
def test_after_sigterm_a_run_goes_on_to_the_same_record(step, tmp_path, whole_run):
    before = signal.getsignal(signal.SIGTERM)
    ready = told_at(one_run.set_up(tiny(tmp_path, checkpoint_every=0)), step)
    said = f"SIGTERM: a checkpoint is saved after step {step} of 30, and the same command goes on"
    with pytest.raises(Terminated, match=said):
        one_run.train(ready)
    assert signal.getsignal(signal.SIGTERM) == before
    assert Checkpoint(tmp_path, configuration_of(tmp_path / "checkpoint.pt")).load()["step"] == step
    again = one_run.run(tiny(tmp_path, checkpoint_every=0))
    assert comparable(again) == comparable(whole_run)


def comparable(record: dict) -> dict:
    parameters = {k: v for k, v in record["parameters"].items() if k != "checkpoint_every"}
    return without_costs(record | {"parameters": parameters})


def test_sigterm_in_the_last_step_changes_nothing(tmp_path, whole_run):
    ready = told_at(one_run.set_up(tiny(tmp_path)), 30)
    assert without_costs(one_run.write(ready, one_run.train(ready))) == without_costs(whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_whoever_listened_before_is_called_once_the_checkpoint_is_there(number, tmp_path):
    def queue_again(*signal_and_frame):
        assert (tmp_path / "checkpoint.pt").exists()
        raise SystemExit("queued again")

    before = signal.signal(number, queue_again)
    try:
        ready = told_at(one_run.set_up(tiny(tmp_path, checkpoint_every=0)), 3, number)
        with pytest.raises(SystemExit, match="queued again"):
            one_run.train(ready)
    finally:
        signal.signal(number, before)


def test_sigterm_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        ready = told_at(one_run.set_up(tiny(tmp_path, max_steps=8)), 3)
        assert len(one_run.train(ready).history.losses) == 8
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what lies in the folder -------------------------------------------------------------------


def test_a_lock_that_is_none_is_one_line(tmp_path):
    ready = one_run.set_up(tiny(tmp_path))
    lock = tmp_path / ".lock"
    for make in (
        lambda: lock.symlink_to("nowhere"),
        lambda: lock.symlink_to("/dev/null"),
        lock.mkdir,
    ):
        make()
        with pytest.raises(OSError, match=r"\.lock cannot be locked \([\w ]+\): remove it$"):
            one_run.train(ready)
        lock.unlink() if lock.is_symlink() else lock.rmdir()


def test_a_folder_with_the_name_of_a_leftover_stays_and_is_no_hindrance(tmp_path):
    (tmp_path / ".unfinished-notes").mkdir()
    (tmp_path / ".unfinished-notes" / "mine").touch()
    (tmp_path / ".unfinished-1234").touch()
    one_run.run(tiny(tmp_path, max_steps=4))
    assert (tmp_path / ".unfinished-notes" / "mine").exists()
    assert not (tmp_path / ".unfinished-1234").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "record.json", "out"])
def test_a_folder_where_a_file_is_to_be_is_one_line(name, tmp_path):
    place = tmp_path / "out"
    place.write_text("a file") if name == "out" else (place / name).mkdir(parents=True)
    with pytest.raises((OSError, ValueError)) as refused:
        one_run.run(tiny(place, max_steps=4))
    assert str(place) in str(refused.value) and "\n" not in str(refused.value)


# --- divergence --------------------------------------------------------------------------------

SCHEDULES = [dict(tinit=0.0, deltaT=1), dict(tinit=0.0, tfinal=0.0, deltaT=1), dict(deltaT=3)]


@pytest.mark.parametrize("method", ["drlora", "adalora", "prune-once"])
@pytest.mark.parametrize("learning_rate", [1e3, 1e8, 1e18, 1e30, 1e37])
def test_divergence_at_a_pruning_step_is_a_record_too(method, learning_rate, tmp_path):
    for number, schedule in enumerate(SCHEDULES):
        given = dict(method=method, learning_rate=learning_rate, warmup=0.0, max_steps=12)
        record = one_run.run(tiny(tmp_path / str(number), **given, **schedule))
        assert read_record(tmp_path / str(number))["status"] == record["status"]
        if record["status"] == "diverged":
            assert 1 <= record["flagged_at"] <= record["steps"]
            assert [step for step, _ in record["budget_curve"] if step >= record["steps"]] == []


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


@pytest.mark.parametrize("write", [1, 2, 4, 7])
def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch, write):
    """torch's writer turns it into a RuntimeError of its own."""
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save({"step": 5})

    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, some):
            self.writes += 1
            if self.writes == write:
                raise KeyboardInterrupt
            return super().write(some)

    @contextmanager
    def interrupted(*_, **__):
        yield Interrupted()

    monkeypatch.setattr(checkpoints, "whole_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 10, "weights": torch.ones(100_000)})
    assert checkpoint.load() == {"step": 5}


def test_two_runs_in_one_folder_are_refused(tmp_path):
    ready = one_run.set_up(tiny(tmp_path))
    with (
        one_run.claim(tmp_path),
        pytest.raises(BlockingIOError, match="in use by another process"),
    ):
        one_run.train(ready)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"task": "xsum"}, "roberta models have no head for Seq2SeqLM"),
        ({"train_size": 65}, "cola has 64 training rows"),
        ({"max_length": 4000}, "max_length = 4000: must be 1 to 512"),
    ],
)
def test_an_impossible_run_is_refused_before_any_training(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        one_run.set_up(tiny(tmp_path, **given))
    assert not list(tmp_path.iterdir())


def test_an_accelerator_can_be_made_again_with_the_same_precision():
    assert isinstance(one_run.make_accelerator("fp32"), Accelerator)
    assert one_run.make_accelerator("auto").mixed_precision == "no" or torch.cuda.is_available()
