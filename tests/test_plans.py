"""What the file of a grid stands for, and every way in which it can be wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_grid import files, pretend, write_grid, write_notebook

from drlora_ref.experiments.__main__ import main
from drlora_ref.experiments.grids import plans
from drlora_ref.experiments.grids.plans import expand, plan, read_grid
from drlora_ref.experiments.results import paper
from drlora_ref.experiments.run.settings import Settings, run_key
from drlora_ref.experiments.tasks import grammar
from drlora_ref.inject import default_target_modules, find_targets

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "notebooks" / "grids").glob("*.yaml"))
SHIPPED = [file for file in SHIPPED if file.stem != "queue"]  # a list of grids


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder to work in, with fake.ipynb."""
    monkeypatch.chdir(tmp_path)
    write_notebook()
    return tmp_path


def test_every_case_meets_every_combination_side_by_side():
    file = write_grid(cases=[{"method": "lora", "target_r": 4}, {"method": "drlora"}],
                      vary={"task": ["cola", "rte"], "seed": [0, 1]})  # fmt: skip
    sets = expand(read_grid(file))
    assert [label for label, _ in sets] == [
        "lora-target_r4-cola-seed0", "drlora-cola-seed0", "lora-target_r4-cola-seed1",
        "drlora-cola-seed1", "lora-target_r4-rte-seed0", "drlora-rte-seed0",
        "lora-target_r4-rte-seed1", "drlora-rte-seed1",
    ]  # fmt: skip
    assert sets[2][1] == {"model_name": "tiny-roberta", "data_dir": "generated", "method": "lora",
                          "target_r": 4, "task": "cola", "seed": 1}  # fmt: skip


def test_a_run_has_the_key_that_its_record_will_have():
    (run,) = plan(read_grid(write_grid(vary={"seed": [4]})), Path("runs"))
    data = plans.FAMILIES["cola"].load_task("cola", "generated")
    sha256 = plans.resolve_model("tiny-roberta").sha256
    settings = Settings(data_dir="generated", model_name="tiny-roberta", seed=4)
    assert run.key == run_key(settings, data.fingerprint, sha256)
    assert run.folder == Path("runs", f"seed4-{run.key}")
    assert run.steps == 45 * 64 // 16


def test_the_notebook_gets_every_setting_that_it_has_whatever_its_own_values_are():
    (run,) = plan(read_grid(write_grid(vary={"seed": [4]})), Path("runs"))
    assert run.work.parameters == {
        "task": "cola", "data_dir": "generated", "model_name": "tiny-roberta", "method": "drlora",
        "seed": 4, "init_r": 3, "target_r": 2, "learning_rate": 2e-3, "max_steps": 0,
    }  # fmt: skip


def test_without_a_notebook_a_run_is_given_all_its_settings():
    beside = {"data_dir": "generated", "beta": 0.5, "stride": 64}
    (run,) = plan(read_grid(write_grid(notebook=None, parameters=beside)), Path("runs"))
    assert run.work.notebook is None
    given = Settings(model_name="tiny-roberta", **beside)
    assert Settings(**run.work.parameters) == given
    assert not set(run.work.parameters) & set(plans.PLACES)


def test_a_run_with_a_rank_map_is_planned_by_what_the_map_holds(capsys):
    sha256 = plans.resolve_model("tiny-roberta").sha256
    matrices = tiny_matrices()

    def ranks(first: int) -> dict[str, int]:
        return dict.fromkeys(matrices, 2) | {matrices[0]: first, matrices[1]: 4 - first}

    parameters = {"data_dir": "generated", "method": "lora", "rank_map": "found", "holdout": 14}
    grid = write_grid(notebook=None, parameters=parameters, vary={"seed": [0, 1]})
    with pytest.raises(FileNotFoundError, match="rank_map: found: no such file or folder"):
        plan(read_grid(grid), Path("runs"))
    for seed in (0, 1):
        folder = Path("found", f"donor{seed}")
        folder.mkdir(parents=True)
        held = {"seed": seed, "model": {"sha256": sha256}, "rank_pattern": ranks(seed)}
        (folder / "record.json").write_text(json.dumps(held))
    first, second = plan(read_grid(grid), Path("runs"))
    assert first.steps == 45 * 4  # four batches of the fifty rows that are left
    Path("found").rename("moved")
    again = write_grid(notebook=None, parameters=parameters | {"rank_map": "moved"},
                       vary={"seed": [0, 1]})  # fmt: skip
    assert [run.key for run in plan(read_grid(again), Path("runs"))] == [first.key, second.key]
    (Path("moved") / "donor1" / "record.json").write_text(json.dumps(
        {"seed": 1, "model": {"sha256": sha256}, "rank_pattern": ranks(3)}))  # fmt: skip
    changed = plan(read_grid(again), Path("runs"))
    assert changed[0].key != first.key and changed[1].key == second.key  # seed 1 gets donor 0's
    assert "share the map" not in capsys.readouterr().out
    more = write_grid(notebook=None, parameters=parameters | {"rank_map": "moved"},
                      vary={"seed": [0, 1, 2, 3]})  # fmt: skip
    plan(read_grid(more), Path("runs"))
    assert "moved: the runs of seeds [1, 2, 3] share the map of seed 0\n" in capsys.readouterr().out


# What is wrong about a map with rank 2 in each of these matrices, the other settings, the error.
MISFITS = {
    "a matrix that is not there": (lambda n: {"nowhere": 2}, {}, "has no matrix 'nowhere'"),
    "a matrix left out": (lambda n: {n[0]: "out"}, {}, "no rank for "),
    "no number": (lambda n: {n[0]: None}, {}, "None must be a whole number from 0"),
    "more than d": (lambda n: {n[0]: 999}, {}, "999 must be a whole number from 0 to"),
    "another budget": (lambda n: {n[0]: 3}, {}, "25 components in all, but the budget is"),
    "one rank everywhere": (lambda n: {}, {"permute_map": 1}, "no two matrices of one shape"),
}


def tiny_matrices() -> list[str]:
    """The names of tiny-roberta's twelve matrices."""
    model, _ = plans.FAMILIES["cola"].load_model(plans.resolve_model("tiny-roberta"), "cola")
    return list(find_targets(model, default_target_modules(model)))


@pytest.mark.parametrize("kind", MISFITS)
def test_a_map_that_does_not_fit_is_refused_before_the_first_run_of_a_grid(
    kind, capsys, monkeypatch
):
    started = pretend(monkeypatch)
    wrong, given, message = MISFITS[kind]
    names = tiny_matrices()
    ranks = dict.fromkeys(names, 2) | wrong(names)
    ranks = {name: rank for name, rank in ranks.items() if rank != "out"}
    Path("map.json").write_text(json.dumps(ranks))
    parameters = {"data_dir": "generated", "method": "lora"}
    cases = [{"target_r": 3}, {"rank_map": "map.json", **given}]
    write_grid(notebook=None, parameters=parameters, cases=cases)
    before = files()
    assert main(["grid", "grid.yaml"]) == 1
    error = capsys.readouterr().err
    assert message in error and "map.json" in error and error.count("\n") == 1
    assert not started and files() == before


def test_more_rows_than_there_are_cannot_be_drawn_and_held_out():
    parameters = {"data_dir": "generated", "train_size": 50, "holdout": 20}
    grid = write_grid(notebook=None, parameters=parameters)
    with pytest.raises(ValueError, match="train_size = 50 and holdout = 20: cola has 64 training"):
        plan(read_grid(grid), Path("runs"))


def test_the_papers_settings_yield_to_what_is_written_beside_them():
    beside = {"data_dir": "generated", "table_8": "large", "learning_rate": 0.1}
    vary = {"task": ["rte"], "method": ["h-adapter"]}
    file = write_grid(notebook=None, parameters=beside, vary=vary)
    (run,) = plan(read_grid(file), Path("runs"))
    given = run.work.parameters
    assert (given["bottleneck"], given["epochs"], given["learning_rate"]) == (32, 80, 0.1)


def rates(folder: str, seeds=(100, 101)) -> None:
    """Records of two methods at three rates: the middle one is best on average, not always."""
    for method, scores in {"lora": {1e-3: (0.1, 0.2), 2e-3: (0.5, 0.5), 3e-3: (0.7, 0.0)},
                           "drlora": {1e-3: (0.6, 0.6), 2e-3: (0.1, 0.9)}}.items():  # fmt: skip
        for rate, of_seeds in scores.items():
            for seed, score in zip(seeds, of_seeds, strict=True):
                target = Path(folder, f"{method}-{rate}-{seed}")
                target.mkdir(parents=True)
                given = {"task": "cola", "method": method, "learning_rate": rate, "seed": seed}
                record = dict(status="completed", best=score, evaluations=[], steps=9)
                record |= dict(total_steps=9, parameters=given, seed=seed)
                (target / "record.json").write_text(json.dumps(record))


def test_best_of_takes_the_rate_with_the_best_mean_for_each_method():
    rates("rates")
    file = write_grid(vary={"method": ["lora", "drlora"]},
                      best_of={"folder": "rates", "parameter": "learning_rate"})  # fmt: skip
    runs = plan(read_grid(file), Path("runs"))
    assert [run.work.parameters["learning_rate"] for run in runs] == [2e-3, 1e-3]


def test_best_of_chooses_several_parameters_together_and_apart_for_what_by_names():
    """At this score the small batch is best with the higher rate, at that one the large batch."""
    scores = {("abs_c", 16, 1e-3): 0.1, ("abs_c", 16, 2e-3): 0.9, ("abs_c", 32, 1e-3): 0.8,
              ("random", 16, 2e-3): 0.2, ("random", 32, 2e-3): 0.3}  # fmt: skip
    for number, ((score, size, rate), best) in enumerate(scores.items()):
        target = Path("rates", str(number))
        target.mkdir(parents=True)
        given = dict(task="cola", method="drlora", score=score, batch_size=size, seed=100)
        record = dict(status="completed", best=best, evaluations=[], steps=9, total_steps=9)
        record["parameters"] = given | {"learning_rate": rate}
        (target / "record.json").write_text(json.dumps(record | {"seed": 100}))
    best_of = {"folder": "rates", "parameter": ["learning_rate", "batch_size"],
               "by": ["method", "score"]}  # fmt: skip
    file = write_grid(notebook=None, vary={"score": ["abs_c", "random"]}, best_of=best_of)
    given = [run.work.parameters for run in plan(read_grid(file), Path("runs"))]
    assert [(g["learning_rate"], g["batch_size"]) for g in given] == [(2e-3, 16), (2e-3, 32)]


def tried(*runs: dict) -> None:
    """Records in rates/, each with these parameters and this `best`."""
    for number, run in enumerate(runs):
        target = Path("rates", str(number))
        target.mkdir(parents=True)
        best, status = run.pop("best"), run.pop("status", "completed")
        record = dict(status=status, best=best, evaluations=[], steps=9, total_steps=9)
        given = {"task": "cola", "method": "lora", "seed": 100} | run
        (target / "record.json").write_text(json.dumps(record | {"parameters": given, "seed": 100}))


def chosen(parameter, by=("task", "method"), **grid) -> list:
    best_of = {"folder": "rates", "parameter": parameter, "by": list(by)}
    file = write_grid(notebook=None, best_of=best_of, **grid)
    return [run.work.parameters for run in plan(read_grid(file), Path("runs"))]


def test_best_of_takes_the_cell_that_a_word_for_several_parameters_stands_for():
    """The paper's two budgets have other ranks, and here each rank has another best rate."""
    best = {(2, 1e-3): 0.6, (2, 2e-3): 0.5, (8, 1e-3): 0.5, (8, 2e-3): 0.6}
    tried(*[dict(target_r=r, learning_rate=rate, best=b) for (r, rate), b in best.items()])
    beside = {"data_dir": "generated", "method": "lora"}
    for budget, rank, rate in (("small", 2, 1e-3), ("large", 8, 2e-3)):
        (run,) = chosen("learning_rate", ("task", "method", "target_r"),
                        parameters=beside | {"table_8": budget})  # fmt: skip
        assert (run["target_r"], run["learning_rate"]) == (rank, rate)


def test_best_of_may_choose_the_score_of_importance():
    tried(*[dict(method="drlora", score=s, best=b) for s, b in (("abs_c", 0.5), ("random", 0.4))])
    (run,) = chosen("score", parameters={"data_dir": "generated", "method": "drlora"})
    assert run["score"] == "abs_c"


def test_a_whole_number_stays_one_beside_runs_that_lack_it():
    tried(*[dict(batch_size=size, best=b) for size, b in ((16, 0.5), (32, 0.6))],
          dict(method="bitfit", best=0.5))  # fmt: skip
    beside = {"data_dir": "generated"}
    (run,) = chosen("batch_size", parameters=beside | {"method": "lora"})
    assert run["batch_size"] == 32 and isinstance(run["batch_size"], int)
    with pytest.raises(ValueError, match="best_of has no runs of task = cola, method = bitfit"):
        chosen("batch_size", parameters=beside | {"method": "bitfit"})


def test_best_of_chooses_between_two_at_least():
    tried(dict(learning_rate=1e-3, best=0.5), dict(learning_rate=1e-3, best=0.6, seed=101))
    with pytest.raises(ValueError, match="rates has one value of learning_rate for task = cola"):
        chosen("learning_rate", parameters={"data_dir": "generated", "method": "lora"})


def test_best_of_says_how_many_runs_have_not_ended(capsys):
    tried(*[dict(learning_rate=r, best=r) for r in (1e-3, 2e-3)])
    Path("rates", "2").mkdir()
    Path("rates", "2", "checkpoint.pt").write_bytes(b"begun")
    (run,) = chosen("learning_rate", parameters={"data_dir": "generated", "method": "lora"})
    assert run["learning_rate"] == 2e-3
    assert "best_of: in rates 1 of the runs have not ended" in capsys.readouterr().out


def test_best_of_is_not_hindered_by_runs_that_the_grid_does_not_need():
    tried(*[dict(learning_rate=r, best=r) for r in (1e-3, 2e-3)],
          dict(learning_rate=1.0, best=None, status="diverged", method="full"))  # fmt: skip
    (run,) = chosen("learning_rate", parameters={"data_dir": "generated", "method": "lora"})
    assert run["learning_rate"] == 2e-3


def test_a_grid_does_not_write_into_the_folder_of_its_maps():
    for seed in (0, 1):
        Path("found", str(seed)).mkdir(parents=True)
        Path("found", str(seed), "record.json").write_text(json.dumps({"seed": seed}))
    parameters = {"data_dir": "generated", "method": "lora", "rank_map": "found"}
    grid = read_grid(write_grid(notebook=None, parameters=parameters))
    with pytest.raises(ValueError, match=r"rank_map = 'found': found.more lies in it"):
        plan(grid, Path("found/more"))


def test_of_runs_that_all_diverged_none_is_best():
    tried(*[dict(learning_rate=r, best=None, status="diverged") for r in (1.0, 2.0)])
    with pytest.raises(
        ValueError, match=r"best_of: rates: .*every run diverged: no learning_rate is"
    ):
        chosen("learning_rate", parameters={"data_dir": "generated", "method": "lora"})


@pytest.mark.parametrize("word", ["table_8", "follow", "rank"])
def test_best_of_refuses_what_no_record_has(word):
    tried(dict(learning_rate=1e-3, best=0.5))
    for given in (("learning_rate", ("task", word)), (word, ("task",))):
        with pytest.raises(ValueError, match=f"best_of: a record has no '{word}'"):
            chosen(*given, parameters={"data_dir": "generated", "method": "lora"})


def test_best_of_without_records_says_what_to_do_first():
    grid = write_grid(best_of={"folder": "rates", "parameter": "learning_rate"})
    with pytest.raises(FileNotFoundError, match=r"below rates: run the grid that fills it"):
        plan(read_grid(grid), Path("runs"))


@pytest.mark.parametrize(
    "vary, message",
    [
        (
            {"seed": [1, 101]},
            r"rates has runs with the seeds \[101\] too: what is chosen on a seed",
        ),
        ({"task": ["cola", "rte"]}, "rte: best_of has no runs of task = rte, method = drlora"),
    ],
)
def test_best_of_refuses_what_would_not_be_a_choice(vary, message):
    rates("rates")
    best_of = {"folder": "rates", "parameter": "learning_rate"}
    with pytest.raises(ValueError, match=message):
        plan(read_grid(write_grid(vary=vary, best_of=best_of)), Path("runs"))


MALFORMED = {
    "notebook: [": "grid.yaml is not YAML",
    "": "grid.yaml must hold lines of `name: value`",
    "- 1": "must hold lines of `name: value`",
    "notebook: ": "notebook = None must be a str",
    "{notebook: fake.ipynb, varry: {seed: [0]}}": "a grid has no 'varry' (nearest: vary)",
    "{notebook: fake.ipynb, vary: [0]}": "vary = [0] must be a dict",
    "{notebook: fake.ipynb, vary: {seed: []}}": "seed = [] must be a list, and not an empty one",
    "{notebook: fake.ipynb, vary: {seed: 3}}": "seed = 3 must be a list",
    "{notebook: fake.ipynb, cases: []}": "cases = [] must be a list, and not an empty one",
    "{notebook: fake.ipynb, cases: [lora]}": "the case 'lora' must be names with values",
    "{notebook: fake.ipynb, vary: {sed: [0]}}": "a run has no 'sed' (nearest: seed)",
    "{notebook: fake.ipynb, parameters: {output_dir: x}}": "a run has no 'output_dir'",
    "{notebook: fake.ipynb, parameters: {seed: 1}, vary: {seed: [0]}}": "sets seed in two places",
    "{notebook: fake.ipynb, cases: [{seed: 1}, {}], vary: {seed: [0]}}": "sets seed in two places",
    "{notebook: fake.ipynb, cost: {steps: 3}}": "cost needs optimizer_steps, gpu_hours, basis",
    "{notebook: fake.ipynb, best_of: {folder: x}}": "best_of needs folder, parameter, by, not",
    "{notebook: fake.ipynb, cost: {optimizer_steps: 1e6, gpu_hours: 1, basis: none}}": "'1e6'",
    "{notebook: fake.ipynb, cost: {optimizer_steps: true, gpu_hours: 1, basis: x}}": "cost needs",
    "{notebook: fake.ipynb, cost: {optimizer_steps: -1, gpu_hours: 1, basis: x}}": "cost needs",
    "{notebook: fake.ipynb, cost: {optimizer_steps: 1, gpu_hours: .nan, basis: x}}": "cost needs",
    "{notebook: fake.ipynb, cost: {optimizer_steps: 1, gpu_hours: .inf, basis: x}}": "cost needs",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: []}}": "best_of needs folder, param",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: [[seed]]}}": "best_of needs folder",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: {seed: 1}}}": "best_of needs folder",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: learning_rate, by: []}}":
        "best_of needs folder, parameter, by, not",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: learning_rate, by: [[task]]}}":
        "best_of needs folder, parameter, by, not",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: learning_rate, by: [1]}}":
        "best_of needs folder, parameter, by, not",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: seed}}": "cannot choose seed",
    "{notebook: fake.ipynb, best_of: {folder: x, parameter: [learning_rate, method]}}":
        "best_of cannot choose method: a parameter is chosen for each of what `by` names",
    "{notebook: fake.ipynb, slurm: {partition: [gpu]}}": "partition = ['gpu'] must be a word or a",
    "{notebook: fake.ipynb, slurm: {mem_gb: .nan}}": "mem_gb = nan must be a word or a whole",
    "{notebook: fake.ipynb, slurm: {qos: }}": "qos = None must be a word or a whole number",
    "{notebook: fake.ipynb, slurm: {gpus_per_node: on}}": "gpus_per_node = True must be a word",
    "{notebook: fake.ipynb, vary: {task: [[cola, rte]]}}": "['cola', 'rte'] must be a word, a numb",
    "{notebook: fake.ipynb, cases: [{seed: }]}": "None must be a word, a number, true or false",
    "{notebook: fake.ipynb, slurm: {partion: gpu}}": "slurm has no 'partion' (nearest: partition)",
    "{notebook: none.ipynb}": "none.ipynb: no such notebook",
    "{notebook: fake.ipynb, vary: {beta: [0.5]}}": "fake.ipynb has no parameter 'beta'",
    "{notebook: fake.ipynb, vary: {learning_rate: [1e-3]}}":
        "learning_rate = '1e-3': expected a number, as 0.001 (YAML reads 1e-3 as a word",
    "{notebook: fake.ipynb, vary: {seed: [0.5]}}": "seed = 0.5: expected a whole number, as 0",
    "{notebook: fake.ipynb, vary: {task: [coal]}}": "coal: unknown task 'coal' (nearest: cola)",
    "{notebook: fake.ipynb, vary: {method: [dora]}}": "dora: unknown method 'dora'",
    "{notebook: fake.ipynb, parameters: {table_8: huge}}": "unknown budget 'huge' (nearest: none)",
    "{notebook: fake.ipynb, parameters: {table_8: small}, vary: {task: [rte]}}":
        "rte needs epochs = 80, which the notebook does not take",
    "{notebook: fake.ipynb, parameters: {data_dir: generated}, vary: {model_name: [minilm-l7]}}":
        "unknown model 'minilm-l7' (nearest: minilm-l6): use minilm-l6, ",
    "{notebook: fake.ipynb, parameters: {data_dir: nowhere}}": "nowhere",
    "{notebook: fake.ipynb, parameters: {data_dir: generated, model_name: tiny-roberta,"
    " init_r: 1}}":
        "target_r = 2 is above init_r = 1",
    "{notebook: fake.ipynb, parameters: {data_dir: generated, model_name: tiny-roberta},"
    " vary: {seed: [0, 1, 0]}}": "seed0 and seed0 are the same run",
}  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_grid_that_cannot_be_is_one_line_before_any_work(text, capsys, monkeypatch):
    started = pretend(monkeypatch)
    write_grid(text)
    before = files()
    assert main(["grid", "grid.yaml"]) == 1
    error = capsys.readouterr().err
    assert MALFORMED[text] in error and error.count("\n") == 1
    assert not started and files() == before


THOUSAND = list(range(1000))
ENDLESS = {
    "vary": {"vary": {"seed": THOUSAND, "batch_size": THOUSAND, "epochs": THOUSAND}},
    "cases": {"cases": [{"seed": n} for n in THOUSAND],
              "vary": {"batch_size": THOUSAND, "epochs": THOUSAND}},
    "many short lists": {"vary": {name: [0, 1] for name in
                                  "seed init_r target_r epochs batch_size max_steps max_length "
                                  "train_size holdout deltaT bottleneck stride num_beams "
                                  "permute_map".split()}},
}  # fmt: skip


@pytest.mark.parametrize("form", ENDLESS)
def test_a_grid_of_a_billion_runs_says_so_at_once(form, monkeypatch, capsys):
    def no_time(*given):
        raise AssertionError("something was looked up")

    monkeypatch.setattr(plans, "_look_at", no_time)
    assert main(["grid", write_grid(json.dumps(ENDLESS[form])), "--dry-run"]) == 1
    said = "1,000,000,000 runs" if form != "many short lists" else "16,384 runs"
    assert f"{said}, a grid has 10,000 at most" in capsys.readouterr().err


def test_a_missing_grid_and_no_workers_are_named(capsys):
    assert main(["grid", "none.yaml"]) == 1
    assert "none.yaml: no such file" in capsys.readouterr().err
    assert main(["grid", write_grid(), "--workers", "0"]) == 1
    assert "workers = 0: must be at least 1" in capsys.readouterr().err


# The grids of the paper's tables


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_grid_stands_for_the_runs_and_the_steps_that_it_says(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = yaml.safe_load(paper.FILE.read_text())
    sizes = printed["train_examples"] | {"grammar": len(grammar.grammar_sentences("train"))}
    monkeypatch.setattr(plans, "_look_at", lambda task, data_dir: (task, sizes[task]))
    monkeypatch.setattr(plans, "resolve_model", lambda name: SimpleNamespace(sha256=name))
    grid = read_grid(file)
    monkeypatch.setattr(plans, "find_rank_map", lambda settings, sha256: None)
    monkeypatch.setattr(plans, "_Best", AnyCell)
    runs = plan(grid, Path("runs"))
    assert sum(run.steps for run in runs) == grid["cost"]["optimizer_steps"]
    hours = sum(run.steps / speed(run) for run in runs) / 3600
    on_a_cpu = ("smoke", "trial", "grammar")
    on_a_gpu = file.stem.startswith("trial_base") or not file.stem.startswith(on_a_cpu)
    assert grid["cost"]["gpu_hours"] == pytest.approx(hours * on_a_gpu, rel=0.01, abs=0.05)


class AnyCell:
    """As _Best, with the same values for every cell."""

    def __init__(self, grid, seeds):
        self.values = {"learning_rate": 1e-3} if "best_of" in grid else {}

    def of(self, given):
        return self.values


def speed(run) -> float:
    """Steps a second on one H100, as the grids' `basis` has them."""
    measured = {"lora": 13.3, "drlora": 8.4, "adalora": 5.6, "full": 19.3}
    like = {"h-adapter": "lora", "p-adapter": "lora", "bitfit": "full", "prune-once": "lora"}
    method, task = run.work.parameters["method"], run.work.parameters["task"]
    slower = 3 if task.startswith("squad") else 6 if task == "xsum" else 1
    return measured[like.get(method, method)] / slower


COUNTS = {
    "check_1_uniform_random_informed": 6 * 4 * 5,
    "check_2_gradient_norms": 2 * 5 * 2 * 5,
    "check_3_budgets": 4 * 4 * 5,
    "question_3_penalties": 13 * 2 * 5,
    "scores_and_curves": 7 * 4 * 5,
    "figure_2": 4 * 3,
    "grammar_laptop": 3,
    "smoke_cola": 2 * 2,
    "table_2": 12 * 8 * 5,
    "table_2_rates": 7 * 8 * 6 * 2,
    "table_3": 12 * 2 * 5,
    "table_3_rates": 7 * 2 * 6 * 2,
    "table_4": 7 * 5,
    "table_4_rates": 4 * 6 * 2,
    "table_5": 9 * 5,
    "table_6": 5 * 3 * 5,
    "table_9": 7 * 3,
    "trial_sst2_layer": 8,
    "trial_sst2_length": 2 * 2 * 2,
    "trial_base_rates": 2 * 4 * 2 * 4 * 2,
    "trial_base_arms": 5 * 4 * 2 * 4,
    "trial_base": 9 * 4 * 8,
    "trial_base_answers": 4 * 8,
    "trial_base_maps": 4 * 8 * 2,
}
for _task in ("sst2", "cola", "grammar"):
    COUNTS |= {
        f"trial_{_task}_rates": 2 * 4 * 2 * 2,
        f"trial_{_task}_arms": 5 * 2 * 4,
        f"trial_{_task}": 9 * 8,
        f"trial_{_task}_answers": 8,
        f"trial_{_task}_maps": 2 * 8,
    }


def test_the_shipped_grids_are_of_the_size_of_their_tables():
    assert {file.stem: len(expand(read_grid(file))) for file in SHIPPED} == COUNTS


@pytest.mark.parametrize("table", ["table_2", "table_3", "table_4"])
def test_the_rates_are_chosen_on_other_seeds_and_for_every_cell_of_the_table(table):
    final, tried = ([given for _, given in expand(read_grid(ROOT / f"notebooks/grids/{name}.yaml"))]
                    for name in (table, f"{table}_rates"))  # fmt: skip
    assert not {run["seed"] for run in final} & {run["seed"] for run in tried}
    cells = [{(run["task"], run["method"]) for run in runs} for runs in (final, tried)]
    assert cells[0] == cells[1]


def test_follow_authors_sets_what_their_code_does_otherwise_unless_the_grid_says_more():
    (run,) = plan(read_grid(write_grid(notebook=None, parameters=dict(
        task="xsum", model_name="tiny-bart", data_dir="generated", follow="authors",
        weight_decay=0.02))), Path("runs"))  # fmt: skip
    given = run.work.parameters
    assert (given["weight_decay"], given["precision"], given["scoring"]) == (
        0.02,
        "fp32",
        "authors",
    )
    (run,) = plan(read_grid(write_grid(notebook=None, parameters=dict(
        data_dir="generated", follow="authors"))), Path("runs"))  # fmt: skip
    assert run.work.parameters["weight_decay"] == 0.01
    assert run.work.parameters["scoring"] == "official"  # cola has nothing else


def test_only_the_authors_can_be_followed(capsys):
    write_grid(notebook=None, parameters=dict(data_dir="generated", follow="author"))
    assert main(["grid", "grid.yaml"]) == 1
    assert "unknown follow 'author' (nearest: authors)" in capsys.readouterr().err
