"""The step as a graph: it asks for no value, and replayed it is the step that runs eagerly.

There is no GPU here. On torch.device("meta") a step comes to its end only if it asks for no value
and mixes no devices. A Tape replays operations on tensors, and nothing of Python, as a graph does.
"""

import dataclasses
import itertools
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import TINY, TINY_BART, TINY_LLAMA
from datasets import Dataset
from tiny_runs import still_model, tiny, without_costs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from drlora_ref import BudgetSchedule
from drlora_ref.experiments import methods
from drlora_ref.experiments.methods import METHODS
from drlora_ref.experiments.replicas.engine import Replicas
from drlora_ref.experiments.replicas.many_runs import run_replicas
from drlora_ref.experiments.replicas.model import replicate, take_apart
from drlora_ref.experiments.run import one_run
from drlora_ref.experiments.run.engine import OneModel
from drlora_ref.experiments.run.graphs import LENGTHS, CapturedStep, Strict, Tape, recording_by
from drlora_ref.experiments.run.no_waits import NEVER, additive, without_waits
from drlora_ref.experiments.run.settings import Settings
from drlora_ref.experiments.tasks.data import Inputs
from drlora_ref.train import train

META = torch.device("meta")
SCHEDULE = BudgetSchedule(4, 2, 20, deltaT=2)
BASES = {"Roberta": TINY, "Bert": TINY, "MPNet": TINY, "Bart": TINY_BART}
LLAMA = {kind: TINY_LLAMA for kind in ("Llama", "Qwen2", "Mistral", "Gemma2")}
HEADS = [
    *((kind, "SequenceClassification") for kind in BASES),
    *((kind, "QuestionAnswering") for kind in ("Roberta", "Bert", "MPNet")),
    ("Roberta", "MultipleChoice"),
    ("Bart", "ConditionalGeneration"),
    *((kind, "CausalLM") for kind in LLAMA),
]


def model_of(kind: str, head: str, **config) -> nn.Module:
    torch.manual_seed(3)
    given = dict((BASES | LLAMA)[kind], vocab_size=50) | config
    if head == "SequenceClassification":
        given |= dict(problem_type="single_label_classification")
    made = getattr(transformers, f"{kind}Config")(**given)
    return getattr(transformers, f"{kind}For{head}")(made)


def rows_for(head: str, n: int = 4) -> list[dict]:
    """Encoded rows of several lengths, as the tasks have them."""
    rows = []
    for i in range(n):
        ids = [*range(3, 9 + i), 2]
        if head == "MultipleChoice":
            ids = [ids, ids]
        row = {"input_ids": ids, "attention_mask": [[1] * len(o) for o in ids]
               if head == "MultipleChoice" else [1] * len(ids)}  # fmt: skip
        if head == "QuestionAnswering":
            row |= {"start_positions": i, "end_positions": i + 1}
        elif head == "ConditionalGeneration":
            row |= {"labels": [4, 5, 2][: i % 3 + 1]}
        elif head == "CausalLM":
            row |= {"labels": [-100] * (3 + i) + ids[3 + i :]}
        else:
            row |= {"labels": i % 2}
        rows.append(row)
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    def padded(values, name):
        fill = {"labels": -100, "input_ids": 1}.get(name, 0)
        if not isinstance(values[0], list):
            return torch.tensor(values)
        if isinstance(values[0][0], list):  # of each row, its choices
            flat = [choice for row in values for choice in row]
            return padded(flat, name).unflatten(0, (len(values), -1))
        longest = max(map(len, values))
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return {name: padded([row[name] for row in rows], name) for name in rows[0]}


def inputs_for(head: str) -> Inputs:
    return Inputs(Dataset.from_list(rows_for(head)), collate, evaluate=lambda model: {})


def on(device: torch.device) -> SimpleNamespace:
    """Accelerate's part in a step, on this device and in one process."""
    return SimpleNamespace(
        device=device, num_processes=1, process_index=0, is_main_process=True,
        autocast=nullcontext, prepare_model=lambda model: model.to(device),
        no_sync=lambda model: nullcontext(), backward=lambda loss: loss.backward(),
    )  # fmt: skip


class OnlyRuns:
    """A recorder that runs the step, once to warm up and once to record it."""

    def __init__(self):
        self.steps = 0

    def record(self, step: Callable) -> tuple[Callable, torch.Tensor]:
        step()
        self.steps += 1
        return (lambda: None), step()


@pytest.fixture
def recorder():
    """A function that gives both engines another recorder."""
    with ExitStack() as until_the_end:

        def put(recorder, why_not=""):
            until_the_end.enter_context(recording_by(recorder, why_not))
            return recorder

        yield put


@pytest.fixture
def adamw_on_meta(monkeypatch):
    """torch's AdamW believes of "meta" what it believes of a GPU: a step can be captured, and is
    fused where a run asks for that.
    """
    adam = sys.modules["torch.optim.adam"]  # torch.optim hides the name
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **given: ["meta"])
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with torch.library._scoped_library("aten", "IMPL") as kernels:
        # The kernel writes in place, and on "meta" there is nothing to write.
        kernels.impl("_fused_adamw_.tensor_lr", lambda *given, **named: None, "Meta")
        yield


def settings_for(**given) -> Settings:
    return Settings(**dict(batch_size=4, capture=True, dem_weight=0.5) | given)


def one_model(kind: str, head: str, device=META, **given) -> OneModel:
    settings = settings_for(**given)
    own = {name: getattr(settings, name) for name in METHODS[settings.method].own}
    own |= {"rank_map": None} if "rank_map" in own else {}
    model = model_of(kind, head)
    prepared = methods.prepare(settings.method, model, SCHEDULE, **own)
    prepared.model.to(device)
    return OneModel(prepared, inputs_for(head), SCHEDULE, settings, on(device))


def replicas_of(kind: str, head: str, changes: list[dict], device=META, **given) -> Replicas:
    settings, parts = [settings_for(**given | change) for change in changes], []
    for one in settings:
        model = model_of(kind, head)
        parts.append(take_apart(methods.prepare(one.method, model, SCHEDULE)))
    shared = replicate(model_of(kind, head), parts, 0.1).to(device)
    prunes = [part.prunes for part in parts]
    runs = len(parts)
    return Replicas(
        shared, [inputs_for(head)] * runs, [SCHEDULE] * runs, settings, prunes, on(device)
    )


# --- asks for no value -------------------------------------------------------------------------


EVERY = [(kind, "SequenceClassification", method) for kind in BASES for method in METHODS]
EVERY += [(*head, method) for head in HEADS[len(BASES) :] for method in ("drlora", "lora")]


@pytest.mark.parametrize("kind, head, method", EVERY)
def test_the_captured_step_of_a_single_run_asks_for_no_value(
    kind, head, method, recorder, adamw_on_meta
):
    """Every method on every kind of model, before the last event and after it; and every head."""
    ran = recorder(OnlyRuns())
    engine = one_model(kind, head, method=method)
    for step in (1, SCHEDULE.total_steps):
        found = engine.optimizer_step(step, [([0, 1, 2, 3],)])
        assert found.shape == (1, 2) and found.device == META
    assert engine.captured.about() == "captured" and ran.steps == 1


@pytest.mark.parametrize("kind, head", [(k, h) for k, h in HEADS if h[0] in "SQ"])
def test_the_captured_step_of_replicas_asks_for_no_value(kind, head, recorder, adamw_on_meta):
    """With scores, EMA and the zeros inside: every score that there is, and LoRA's replica."""
    recorder(OnlyRuns())
    scores = ("frobenius_share", "frobenius_norm", "abs_c", "output_norm", "loss_sensitivity",
              "random")  # fmt: skip
    changes = [dict(score=score) for score in scores] + [dict(method="lora")]
    engine = replicas_of(kind, head, changes)
    for step in (1, SCHEDULE.total_steps):
        numbers = ([0, 1, 2, 3],) * len(changes)
        assert engine.optimizer_step(step, [numbers]).shape == (7, 2)
    assert engine.captured.about() == "captured"


WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique_consecutive")
ASKS = [getattr(torch.ops.aten, name).default for name in WAITING]


FETCHES = ("tolist", "cpu", "numpy")  # of a tensor: they bring it to the CPU


def waits(act: Callable) -> list[str]:
    """Where `act`, on a CPU, asks for what a GPU would first have to compute: file.function.

    AdamW asks for its step counts, which are on the CPU on a machine with a GPU too.
    """
    found: dict[str, bool] = {}

    def note() -> None:
        frames = [f for f in traceback.extract_stack() if "test_captured" not in f.filename]
        if not any("/optim/" in f.filename for f in frames):
            asked = [f for f in frames if "/torch/" not in f.filename][-1]
            found[f"{Path(asked.filename).stem}.{asked.name}"] = True

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_mask = function is torch.ops.aten.index.Tensor and any(
                t is not None and t.dtype == torch.bool for t in args[1]
            )
            if by_mask or function in ASKS:
                note()
            return function(*args, **kwargs or {})

    with pytest.MonkeyPatch.context() as patch, Noting():
        for name in FETCHES:
            really = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda self, really=really: (note(), really(self))[1])
        act()
    return list(found)


MASK = "masking_utils._ignore_bidirectional_mask_sdpa"


@pytest.mark.parametrize(
    "kind, waiting",
    [("Roberta", [MASK]), ("Bert", [MASK]), ("MPNet", [MASK]),
     ("Bart", [MASK, "masking_utils._ignore_causal_mask_sdpa", "modeling_bart.forward"])],
)  # fmt: skip
def test_where_the_eager_step_waits(kind, waiting):
    """Each of these is a stall on a GPU. Nothing of ours is among them, whatever the method."""
    for method in METHODS:
        engine = one_model(kind, "SequenceClassification", torch.device("cpu"), method=method,
                           capture=False)  # fmt: skip
        engine.optimizer_step(1, [([0, 1, 2, 3],)])  # the first one makes AdamW's averages
        found = waits(lambda engine=engine: engine.optimizer_step(2, [([0, 1, 2, 3],)]))
        assert found == waiting, method


CPU = torch.device("cpu")
# They ask whether all scores are finite, and whether so many components can be kept.
EVENT = ["allocator._check_finite", "allocator.select_components"]


def test_where_the_eager_allocator_waits():
    """At pruning events alone."""
    engine = one_model("Roberta", "SequenceClassification", CPU, capture=False)
    for step in range(1, SCHEDULE.total_steps + 1):
        engine.optimizer_step(step, [([0, 1, 2, 3],)])
        found = waits(lambda step=step: engine.allocate(step, [True]))
        assert found == (EVENT if SCHEDULE.prunes_at(step) else []), step


@pytest.mark.parametrize("capture", [False, True])
def test_where_replicas_wait(capture):
    """In a forward pass for the mask, unless captured; and at pruning events, which say who is
    sound. What the losses were is asked by the Loop, every ten steps.
    """
    changes = [{}, dict(method="lora"), dict(score="random"), dict(score="output_norm")]
    engine = replicas_of("Roberta", "SequenceClassification", changes, CPU, capture=capture)
    for step in range(1, SCHEDULE.total_steps + 1):
        found = waits(lambda step=step: engine.optimizer_step(step, [([0, 1, 2, 3],) * 4]))
        # The widths of rows, which are on the CPU everywhere.
        assert found == ["rows.__getitem__"] + ([] if capture else [MASK])
        found = waits(lambda step=step: engine.allocate(step, [True] * 4))
        assert found == ([*EVENT, "step._prune"] if SCHEDULE.prunes_at(step) else []), step


def test_where_the_page_long_loop_waits():
    """For the masks, at a look at the losses, and at pruning events and evaluations."""
    engine = one_model("Roberta", "SequenceClassification", CPU, capture=False, method="drlora")
    prepared, data = engine.prepared, engine.inputs
    evaluate = lambda model: {"metric": 0.0, "collapsed": False}  # noqa: E731
    found = waits(
        lambda: train(
            prepared.model, data.train, data.collate, evaluate, SCHEDULE, prepared.allocator,
            batch_size=4,
        )
    )  # fmt: skip
    at_the_end = {"allocator.rank_pattern", "allocator.<listcomp>", "layer.rank"}
    on_the_cpu = {"train.grouped_batches"}  # the order of the rows
    places = {MASK, *EVENT, "train.train", "train.first_non_finite"}
    assert set(found) - at_the_end - on_the_cpu == places


# --- a graph is the step ------------------------------------------------------------------------


def batch(rows: int, width: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * width).reshape(rows, width) % 7 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}


def sums(recorder, lengths=(4, 8), batches=1, rows=2) -> tuple[CapturedStep, torch.Tensor]:
    """A step that adds up what it reads, in a state that a warm-up would spoil."""
    state = torch.zeros(1)

    def take(group):
        for one in group:
            state.add_((one["input_ids"] * one["attention_mask"]).sum())
        return state * 1.0

    cpu = torch.device("cpu")
    return CapturedStep(take, lambda: [state], cpu, batches, rows, 1, recorder,
                        lengths=lengths), state  # fmt: skip


def test_one_graph_for_each_length_and_what_the_warm_up_changed_is_put_back():
    captured, state = sums(Tape())
    expected = 0
    for width in (3, 4, 2, 7, 8, 3):
        one = batch(2, width)
        expected += int(one["input_ids"].sum())
        assert captured([one]).item() == state.item() == expected
    assert len(captured.graphs) == 2 and captured.about() == "captured"


def test_a_result_stays_when_the_graph_is_replayed():
    captured, _ = sums(Tape())
    first = captured([batch(2, 3)])
    before = first.clone()
    captured([batch(2, 4)])
    assert torch.equal(first, before)


@pytest.mark.parametrize("group", [[batch(1, 3)], [batch(2, 3)] * 2])
def test_the_small_last_group_of_an_epoch_is_taken_eagerly(group):
    captured, state = sums(Tape())
    captured(group)
    assert not captured.graphs and state > 0 and captured.about() == "captured"


def test_a_batch_longer_than_every_length_is_taken_eagerly_and_said(capsys):
    captured, state = sums(Tape())
    for _ in range(2):
        captured([batch(2, 9)])
    captured([batch(2, 5)])
    assert state == 2 * batch(2, 9)["input_ids"].sum() + batch(2, 5)["input_ids"].sum()
    assert captured.about() == "eager where a batch is longer than 8 tokens"
    assert capsys.readouterr().out.count("longer than 8 tokens") == 1 and len(captured.graphs) == 1


def test_what_cannot_be_recorded_says_why_once_and_goes_on_eagerly(capsys):
    captured, state = sums(Tape())
    take = captured.take
    captured.take = lambda group: take(group) * float(state.item() > -1)
    for times in (1, 2):
        captured([batch(2, 3)])
        assert state == times * batch(2, 3)["input_ids"].sum()  # the attempt left nothing behind
    said = "eager: a value was asked for, which a recording cannot have"
    assert captured.about() == said and capsys.readouterr().out == f"capture: {said}\n"


@pytest.mark.parametrize("asks", [float, lambda x: x[x > 0], lambda x: x.nonzero(), bool,
                                  lambda x: x.to("meta")])  # fmt: skip
def test_a_strict_run_refuses_what_a_gpu_would_choke_on(asks):
    with Strict(), pytest.raises(RuntimeError, match=r"a value was asked for|between cpu and meta"):
        asks(torch.ones(()))


def test_the_reason_is_the_first_error_not_what_ending_the_recording_raised():
    class Ends:
        def record(self, step):
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("capture was invalidated")

    captured, _ = sums(Ends())
    captured([batch(2, 3)])
    assert captured.about() == "eager: operation not permitted when stream is capturing"


def test_out_of_memory_while_recording_is_no_reason_to_go_on_eagerly():
    class Full:
        def record(self, step):
            step()
            raise torch.OutOfMemoryError("CUDA out of memory")

    captured, state = sums(Full())
    with pytest.raises(torch.OutOfMemoryError):
        captured([batch(2, 3)])
    assert state == 0 and captured.recorder


def test_a_tape_does_not_run_python_again():
    x, seen, tape = torch.ones(2), [], Tape()

    def step():
        seen.append(1)
        return x * len(seen)

    replay, result = tape.record(step)
    x.fill_(10.0)
    replay()
    assert len(seen) == 2 and result.tolist() == [20.0, 20.0]


def test_padding_is_never_looked_at():
    assert additive(torch.tensor([[1, 0]])).tolist() == [[[[0.0, NEVER]]]]
    assert torch.tensor(NEVER).bfloat16().isfinite()
    assert list(LENGTHS) == sorted(LENGTHS) and len(LENGTHS) < 20


@pytest.mark.parametrize("kind, head", HEADS)
def test_a_model_without_waits_computes_the_same(kind, head):
    """Loss and gradients, of rows of several lengths."""
    still = dict(dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    if kind in ("Roberta", "Bert", "MPNet"):
        still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = []
    for changed in (lambda model: model, without_waits):
        model = changed(model_of(kind, head, **still).train())
        loss = model(**collate(rows_for(head))).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


METHODS_TO_REPLAY = [
    dict(), dict(score="output_norm"), dict(score="random"), dict(score="loss_sensitivity"),
    dict(method="lora"), dict(method="adalora", init_r=3), dict(method="prune-once"),
    dict(method="full"), dict(method="bitfit", grad_accumulation=2, batch_size=8),
    dict(task="squad_v1", max_length=64, stride=8),
    dict(task="xsum", model_name="tiny-bart", max_length=48, batch_size=8),
    dict(task="instructions", model_name="tiny-llama", max_length=160, batch_size=8),
]  # fmt: skip


@pytest.mark.parametrize("change", METHODS_TO_REPLAY, ids=str)
def test_a_replayed_run_is_the_eager_run_bit_for_bit(change, recorder, tmp_path):
    """With dropout, pruning, the freeze, evaluations between, and several lengths."""
    given = dict(capture=True, max_steps=10, deltaT=2) | change
    recorder(Tape())
    replayed = one_run.run(tiny(tmp_path / "replayed", **given))
    recorder(None, "not asked for")
    eager = one_run.run(tiny(tmp_path / "eager", **given))
    assert replayed.pop("capture") == "captured" and eager.pop("capture") == "eager: not asked for"
    assert without_costs(replayed) == without_costs(eager)


MANY = [dict(seed=0), dict(seed=1, method="lora"), dict(seed=2, score="random", init_r=5),
        dict(seed=3, score="output_norm"), dict(seed=4, learning_rate=1e30)]  # fmt: skip


def pack(folder, changes=MANY, **given) -> list[Settings]:
    given = dict(capture=True, max_steps=12, deltaT=2, dem_weight=0.3) | given
    return [tiny(folder / str(i), **given | change) for i, change in enumerate(changes)]


@pytest.mark.parametrize("task", [dict(), dict(task="squad_v1", max_length=64, stride=8)])
def test_replayed_replicas_are_the_eager_ones_bit_for_bit(task, recorder, tmp_path):
    """One of them is NaN from its first step: it is flagged, and changes nothing for the others."""
    recorder(Tape())
    replayed = run_replicas(pack(tmp_path / "replayed", **task))
    recorder(None, "not asked for")
    eager = run_replicas(pack(tmp_path / "eager", **task))
    for one, other in zip(replayed, eager, strict=True):
        assert one.pop("capture") == "captured" and other.pop("capture")
        assert without_costs(one) == without_costs(other)
    assert replayed[4]["status"] == "diverged" and replayed[0]["steps"] == 12


def test_captured_replicas_go_as_those_that_are_not(recorder, tmp_path):
    """Up to rounding: other kernels, wider rows. Dropout off, with pruning and the freeze."""
    still_model(tmp_path / "still")
    given = dict(model_name=str(tmp_path / "still"), lora_dropout=0.0, max_steps=30, deltaT=4)
    recorder(Tape())
    changes = MANY[:4]
    captured = run_replicas(pack(tmp_path / "captured", changes, **given))
    plain = run_replicas(pack(tmp_path / "plain", changes, **given, capture=False))
    for one, other in zip(captured, plain, strict=True):
        for name in ("rank_pattern", "budget_curve", "status"):
            assert one[name] == other[name], name
        curves = [torch.tensor(r["loss_curve"]) for r in (one, other)]
        torch.testing.assert_close(*curves, atol=1e-4, rtol=0)
        assert one["key"] != other["key"]


class Cut(Exception):
    pass


@pytest.mark.parametrize("step", [4, 9])
def test_a_captured_run_that_was_cut_goes_on_to_the_same_record(
    step, recorder, tmp_path, monkeypatch
):
    recorder(Tape())
    changes = MANY[:4]
    given = dict(checkpoint_every=3)
    whole = run_replicas(pack(tmp_path / "whole", changes, **given))
    alone = one_run.run(tiny(tmp_path / "alone", capture=True, max_steps=12, **given))
    for engine, again in (
        (Replicas, lambda: run_replicas(pack(tmp_path / "cut", changes, **given))),
        (OneModel, lambda: [one_run.run(tiny(tmp_path / "cut alone", capture=True, max_steps=12,
                                             **given))]),
    ):  # fmt: skip
        really = engine.optimizer_step

        def cut(self, at, group, really=really):
            if at == step:
                raise Cut
            return really(self, at, group)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "optimizer_step", cut)
            with pytest.raises(Cut):
                again()
        for one, other in zip(whole if engine is Replicas else [alone], again(), strict=True):
            assert without_costs(one) == without_costs(other)


def test_without_a_gpu_a_captured_run_says_so(tmp_path, capsys):
    record = one_run.run(tiny(tmp_path, capture=True, max_steps=2))
    assert record["capture"] == "eager: there is no GPU"
    assert capsys.readouterr().out.count("capture: eager: there is no GPU") == 1


# --- the other settings -------------------------------------------------------------------------


@pytest.fixture
def another_precision():
    """accelerate lets a process choose once."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_frozen_matrices_in_half_precision_leave_what_is_trained(tmp_path, another_precision):
    given = dict(precision="bf16", frozen_bf16=True, max_steps=4)
    ready = one_run.set_up(tiny(tmp_path / "half", **given))
    one_run.write(ready, one_run.train(ready))
    types = {p.requires_grad: set() for p in ready.prepared.model.parameters()}
    for module in ready.prepared.model.modules():
        if isinstance(module, nn.Linear):
            types[module.weight.requires_grad].add(module.weight.dtype)
    assert types == {False: {torch.bfloat16}, True: {torch.float32}}
    with pytest.raises(ValueError, match="frozen_bf16 = True: needs precision bf16, not fp32"):
        tiny(tmp_path, precision="fp32", frozen_bf16=True)
    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="frozen_bf16 = True: needs precision bf16, and this"):
        one_run.set_up(tiny(tmp_path / "auto", frozen_bf16=True))


def test_attention_is_what_was_asked_for(tmp_path):
    model = one_run.set_up(tiny(tmp_path, attention="eager")).prepared.model
    assert model.config._attn_implementation == "eager"
    assert one_run.set_up(tiny(tmp_path)).prepared.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        tiny(tmp_path, attention="flash")


def test_fused_adamw_takes_the_same_steps(tmp_path):
    losses = [
        one_run.run(tiny(tmp_path / str(fused), fused_adamw=fused, max_steps=6))["loss_curve"]
        for fused in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_compiling_concerns_the_pretrained_part_alone(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    given = dict(method="lora", compile_encoder=True, max_steps=1)
    one_run.run(tiny(tmp_path, **given))
    assert compiled == ["RobertaModel"]


@pytest.mark.parametrize("name", ["capture", "fused_adamw", "frozen_bf16", "compile_encoder"])
def test_what_makes_steps_faster_is_off_and_orphans_no_record(name):
    from drlora_ref.experiments.run.settings import run_key

    assert getattr(Settings(), name) is False
    before, after = Settings(), dataclasses.replace(Settings(), **{name: True})
    assert run_key(before, "", "") != run_key(after, "", "")
    assert len(set(itertools.starmap(run_key, [(before, "", "")] * 2))) == 1


def test_a_gpu_without_bfloat16_computes_in_float32_and_refuses_what_it_has_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: False)
    with pytest.raises(ValueError, match="precision = 'bf16': this GPU does not have it"):
        one_run.make_accelerator("bf16")
    made = []
    monkeypatch.setattr(one_run, "Accelerator", lambda **given: made.append(given))
    one_run.make_accelerator("auto")
    assert made[0]["mixed_precision"] == "no"
