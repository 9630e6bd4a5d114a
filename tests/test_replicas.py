"""Many runs on one encoder: each as if it were alone, whatever the others do."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import TINY_BART
from datasets import Dataset
from tiny_runs import still_model, without_costs
from torch import nn
from trainer_script import SIZES

from drlora_ref import PENALTIES, BudgetSchedule, penalty_loss
from drlora_ref.experiments import methods
from drlora_ref.experiments.replicas import model as replicas
from drlora_ref.experiments.replicas.many_runs import check_replicas, run_replicas, set_up_replicas
from drlora_ref.experiments.replicas.rows import PaddedRows
from drlora_ref.experiments.results import summaries as results
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.sources import models
from drlora_ref.experiments.tasks import glue
from drlora_ref.inject import in_head
from drlora_ref.layer import dynamic_layers
from drlora_ref.train import train

# Sixty steps: pruning events from step 9 on, the last one at step 30, the mask fixed after it.
BASE = Settings(
    task="cola", data_dir="generated", model_name="tiny-roberta", max_steps=60, deltaT=4,
    learning_rate=1e-2, lora_alpha=32.0, dem_weight=0.3, checkpoint_every=7,
)  # fmt: skip
# Whatever may differ, differs here.
DIFFERENT = [
    dict(seed=0),
    dict(seed=1, learning_rate=5e-3, dem_weight=0.0),
    dict(seed=2, method="lora"),
    dict(seed=3, init_r=5, target_r=2, score="abs_c"),
    dict(seed=4, curve="adalora", score="random"),
    dict(seed=5, score="frobenius_norm", target_r=1),
    dict(seed=6, score="output_norm"),
    dict(seed=7, init_r=4, score="loss_sensitivity"),
    dict(seed=8, init_r=4, score="frobenius_norm", uniform=True),
]


def settings(folder, *changes, **given) -> list[Settings]:
    base = dataclasses.replace(BASE, **given)
    return [
        dataclasses.replace(base, output_dir=str(folder / str(i)), **change)
        for i, change in enumerate(changes)
    ]


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A tiny encoder without dropout: random numbers are drawn otherwise for many than for one."""
    folder = tmp_path_factory.mktemp("still")
    still_model(folder)
    return dict(model_name=str(folder), lora_dropout=0.0)


@pytest.fixture(scope="module")
def together(tmp_path_factory, still):
    """Different replicas trained in one pass: (engine, their records)."""
    runs, loop = set_up_replicas(settings(tmp_path_factory.mktemp("together"), *DIFFERENT, **still))
    trained = zip(runs, loop.run(), strict=True)
    return loop.engine, [one_run.make_record(ready, own) for ready, own in trained]


@pytest.mark.parametrize("i", range(len(DIFFERENT)))
def test_each_replica_follows_the_page_long_loop(i, together, still, tmp_path):
    (alone,) = settings(tmp_path, DIFFERENT[i], **still)
    ready, (engine, found) = one_run.set_up(alone), together
    model, allocator = ready.prepared.model, ready.prepared.allocator
    record = train(
        model,
        *ready.inputs[:3],
        ready.schedule,
        allocator,
        dem_weight=alone.dem_weight if allocator else 0.0,
        learning_rate=alone.learning_rate,
        batch_size=alone.batch_size,
        seed=alone.seed,
    )
    assert found[i]["status"] == record["status"] != "diverged" and record["steps"] == 60
    theirs = torch.tensor(record["loss_curve"])
    torch.testing.assert_close(torch.tensor(found[i]["loss_curve"]), theirs, atol=3e-5, rtol=0)
    assert found[i]["budget_curve"] == record["budget_curve"]
    assert found[i]["best"] == pytest.approx(record["best"])
    if allocator:
        assert found[i]["rank_pattern"] == record["rank_pattern"]
        for name, layer in dynamic_layers(model).items():
            r = len(layer.lora_c)
            for here, there in (
                (engine.layers[name].lora_A[i, :r], layer.lora_A),
                (engine.layers[name].lora_B[i, :, :r], layer.lora_B),
                (engine.layers[name].lora_c[i, :r], layer.lora_c),
            ):
                # Sixty steps at a rate of 1e-2; how far rounding drifts apart depends on the CPU.
                torch.testing.assert_close(here, there, atol=3e-5, rtol=0)


def test_padding_stays_zero_and_loras_c_stays_one(together):
    engine, _ = together
    for layer in engine.layers.values():
        for i, change in enumerate(DIFFERENT):
            r = 2 if change.get("method") == "lora" else change.get("init_r", 3)
            assert not layer.lora_A[i, r:].any() and not layer.lora_B[i, :, r:].any()
            assert not layer.lora_c[i, r:].any() and layer.lora_A[i, :r].any()
        assert torch.equal(layer.lora_c[2], torch.tensor([1.0, 1, 0, 0, 0]))


@pytest.mark.parametrize("name", PENALTIES)
def test_the_penalty_of_a_replica_is_that_of_its_own_components(name, tmp_path):
    """With LoRA's, and with one that is padded; and padding is not pulled."""
    changes = dict(seed=0), dict(seed=1, method="lora"), dict(seed=2, init_r=5)
    given = settings(tmp_path, *changes, penalty=name, max_steps=8)
    _, loop = set_up_replicas(given)
    allocator, sizes = loop.engine.allocator, (3, 2, 5)
    together = allocator.penalty(name)
    for i, r in enumerate(sizes):
        alone = {
            at: SimpleNamespace(
                lora_A=m.lora_A[i, :r], lora_B=m.lora_B[i, :, :r], lora_c=m.lora_c[i, :r]
            )
            for at, m in allocator.layers.items()
        }
        torch.testing.assert_close(together[i], penalty_loss(alone, name))
    together.sum().backward()
    for layer in allocator.layers.values():
        assert not layer.lora_A.grad[0, 3:].any() and not layer.lora_B.grad[0, :, 3:].any()


def bits(engine, i: int) -> list[torch.Tensor]:
    tensors = [*engine.trainable.values(), *(m.component_mask for m in engine.layers.values())]
    return [t[i].detach().clone() for t in tensors]


@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=3e-3, dem_weight=0.1, score="abs_c", curve="adalora"),
        dict(method="lora"),
        dict(learning_rate=1e30),  # which diverges
    ],
)
def test_what_one_replica_does_changes_no_bit_of_the_others(change, tmp_path):
    """With dropout, pruning and the freeze."""

    def run(folder, second):
        changes = dict(seed=0), second, dict(seed=2)
        _, loop = set_up_replicas(settings(tmp_path / folder, *changes, max_steps=40))
        return loop.engine, [trained.history for trained in loop.run()]

    before, found_before = run("before", dict(seed=1))
    after, found_after = run("after", dict(seed=1) | change)
    for i in (0, 2):
        assert all(map(torch.equal, bits(before, i), bits(after, i)))
        assert found_before[i] == found_after[i]
    assert not all(map(torch.equal, bits(before, 1), bits(after, 1)))


def test_a_replica_that_diverges_is_flagged_and_the_others_finish(tmp_path, capsys):
    records = run_replicas(
        settings(tmp_path, dict(seed=0), dict(seed=1, learning_rate=1e30), max_steps=40)
    )
    assert records[0]["status"] == "completed"
    assert records[1]["status"] == "diverged" and records[1]["best"] is None
    assert records[1]["flagged_at"] < 10 and None in records[1]["loss_curve"]
    assert records[0]["steps"] == 40 and records[0]["best"] is not None
    assert sum(records[0]["rank_pattern"].values()) == 12 * 2
    assert f"replica 1 diverged at step {records[1]['flagged_at']}" in capsys.readouterr().out


def test_records_are_those_of_single_runs_and_say_how_many_shared(tmp_path, still):
    given = settings(tmp_path, *DIFFERENT[:2], **still, max_steps=8, penalty="l2")
    records = run_replicas(given)
    for one, record in zip(given, records, strict=True):
        alone = one_run.run(dataclasses.replace(one, output_dir=one.output_dir + "-alone"))
        assert record["key"] == alone["key"] and record.keys() - alone.keys() == {"replicas"}
        assert record["replicas"] == 2
        for counted in ("trainable_parameters", "trained_bytes", "total_steps"):
            assert record[counted] == alone[counted]
        folder = {"output_dir": Path(one.output_dir).name}
        assert record["parameters"] == alone["parameters"] | folder
        norms = [torch.tensor(r["gradient_norm_curve"]) for r in (record, alone)]
        torch.testing.assert_close(*norms, atol=3e-5, rtol=1e-4)
    table = results.load(tmp_path)
    for cost in ("steps_per_second", "seconds"):  # of the pass, not of a run: not counted
        assert len(table) == 4 and table[cost].isna().sum() == 2
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_replicas_answer_questions_as_single_runs_do(tmp_path, still):
    """Rows are padded to the longest of all replicas, and no position of that padding counts."""
    squad = dict(task="squad_v1", max_length=64, stride=8, max_steps=8)
    given = settings(tmp_path, dict(seed=0), dict(seed=1, method="lora"), **still, **squad)
    for one, record in zip(given, run_replicas(given), strict=True):
        alone = one_run.run(dataclasses.replace(one, output_dir=one.output_dir + "-alone"))
        assert record["key"] == alone["key"]
        for name in ("rank_pattern", "budget_curve", "trainable_parameters", "evaluations"):
            assert record[name] == alone[name], name
        losses = [torch.tensor(r["loss_curve"]) for r in (record, alone)]
        torch.testing.assert_close(*losses, atol=3e-5, rtol=0)


# By its loss, seen at a look; or by its scores, at the pruning event right after the step.
DIVERGES = [dict(learning_rate=1e30), dict(learning_rate=1e18, score="frobenius_norm"),
            dict(learning_rate=1e8), dict(learning_rate=1e30, score="output_norm"),
            dict(learning_rate=1e30, method="lora")]  # fmt: skip


@pytest.mark.parametrize("calendar", [{}, dict(tinit=0.0, deltaT=1, warmup=0.0)])
@pytest.mark.parametrize("change", DIVERGES)
def test_the_record_of_a_replica_that_diverges_is_the_lone_runs(change, calendar, still, tmp_path):
    """Flagged in the same step, ended at the same look, with the same mask."""
    given = settings(tmp_path, change, dict(seed=1), **still, max_steps=40, **calendar)
    ready, loop = set_up_replicas(given)
    lone = one_run.set_up(dataclasses.replace(given[0], output_dir=str(tmp_path / "lone")))
    alone = one_run.make_record(lone, one_run.train(lone))
    trained = loop.run()
    together = one_run.make_record(ready[0], trained[0])
    assert alone["status"] == "diverged"
    for name in ("status", "flagged_at", "steps", "rank_pattern", "budget_curve", "evaluations"):
        assert together[name] == alone[name], name
    assert trained[1].history.flagged_at is None and len(trained[1].history.losses) == 40


class Cut(Exception):
    pass


def run_until(step: int, given: list[Settings]) -> None:
    """Train these replicas and stop dead in the middle of a step, as a process that is killed."""
    _, loop = set_up_replicas(given)
    whole = loop.engine.optimizer_step

    def cut(at, group):
        if at == step:
            raise Cut
        return whole(at, group)

    loop.engine.optimizer_step = cut
    with pytest.raises(Cut):
        loop.run()


@pytest.mark.parametrize("step", [9, 26])
def test_a_pass_that_was_cut_goes_on_to_the_same_records(step, tmp_path):
    changes = [DIFFERENT[0], *DIFFERENT[4:], dict(seed=8, learning_rate=1e30)]
    whole = run_replicas(settings(tmp_path / "whole", *changes, max_steps=40))
    run_until(step, settings(tmp_path / "cut", *changes, max_steps=40))
    resumed = run_replicas(settings(tmp_path / "cut", *changes, max_steps=40))
    for one, other in zip(whole, resumed, strict=True):
        assert without_costs(one) == without_costs(other)


def test_a_checkpoint_of_other_replicas_is_refused(tmp_path):
    run_until(9, settings(tmp_path, dict(seed=0), dict(seed=1), max_steps=40))
    with pytest.raises(ValueError, match=r"is of another run .*replicas"):
        run_replicas(settings(tmp_path, dict(seed=0), dict(seed=2), max_steps=40))


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, still):
    losses = []
    for k in (1, 4):
        given = dict(still, max_steps=12, batch_size=16 // k, grad_accumulation=k)
        _, loop = set_up_replicas(settings(tmp_path / str(k), *DIFFERENT[:3], **given))
        losses.append(torch.tensor([trained.history.losses for trained in loop.run()]))
    torch.testing.assert_close(*losses, atol=3e-5, rtol=0)


@pytest.mark.parametrize("labels", [2, 1])
@pytest.mark.parametrize(
    "kind, sizes", [("Roberta", SIZES), ("Bert", SIZES), ("MPNet", SIZES), ("Bart", TINY_BART)]
)
def test_replicas_compute_what_each_single_model_computes(kind, sizes, labels):
    """Every kind of encoder that the package adapts, whatever its head; classes or a score."""
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=labels)
    model_class = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(9)
    base, singles = model_class(config), []
    for method in ("drlora", "lora", "drlora"):
        single = copy.deepcopy(base)
        for name, p in single.named_parameters():  # another head for each
            if in_head(name):
                nn.init.normal_(p, std=0.1)
        schedule = BudgetSchedule(4 if not singles else 2, 2, 10)
        singles.append(methods.prepare(method, single, schedule))
        for layer in dynamic_layers(single).values():
            nn.init.normal_(layer.lora_c)
    shared = replicas.replicate(base, [replicas.take_apart(p) for p in singles], 0.0).eval()
    ids = torch.randint(3, 50, (5, 8))
    ids[:, -1] = 2  # BART reads at the end of the sentence
    together = replicas.Together(shared, 3)
    with torch.no_grad():
        for i, single in enumerate(singles):
            found = together.of(i)(input_ids=ids).logits
            expected = single.model.eval()(input_ids=ids).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert len(together.kept) == 1  # computed once, for all three


@pytest.mark.parametrize("given", [torch.tensor([[5, 7]]), torch.tensor([[3, 4], [5, 6]])])
def test_a_replica_that_is_evaluated_on_another_batch_is_refused(given):
    """Not silently given the logits of the batch that the first replica had."""
    model = nn.Linear(2, 3)
    model.forward = lambda x: SimpleNamespace(logits=x.float() @ torch.ones(2, 3))
    together = replicas.Together(model, 2)
    first = torch.tensor([[3, 4]])
    together.of(0)(x=first)
    assert torch.equal(together.of(1)(x=first.clone()).logits, torch.full((1, 3), 7.0))
    with pytest.raises(ValueError, match="gave replica 1 another batch 0 than replica 0"):
        together.of(1)(x=given)
    together.of(1)(x=first)
    with pytest.raises(ValueError, match="another batch 1"):  # one more than replica 0 had
        together(x=first)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_name="minilm-l6"), "model_name: 'tiny-roberta' and 'minilm-l6'"),
        (dict(task="sst2"), "task: 'cola' and 'sst2'"),
        (dict(batch_size=8), "batch_size: 16 and 8"),
        (dict(max_steps=50), "max_steps: 60 and 50"),
        (dict(deltaT=5, beta=0.5), r"deltaT: 4 and 5, beta: 0\.9 and 0\.5"),
        (dict(method="full"), "method = 'full' on task = 'cola': only drlora and lora"),
        (dict(task="boolq"), "on task = 'boolq': only drlora and lora on GLUE's tasks and SQuAD"),
    ],
)
def test_runs_that_cannot_share_are_refused_by_what_differs(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_replicas(settings(tmp_path, {}, change))
    assert not list(tmp_path.iterdir())


def test_rows_that_are_the_same_are_encoded_once(tmp_path, monkeypatch):
    encoded = []
    whole = glue.make_inputs
    monkeypatch.setattr(glue, "make_inputs", lambda *a, **k: encoded.append(1) or whole(*a, **k))
    set_up_replicas(settings(tmp_path / "a", dict(seed=0), dict(seed=1), dict(seed=2)))
    assert len(encoded) == 1
    set_up_replicas(settings(tmp_path / "b", dict(seed=0), dict(seed=1), train_size=40))
    assert len(encoded) == 3  # each draws its own forty


def test_a_batch_of_padded_rows_is_what_the_collator_makes():
    """In pieces of seven, so that each is padded to rows of another piece."""
    data = glue.load_task("mrpc", data_dir="generated")
    _, tokenizer = glue.load_model(models.resolve_model("tiny-roberta"), "mrpc")
    inputs = glue.make_inputs(data, tokenizer, max_length=64)
    other = inputs.train.shuffle(seed=1)
    rows = PaddedRows([inputs.train, other, inputs.train], inputs.collate, at_a_time=7)
    assert len(rows.lengths) == 2 * len(inputs.train)  # the third reads what the first reads
    for numbers in (([0, 1], [2], [3]), ([40, 3], [17, 3], []), ([], [9], [9])):
        sets = zip((inputs.train, other, inputs.train), numbers, strict=True)
        expected = inputs.collate([row for one, some in sets for row in one.select(some).to_list()])
        found = rows[numbers]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_rows_padded_on_the_left_are_refused():
    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        padding = [width - len(row["input_ids"]) for row in rows]
        return {"attention_mask": (torch.arange(width) >= torch.tensor(padding)[:, None]).long()}

    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]]})
    with pytest.raises(ValueError, match="padded on the left"):
        PaddedRows([rows], collate)


def test_no_replica_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one run is needed"):
        check_replicas([])


def test_a_record_that_is_there_is_kept(tmp_path):
    given = settings(tmp_path, dict(seed=0), dict(seed=1), max_steps=4)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "record.json").write_text('{"precious": 1}')
    with pytest.raises(FileExistsError, match="holds a record already"):
        run_replicas(given)
    assert not (tmp_path / "0" / "record.json").exists()


def test_a_head_of_more_than_linear_layers_is_refused():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.LayerNorm(4)})
    part = replicas.Part(
        {"query": (torch.ones(2, 4), torch.ones(4, 2), torch.ones(2), 1.0)},
        {"classifier.weight": torch.ones(4), "classifier.bias": torch.ones(4)},
        True,
    )
    with pytest.raises(ValueError, match=r"head's classifier\.bias, classifier\.weight cannot be"):
        replicas.replicate(model, [part, part], 0.0)
