"""Grids: which runs are left to do, and what becomes of their processes.

Most runs here are pretended; the others are of a notebook that trains nothing, but for the last.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import submitit
from fake_grid import files, pretend, write_grid, write_notebook

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.grids import processes
from drlora_ref.experiments.grids.grid import run_grid
from drlora_ref.experiments.grids.plans import PlannedRun, pack, plan, read_grid
from drlora_ref.experiments.results import summaries
from drlora_ref.experiments.run.one_run import claim, code_hash
from drlora_ref.experiments.run.records import read_record
from drlora_ref.experiments.run.settings import Settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder to work in, with fake.ipynb."""
    monkeypatch.chdir(tmp_path)
    write_notebook()
    return tmp_path


def test_what_is_done_is_skipped_and_only_the_failed_one_runs_again(monkeypatch, capsys):
    file = write_grid(vary={"seed": [0, 1, 2]})
    assert len(pretend(monkeypatch, fails=[1])) == 0
    assert run_grid(file) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("[1/3] seed0: score 1.0000; ")
    assert told[1].startswith("[2/3] seed1: failed: no luck; ")
    assert told[-2:] == ["2 done, 0 skipped, 0 from other code, 1 failed",
                         "  seed1: no luck (log: log.err)"]  # fmt: skip
    assert Path("log.err").exists()

    kept = {name: text for name, text in files("runs").items() if "record" in name}
    started = pretend(monkeypatch)
    assert run_grid(file) == 0
    assert [task.parameters["seed"] for task in started] == [1]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 done, 2 skipped, 0 from other code, 0 failed"
    )
    assert files("runs").items() >= kept.items()

    started = pretend(monkeypatch)
    assert run_grid(file) == 0 and not started
    assert "0 done, 3 skipped" in capsys.readouterr().out


def test_a_grid_of_which_nothing_is_left_to_do_starts_nothing(monkeypatch, capsys):
    file = write_grid(vary={"seed": [0]})
    with monkeypatch.context() as pretended:
        pretend(pretended)
        run_grid(file)
    before = files()
    assert run_grid(file) == 0 and files() == before
    assert "0 done, 1 skipped" in capsys.readouterr().out


def test_a_grid_that_grew_skips_what_it_did_when_it_was_smaller(monkeypatch):
    pretend(monkeypatch)
    assert run_grid(write_grid(parameters={"data_dir": "generated", "seed": 0})) == 0
    started = pretend(monkeypatch)
    assert run_grid(write_grid(vary={"seed": [0, 1], "method": ["drlora"]})) == 0
    assert [task.parameters["seed"] for task in started] == [1]


def test_a_run_that_diverged_is_done_and_says_so(monkeypatch, capsys):
    pretend(monkeypatch, best=None, status="diverged")
    assert run_grid(write_grid(vary={"seed": [0]})) == 0
    assert "[1/1] seed0: diverged; " in capsys.readouterr().out


def test_runs_from_other_code_are_listed_and_repeated_only_if_asked(monkeypatch, capsys):
    file = write_grid(vary={"seed": [0, 1]})
    pretend(monkeypatch, code="another")
    assert run_grid(file) == 0
    started = pretend(monkeypatch)
    capsys.readouterr()
    assert run_grid(file) == 0 and not started
    out = capsys.readouterr().out
    assert "seed0: from other code: score 1.0000" in out
    assert out.splitlines()[-1] == "0 done, 0 skipped, 2 from other code, 0 failed"
    assert run_grid(file, stale=True) == 0
    assert [task.parameters["overwrite"] for task in started] == [True, True]
    assert run_grid(file) == 0
    assert "0 done, 2 skipped, 0 from other code" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config_sha256", "tokenizer_sha256"])
def test_runs_with_other_files_of_the_model_are_listed_and_repeated_only_if_asked(
    name, monkeypatch, capsys
):
    """Records that do not say, as older ones, are done."""
    file = write_grid(vary={"seed": [0, 1]})
    pretend(monkeypatch)
    run_grid(file)
    record = next(Path("runs/grid").glob("seed0-*")) / "record.json"
    held = json.loads(record.read_text())
    record.write_text(json.dumps(held | {"model": {name: "before"}}))
    started = pretend(monkeypatch)
    capsys.readouterr()
    assert run_grid(file) == 0 and not started
    word = name.removesuffix("_sha256")
    out = capsys.readouterr().out
    assert f"seed0: from other code: score 1.0000, the model has another {word} now" in out
    assert out.splitlines()[-1] == "0 done, 1 skipped, 1 from other code, 0 failed"
    assert run_grid(file, stale=True) == 0
    assert [task.parameters["seed"] for task in started] == [0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "[1] must be an object"),
        ("[" * 100_000, "brackets within brackets"),
        ('{"key": "', "is not a whole, strict JSON record"),
        ('{"key": "x"}', "is of another run (key"),
    ],
)
def test_a_damaged_record_is_reported_and_left_alone(text, message, monkeypatch, capsys):
    file = write_grid(vary={"seed": [0, 1]})
    pretend(monkeypatch)
    run_grid(file)
    (broken,) = Path("runs/grid").glob("seed0-*/record.json")
    broken.write_text(text)
    started = pretend(monkeypatch)
    capsys.readouterr()
    assert run_grid(file, stale=True) == 1 and not started
    out = capsys.readouterr().out
    assert message in out and out.splitlines()[-2].endswith(
        "1 skipped, 0 from other code, 1 failed"
    )
    assert broken.read_text() == text


def test_a_notebook_that_writes_no_record_has_failed(monkeypatch, capsys):
    pretend(monkeypatch, writes=False)
    assert run_grid(write_grid(vary={"seed": [0]})) == 1
    assert "the notebook ran to its end and wrote no record.json" in capsys.readouterr().out


def test_two_grids_at_once_in_one_folder_are_one_clear_error(monkeypatch, capsys):
    started = pretend(monkeypatch)
    file = write_grid(vary={"seed": [0]})
    Path("runs/grid").mkdir(parents=True)
    with claim(Path("runs/grid")):
        assert main(["grid", file]) == 1
    assert "runs/grid is in use by another process" in capsys.readouterr().err
    assert not started


def test_a_dry_run_tells_all_and_touches_nothing(monkeypatch, capsys):
    cost = {"optimizer_steps": 12345, "gpu_hours": 4.5, "basis": "a guess"}
    file = write_grid(vary={"seed": [0, 1, 2]}, cost=cost)
    pretend(monkeypatch, fails=[1])
    run_grid(file)
    (folder,) = Path("runs/grid").glob("seed2-*")
    (folder / "record.json").rename(folder / "checkpoint.pt")
    capsys.readouterr()
    started, before = pretend(monkeypatch), files()
    assert main(["grid", file, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cost: 12,345 optimizer steps, 4.5 GPU hours; a guess",
        "seed0: done, score 1.0000",
        "seed1: to do",
        "seed2: to do, goes on from its checkpoint",
        "3 runs, 540 optimizer steps in all",
    ]
    assert not started and files() == before
    assert main(["grid", file, "--dry-run", "--out", "elsewhere"]) == 0
    assert not Path("elsewhere").exists()


def test_a_run_whose_notebook_is_not_finished_is_to_do(monkeypatch, capsys):
    file = write_grid(vary={"seed": [0, 1]})
    pretend(monkeypatch)
    run_grid(file)
    folder = next(Path("runs/grid").glob("seed0-*"))
    (folder / ".notebook").write_text('{"given": ["fake.ipynb", {}], "replaces": ""}')
    assert main(["grid", file, "--dry-run"]) == 0
    assert "seed0: to do, its notebook is not finished\nseed1: done" in capsys.readouterr().out
    started = pretend(monkeypatch)
    run_grid(file)
    assert [task.parameters["seed"] for task in started] == [0]


# Processes


class Counted:
    """In place of submitit's executor: jobs that take a moment, counted while they run."""

    running, most, environments = 0, 0, []
    lock = threading.Lock()

    def __init__(self, folder):
        Counted.running, Counted.most, Counted.environments = 0, 0, []

    def update_parameters(self, **_):
        pass

    def submit(self, function, task, environment, grid_pid):
        with Counted.lock:
            Counted.running += 1
            Counted.most = max(Counted.most, Counted.running)
            Counted.environments.append(environment["CUDA_VISIBLE_DEVICES"])
        ends = time.monotonic() + 0.05
        return SimpleNamespace(done=lambda: time.monotonic() > ends and self.end(task), job_id=1)

    def end(self, task):
        with Counted.lock:
            Counted.running -= 1
        return True


@pytest.mark.parametrize("workers", [1, 3])
def test_never_more_jobs_at_once_than_workers_and_each_worker_has_a_gpu(workers, monkeypatch):
    monkeypatch.setattr(submitit, "LocalExecutor", Counted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7a")
    started = threading.active_count()
    ended = dict(
        processes.on_this_machine([[f"task {n}"] for n in range(7)], Path("logs"), workers)
    )
    assert sorted(ended) == list(range(7)) and threading.active_count() == started
    assert Counted.most == workers and Counted.running == 0
    assert set(Counted.environments) == {"5", "GPU-7a"} if workers > 1 else {"5"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_cannot_be_started_is_an_error_and_nobody_waits_for_it(workers, monkeypatch):
    class Full(Counted):
        def submit(self, *given):
            raise OSError("No space left on device")

    monkeypatch.setattr(submitit, "LocalExecutor", Full)
    packs = [[f"task {n}"] for n in range(5)]
    with pytest.raises(OSError, match="No space left"):
        list(processes.on_this_machine(packs, Path("logs"), workers))


def test_ctrl_c_while_jobs_are_being_started_ends_those_that_run(monkeypatch):
    ended = threading.Event()

    class Endless(Counted):
        def submit(self, *given):
            return SimpleNamespace(done=ended.is_set, job_id=1)

    class Interrupted(processes.ThreadPoolExecutor):
        def submit(self, function, pack):
            if pack == ["task 1"]:
                raise KeyboardInterrupt
            return super().submit(function, pack)

    monkeypatch.setattr(submitit, "LocalExecutor", Endless)
    monkeypatch.setattr(processes, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(processes, "_end", lambda job_id: ended.set())
    with pytest.raises(KeyboardInterrupt):
        next(processes.on_this_machine([["task 0"], ["task 1"]], Path("logs"), 1))


def test_workers_share_the_processors_and_the_gpus(monkeypatch):
    monkeypatch.setattr(processes.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [processes.share_of_machine(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert gpus == ["0", "1", "0"]
    assert processes.share_of_machine(0, 3)["OMP_NUM_THREADS"] == "2"
    assert processes.share_of_machine(0, 99)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.share_of_machine(1, 3)["CUDA_VISIBLE_DEVICES"] == ""


def start_grid(*words: str, **how) -> subprocess.Popen:
    """A grid in a process group of its own, as a terminal gives it one."""
    command = [sys.executable, "-m", "drlora_ref.experiments", "grid", "grid.yaml", *words]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, start_new_session=True, **pipe, **how)


def wait_for(condition, process=None, seconds=120):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.1)


def kernels() -> list[int]:
    found = [path.read_text() for path in Path("runs/grid").glob("*/kernel")]
    return [int(pid) for pid in found if pid]  # a file that is being written is empty first


def gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_grid_that_was_killed_leaves_no_process_and_then_runs_only_what_is_missing(capsys):
    file = write_grid(vary={"seed": [50, 1, 13]})
    process = start_grid("--workers", "2")
    # seed 50 waits; beside it seed 1 ends, and seed 13 follows
    wait_for(lambda: kernels() and list(Path("runs/grid").glob("seed13-*/fake.ipynb")), process)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: all(map(gone, kernels())), seconds=30)
    done = files(next(Path("runs/grid").glob("seed1-*")))

    assert main(["grid", file, "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert "/2] seed50: matthews 0.5000; " in out
    assert "/2] seed13: failed: ValueError: an unlucky seed; " in out
    assert "1 done, 1 skipped, 0 from other code, 1 failed" in out
    log = out.rsplit("(log: ", 1)[1].rstrip(")\n")
    assert not Path(log).is_absolute() and "an unlucky" in Path(log).read_text()
    (fifty,) = Path("runs/grid").glob("seed50-*")
    threads = max(1, processes.torch.get_num_threads() // 2)
    assert read_record(fifty)["environment"]["OMP_NUM_THREADS"] == str(threads)
    assert files(next(Path("runs/grid").glob("seed1-*"))) == done


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_ctrl_c_ends_the_jobs_and_leaves_the_rest_to_do(capsys):
    file = write_grid(vary={"seed": [50, 51]})
    process = start_grid(preexec_fn=ignore_ctrl_c)  # as a shell script starts what ends in &
    wait_for(kernels, process)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does it: to every process of the group
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out
    assert "interrupted: what has ended is kept, and the same command goes on from here" in out
    wait_for(lambda: all(map(gone, kernels())), seconds=30)
    assert main(["grid", file, "--dry-run"]) == 0
    assert "seed50: to do\nseed51: to do\n" in capsys.readouterr().out


def test_a_preempted_job_is_queued_again_and_goes_on():
    executor = submitit.LocalExecutor("logs")
    executor.update_parameters(timeout_min=60)
    folder = Path("runs/grid/seed50-0123")
    task = processes.WorkItem(Path("fake.ipynb"), folder, {"seed": 50})
    job = executor.submit(processes.ProcessWork(), [task], {}, os.getpid())
    wait_for(kernels)
    (process,) = psutil.Process(int(job.job_id)).children()
    process.send_signal(
        submitit.JobEnvironment._usr_sig()
    )  # as Slurm does before it takes the node
    wait_for(job.done)
    assert processes.error_of(job) == "" and read_record(folder)["seed"] == 50
    assert gone(*kernels())


def test_a_job_that_was_killed_is_told_from_one_that_failed():
    paths = SimpleNamespace(result_pickle=Path("none.pkl"), stderr=Path("log.err"))
    assert processes.error_of(SimpleNamespace(paths=paths)) == "the process was killed"


# Slurm


SBATCH = """#!{python}
import os, pathlib, subprocess, sys
pathlib.Path("submitted.sh").write_text(pathlib.Path(sys.argv[-1]).read_text())
for task in range(2):
    env = dict(SLURM_JOB_ID=str(42 + task), SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID=str(task),
               SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0",
               SLURM_LOCALID="0", SLURM_JOB_NODELIST="here")
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.Popen(["bash", "submitted.sh"], env=dict(os.environ, **env), **quiet)
print("Submitted batch job 42")
"""
SRUN = """#!{python}
import os, sys
_, _, _, out, _, error, *command = sys.argv  # --unbuffered --output FILE --error FILE ...
for number, name in ((1, out), (2, error)):
    name = name.replace("%A_%a", "42_" + os.environ["SLURM_ARRAY_TASK_ID"]).replace("%t", "0")
    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
os.execvp(command[0], command)
"""
SLURM = {
    "sbatch": SBATCH,
    "srun": SRUN,
    "squeue": "#!/bin/sh\ncat queue 2>/dev/null\n",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\n",
    "scancel": "#!/bin/sh\necho $* >> cancelled\n",
}


@pytest.fixture
def slurm(here, monkeypatch):
    """Something that answers to Slurm's commands, and runs an array of two jobs at once."""
    (here / "bin").mkdir()
    for name, text in SLURM.items():
        (here / "bin" / name).write_text(text.replace("{python}", sys.executable))
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(processes.submitit.SlurmJob.watcher, "_registered", set())


def test_slurm_that_is_not_there_is_one_clear_error_before_any_work(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    file, before = write_grid(vary={"seed": [0]}), files()
    assert main(["grid", file, "--cluster", "slurm"]) == 1
    error = capsys.readouterr().err
    assert "there is no Slurm here (sbatch, srun, squeue not found): use --cluster local" in error
    assert files() | {"grid.yaml": b""} == before | {"grid.yaml": b""}


def test_on_slurm_a_grid_is_one_array_bounded_by_the_workers(slurm, capsys):
    asked = {"partition": "fast", "gpus_per_node": 1, "timeout_min": 90}
    file = write_grid(vary={"seed": [1, 13]}, slurm=asked)
    assert main(["grid", file, "--cluster", "slurm", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "seed1: matthews 0.5000" in out and "failed: ValueError: an unlucky seed" in out
    script = Path("submitted.sh").read_text()
    for option in ("array=0-1%1", "partition=fast", "gpus-per-node=1", "time=90", "job-name=grid",
                   "signal=USR2@90"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script


def test_jobs_of_an_earlier_call_that_are_still_in_the_queue_are_not_started_twice(slurm, capsys):
    Path("runs/grid/logs").mkdir(parents=True)
    Path("runs/grid/logs/slurm_job").write_text("42")
    Path("queue").write_text("42_0 fast grid R\n")
    assert main(["grid", write_grid(vary={"seed": [0]}), "--cluster", "slurm"]) == 1
    assert "Slurm's job 42 is still at this grid: wait for it, or `scancel 42`" in (
        capsys.readouterr().err
    )


def test_what_slurm_cannot_be_asked_is_refused_before_any_work(slurm, capsys):
    file = write_grid(vary={"seed": [0]}, slurm={"gpus_per_node": "one"})
    assert main(["grid", file, "--cluster", "slurm"]) == 1
    assert "gpus_per_node" in capsys.readouterr().err and not Path("runs").exists()


def test_whoever_stops_listening_cancels_what_is_left_in_the_queue(slurm):
    start = processes.starter("slurm", Path("runs/grid/logs/001"), 1, {})
    tasks = [
        processes.WorkItem(Path("fake.ipynb"), Path(f"runs/grid/seed{n}-0"), {"seed": n})
        for n in (1, 50)
    ]
    ended = start([[task] for task in tasks])
    number, job = next(ended)
    assert number == 0 and processes.error_of(job) == ""
    wait_for(kernels)
    ended.close()
    assert Path("cancelled").read_text() == "42_1\n"
    os.kill(kernels()[0], signal.SIGKILL)  # nobody does what scancel says here


# The real thing, small


def test_replicas_leave_the_records_of_single_runs(capsys):
    """Three seeds of one task by twos; a method that cannot share runs by itself."""
    small = dict(data_dir="generated", model_name="tiny-roberta", max_steps=8, deltaT=2)
    notebook = os.path.relpath(ROOT / "notebooks" / "10_roberta_glue.ipynb")
    grid = dict(notebook=notebook, parameters=small, vary={"seed": [0, 1, 2]})
    file = write_grid(**grid)
    assert main(["grid", file, "--replicas", "3"]) == 0
    assert "3 done, 0 skipped" in capsys.readouterr().out
    found = [read_record(folder) for folder in Path("runs/grid").glob("seed*-*")]
    assert sorted(r["seed"] for r in found) == [0, 1, 2] and {r["replicas"] for r in found} == {3}
    assert main(["grid", file]) == 0  # the same runs, singly: they are done
    assert "0 done, 3 skipped" in capsys.readouterr().out


def test_a_grid_without_a_notebook_leaves_the_records_of_single_runs(capsys):
    """... of any parameter: no notebook takes `stride` of a GLUE task."""
    small = dict(data_dir="generated", max_steps=8, deltaT=2, stride=64)
    file = write_grid(notebook=None, parameters=small, vary={"method": ["lora", "bitfit"]})
    assert main(["grid", file, "--workers", "2"]) == 0
    assert "2 done, 0 skipped" in capsys.readouterr().out
    for folder in Path("runs/grid").glob("*-*"):
        record = read_record(folder)
        assert record["key"] == folder.name.rsplit("-")[-1] and record["steps"] == 8
        assert record["parameters"]["stride"] == 64
        assert record["environment"]["threads"] == max(1, processes.torch.get_num_threads() // 2)
        assert not list(folder.glob("*.ipynb"))
    assert main(["grid", file]) == 0 and "0 done, 2 skipped" in capsys.readouterr().out


def test_what_a_run_without_a_notebook_fails_of_is_one_line(capsys):
    work, (item,) = processes.ProcessWork(), pack_of_one(write_grid(notebook=None))
    item.folder.mkdir(parents=True)
    (item.folder / "checkpoint.pt").write_text("cut")
    with pytest.raises(RuntimeError, match=r"^ValueError: .*checkpoint\.pt") as caught:
        work([item], {})
    assert "\n" not in str(caught.value)


def pack_of_one(file: str) -> processes.Pack:
    (run,) = plan(read_grid(file), Path("runs/grid"))
    return [run.work]


def test_only_runs_that_may_share_an_encoder_are_packed_and_never_too_many():
    def of(label, encoder):
        return PlannedRun(label, label, 5, None, encoder)

    planned = [of("a1", "a"), of("b1", "b"), of("x", None), of("a2", "a"), of("a3", "a"),
               of("y", None), of("b2", "b"), of("a4", "a")]  # fmt: skip
    labels = [[run.label for run in one] for one in pack(planned, 2)]
    assert labels == [["a1", "a2"], ["b1", "b2"], ["x"], ["a3", "a4"], ["y"]]
    assert [len(one) for one in pack(planned, 1)] == [1] * 8


def test_a_plan_says_which_runs_may_share(monkeypatch):
    cases = [{"method": "drlora"}, {"method": "lora"}, {"method": "full"}]
    file = write_grid(cases=cases, vary={"seed": [0, 1], "max_steps": [5, 6]})
    by = {run.label: run.encoder for run in plan(read_grid(file), Path("runs"))}
    shared = {label: encoder for label, encoder in by.items() if "full" not in label}
    assert len(set(shared.values())) == 2  # five steps or six
    assert by["drlora-seed0-max_steps5"] == by["lora-seed1-max_steps5"] is not None
    assert not [encoder for label, encoder in by.items() if "full" in label and encoder]


def test_a_real_grid_runs_notebook_10(capsys):
    small = dict(data_dir="generated", model_name="tiny-roberta", max_steps=8, deltaT=2)
    notebook = os.path.relpath(ROOT / "notebooks" / "10_roberta_glue.ipynb")
    file = write_grid(notebook=notebook, parameters=small, vary={"method": ["lora"]})
    assert main(["grid", file]) == 0
    (folder,) = Path("runs/grid").glob("lora-*")
    record = read_record(folder)
    assert record["key"] == folder.name.rsplit("-")[-1] and record["code"] == code_hash()
    assert record["parameters"]["learning_rate"] == Settings.learning_rate
    assert len(summaries.load("runs/grid")) == 1
    assert main(["grid", file, "--dry-run"]) == 0
    assert "lora: done, matthews" in capsys.readouterr().out
