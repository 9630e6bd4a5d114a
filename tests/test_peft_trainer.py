"""Dynamic rank in a stock Trainer: DEM under accumulation, resuming, best model, two processes."""

import functools
import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import trainer_script
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from trainer_script import (
    MaskAtEveryStep,
    adapted,
    arguments,
    base_model,
    rows,
    still,
    trainer,
)
from transformers import (
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from drlora_ref import BudgetSchedule
from drlora_ref.tuner import DynamicRankConfig
from drlora_ref.tuner.checkpoints import last_whole, write_checksums
from drlora_ref.tuner.trainer import (
    DynamicRankCallback,
    DynamicRankMixin,
    DynamicRankTrainer,
    divides_its_loss,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning"),
]
T, T_END = 12, 6  # of trainer_script's arguments


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def test_two_lines_make_a_trainer_script_dynamic_rank(tmp_path):
    run = trainer(tmp_path)
    run.train()
    assert run.model.peft_config["default"].total_step == T  # filled in
    ranks = run.model.rank_pattern()
    assert sum(ranks.values()) == 12 * 2 and len(set(ranks.values())) > 1
    for layer in run.model.base_model.adapted_layers().values():
        assert not layer.lora_c[~layer.component_mask].any() and layer.lora_c.any()


def test_rank_and_budget_are_in_the_logs_that_every_integration_sees(tmp_path):
    seen = []

    class Integration(TrainerCallback):
        """Stands where TensorBoard's and other integrations stand: before the user's callbacks."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, logs))

    run = trainer(tmp_path)
    run.callback_handler.callbacks.insert(0, Integration())
    run.train()
    schedule = BudgetSchedule(3, 2, T, deltaT=2)
    training = {step: logs for step, logs in seen if "loss" in logs}
    assert list(training) == list(range(1, T + 1))
    for step, logs in training.items():
        assert logs["rank_budget"] == schedule.budget(step)
        assert logs["rank_min"] <= logs["rank"] <= logs["rank_max"]
    assert training[1]["rank"] == 3 and training[T]["rank"] == 2
    assert [logs for _, logs in seen if "train_runtime" in logs and "rank" not in logs]


class FirstGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        control.should_training_stop = True


def eight_rows(folder, accumulation: int, trainer_class=DynamicRankTrainer, **given):
    """A trainer whose first step is over the same eight rows, at components away from zero."""
    model = still(total_step=100, init_r=3, target_r=3, **given)
    torch.manual_seed(5)
    for layer in model.base_model.adapted_layers().values():
        nn.init.normal_(layer.lora_c)
    settings = arguments(
        folder,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=100,
        max_grad_norm=0,
    )
    return trainer_class(model, settings, train_dataset=rows())


def first_gradient(run) -> dict[str, torch.Tensor]:
    stop = FirstGradient()
    run.add_callback(stop)
    run.train()
    return stop.gradient


def summed_loss(outputs, labels, num_items_in_batch):
    loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize("divided_by", ["Trainer", "the model", "a loss function"])
def test_accumulation_changes_no_gradient_and_dem_counts_once(divided_by, tmp_path):
    gradients = {}
    for accumulation, weight in itertools.product((1, 4), (0.0, 0.7)):
        run = eight_rows(tmp_path, accumulation, dem_weight=weight)
        if divided_by == "a loss function":
            run.compute_loss_func = summed_loss
        if divided_by == "the model":
            base = run.model.get_base_model()
            base.forward = divide(base.forward)
            run.model_accepts_loss_kwargs = True
        gradients[accumulation, weight] = first_gradient(run)
    for name, whole in gradients[1, 0.7].items():
        torch.testing.assert_close(gradients[4, 0.7][name], whole, atol=1e-6, rtol=1e-5)
    untouched = eight_rows(tmp_path, 1).model
    (0.7 * untouched.dem_loss()).backward()
    for name, parameter in untouched.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert parameter.grad.abs().max() > 1e-4
            added = gradients[4, 0.7][name] - gradients[4, 0.0][name]
            torch.testing.assert_close(added, parameter.grad, atol=1e-6, rtol=1e-4)


def divide(forward):
    """RoBERTa's forward as of a model that keeps Trainer's promise."""

    @functools.wraps(forward)  # Trainer keeps the columns that the signature names
    def forward_divided(*args, num_items_in_batch=None, labels=None, **kwargs):
        outputs = forward(*args, labels=labels, **kwargs)
        if num_items_in_batch is not None:
            outputs.loss = outputs.loss * len(labels) / num_items_in_batch
        return outputs

    return forward_divided


def test_trainer_alone_still_multiplies_the_gradient_of_a_roberta_classifier(tmp_path):
    """The bug of transformers that the mix-in works around."""

    class Stock(Trainer):
        pass

    one, four = (first_gradient(eight_rows(tmp_path, k, Stock)) for k in (1, 4))
    name = next(name for name in one if "out_proj.weight" in name)
    factor = float(four[name].norm() / one[name].norm())
    assert factor == pytest.approx(4, rel=1e-4), (
        f"Trainer's gradient over 4 accumulated batches is {factor:.3g} times that of one: if 1, "
        "transformers is right now, and divides_its_loss can go"
    )


class KeepsTheCount(DynamicRankTrainer):
    """Its compute_loss does not hand on the number of labels that all batches of a step have."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


TINY_LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    pad_token_id=1,
)


@pytest.mark.parametrize(
    "model_class, task, divides",
    [
        (LlamaForCausalLM, "CAUSAL_LM", True),
        (LlamaForSequenceClassification, "SEQ_CLS", False),  # calls loss_function, passes nothing
    ],
)
@pytest.mark.parametrize("trainer_class", [DynamicRankTrainer, KeepsTheCount])
def test_language_models_divide_their_loss_and_classifiers_do_not(
    model_class, task, divides, trainer_class, tmp_path
):
    ids = trainer_script.token_ids(8)
    labels = ids if task == "CAUSAL_LM" else (ids[:, 0] > 25).long()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    gradients = []
    for k in (1, 4):
        torch.manual_seed(0)
        base = model_class(TINY_LLAMA)
        assert divides_its_loss(base) == divides
        given = dict(task_type=task, lora_dropout=0.0, dem_weight=0.3)
        config = DynamicRankConfig(init_r=3, target_r=3, **given)
        settings = dict(per_device_train_batch_size=8 // k, gradient_accumulation_steps=k)
        settings |= dict(train_sampling_strategy="sequential", max_steps=10, max_grad_norm=0)
        run = trainer_class(
            get_peft_model(base, config), arguments(tmp_path, **settings), train_dataset=data
        )
        for layer in run.model.base_model.adapted_layers().values():
            nn.init.ones_(layer.lora_c)
        gradients.append(first_gradient(run))
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-6, rtol=1e-4)


def test_a_model_that_says_how_it_is_is_believed():
    base = base_model()
    assert not divides_its_loss(base)
    base.accepts_loss_kwargs = True
    assert divides_its_loss(base)


def test_dem_is_in_the_training_loss_until_pruning_ends_and_never_in_evaluation(tmp_path):
    run = trainer(tmp_path, still(total_step=T))
    inputs = next(iter(run.get_train_dataloader()))
    dem = 0.3 * run.model.dem_loss()
    task = run.model(**inputs).loss

    def loss(step, model):
        run.state.global_step = step - 1  # completed before the step in question
        return run.compute_loss(model, inputs)

    torch.testing.assert_close(loss(T_END, run.model.train()), task + dem)
    torch.testing.assert_close(loss(T_END + 1, run.model.train()), task)
    torch.testing.assert_close(loss(T_END, run.model.eval()), task)


@pytest.mark.parametrize("score", ["random", "output_norm", "loss_sensitivity"])
def test_resuming_from_any_checkpoint_is_bit_identical(score, tmp_path):
    def run(folder, **given):
        model = adapted(score=score, total_step=T)  # the generator must be restored, too
        return trainer(folder, model, gradient_accumulation_steps=2, num_train_epochs=4, **given)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        f"checkpoint-{t}" for t in range(1, T + 1)
    }
    for step in range(1, T):
        resumed = run(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_bits(state_of(resumed.model), state_of(whole.model))


def test_resuming_under_autocast_in_bfloat16_is_bit_identical(tmp_path):
    def run(folder, **given):
        return trainer(folder, adapted(base_model().to(torch.bfloat16)), bf16=True, **given)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_bits(state_of(resumed.model), state_of(whole.model))


def test_gradient_checkpointing_in_trainer_changes_no_bit_of_the_result(tmp_path):
    results = []
    for on in (False, True):
        kind = dict(gradient_checkpointing_kwargs={"use_reentrant": False}) if on else {}
        run = trainer(tmp_path, still(), gradient_checkpointing=on, **kind)
        run.train()
        results.append(state_of(run.model))
    assert_same_bits(*results)


def one_of_two(rank: int, port: int, runs: list[list[str]]) -> None:
    """The script, once a run, as torchrun would start it, but for the seconds of its imports."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(True)  # what this process was before it was forked
    for words in runs:
        trainer_script.main(*words)
    torch.distributed.destroy_process_group()


def test_another_process_resumes_bit_identically(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=5)
    whole.train()
    whole.model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "resumed").mkdir()
    words = map(
        str, (trainer_script.__file__, tmp_path / "resumed", tmp_path / "whole/checkpoint-5")
    )
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = "adapter_model.safetensors"
    there = load_file(tmp_path / "resumed" / "adapter-0" / weights)
    assert_same_bits(there, load_file(tmp_path / "adapter" / weights))


SCORES_TRIED = ("frobenius_share", "output_norm", "loss_sensitivity")


def test_two_processes_have_the_same_masks_at_every_step(tmp_path):
    """DDP over gloo, its broadcast of buffers switched off; and those of one process.

    By a score of the weights alone, and by the two that depend on the rows: a rank sees its own.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folders = {score: tmp_path / score for score in SCORES_TRIED}
    runs = [[str(folder), "--still", f"--score={score}"] for score, folder in folders.items()]
    mp.start_processes(one_of_two, (port, runs), nprocs=2, start_method="fork")
    for score, folder in folders.items():
        _has_the_masks_of_one_process(folder, score)
    # The random numbers of both are in a checkpoint, each file with its checksum.
    folder = folders["frobenius_share"]
    assert last_whole(str(folder), True) is True
    for rank in (0, 1):
        file = folder / f"checkpoint-6/rng_state_{rank}.pth"
        whole = file.read_bytes()
        file.write_bytes(flip(whole, 0.6))
        with pytest.warns(UserWarning, match=f"rng_state_{rank}.pth is damaged.: resuming from"):
            assert last_whole(str(folder), True) == str(folder / "checkpoint-3")
        file.write_bytes(whole)


def _has_the_masks_of_one_process(folder, score: str) -> None:
    one, other = (torch.load(folder / f"masks-{rank}.pt") for rank in (0, 1))
    assert len(one) == 6  # the batches are shared out: half as many steps
    assert torch.equal(one, other) and one[-1].sum() == 24 and one[0].all(), score
    adapters = [load_file(folder / f"adapter-{r}" / "adapter_model.safetensors") for r in (0, 1)]
    assert_same_bits(*adapters)
    alone = trainer(folder / "alone", still(score=score), per_device_train_batch_size=16)
    seen = MaskAtEveryStep()
    alone.add_callback(seen)
    alone.train()
    assert torch.equal(torch.stack(seen.masks), one), score
    alone.model.save_pretrained(folder / "alone")
    for name, tensor in load_file(folder / "alone" / "adapter_model.safetensors").items():
        torch.testing.assert_close(adapters[0][name], tensor, atol=1e-5, rtol=1e-4)


def evaluations_that_get_worse(run) -> None:
    """Makes the first evaluation of a run the best one by far."""
    numbers = itertools.count(1)
    run.compute_metrics = lambda prediction: {"score": 1 / next(numbers)}


@pytest.mark.parametrize("every, best", [(1, T_END + 1), (3, 9), (6, 12)])
def test_the_best_model_is_one_after_pruning(every, best, tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    evaluations_that_get_worse(run)
    seen = MaskAtEveryStep()
    run.add_callback(seen)
    run.train()
    assert run.state.best_global_step == best
    assert Path(run.state.best_model_checkpoint).name == f"checkpoint-{best}"
    loaded = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert int(loaded["base_model.dynamic_rank_state.last_step"]) == best
    assert int(run.model.base_model.dynamic_rank_state.default.last_step) == best  # is loaded
    assert torch.equal(run.model.base_model.allocator().mask, seen.masks[-1])


def test_early_stopping_waits_for_the_ranks(tmp_path):
    """Patience is not spent while there is no best yet."""
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    evaluations_that_get_worse(run)
    run.train()
    assert run.state.best_global_step == T_END + 1
    assert run.state.global_step == T_END + 3


def test_any_trainer_class_can_be_mixed_in(tmp_path):
    calls = []

    class Theirs(Trainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            return super().compute_loss(*args, **kwargs)

    class Mixed(DynamicRankMixin, Theirs):
        pass

    run = Mixed(adapted(), arguments(tmp_path), train_dataset=rows())
    run.train()
    assert len(calls) == T and sum(run.model.rank_pattern().values()) == 24


def test_the_callback_alone_is_enough_without_dem(tmp_path):
    run = Trainer(
        adapted(dem_weight=0.0),
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[DynamicRankCallback()],
    )
    run.train()
    assert sum(run.model.rank_pattern().values()) == 24


def test_a_callback_added_by_hand_does_not_step_twice(tmp_path):
    run = DynamicRankTrainer(
        adapted(), arguments(tmp_path), train_dataset=rows(), callbacks=[DynamicRankCallback()]
    )
    run.train()
    assert run.model.base_model.allocator().last_step == T


# --- what is refused ---------------------------------------------------------------------------


def test_a_wrong_total_step_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, adapted(total_step=100))
    with pytest.raises(ValueError, match=r"total_step = 100, but this training has 12 optimizer"):
        run.train()
    assert run.state.global_step == 0


def test_what_a_trainer_filled_in_is_not_left_in_the_users_configuration(tmp_path):
    config = DynamicRankConfig(init_r=3, target_r=2, deltaT=2, task_type="SEQ_CLS")
    for epochs in (2, 3):  # a sweep
        run = trainer(tmp_path, get_peft_model(base_model(), config), num_train_epochs=epochs)
        run.train()
        assert config.total_step is None
        assert run.model.peft_config["default"].total_step == 6 * epochs


def test_an_attempt_that_took_no_step_may_be_followed_by_one_of_another_length(tmp_path):
    """As auto_find_batch_size does it, when the first batch does not fit."""

    class TooLarge(Exception):
        pass

    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            raise TooLarge

    run = trainer(tmp_path)
    run.add_callback(Stop())
    with pytest.raises(TooLarge):
        run.train()
    run.remove_callback(Stop)
    run.args.num_train_epochs = 3
    run.train()
    assert run.model.base_model.allocator().last_step == 18


def test_logging_before_training_needs_no_schedule(tmp_path):
    trainer(tmp_path).log({"loss": 1.0})


def test_training_that_stops_before_pruning_ended_is_an_error(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.add_callback(Stop())
    with pytest.raises(ValueError, match=r"pruning has not ended.*: 4 steps.* at step 6"):
        run.train()
    assert (tmp_path / "checkpoint-4").exists()  # what was saved is kept


def test_dem_without_anything_that_adds_it_is_refused(tmp_path):
    run = Trainer(
        adapted(), arguments(tmp_path), train_dataset=rows(), callbacks=[DynamicRankCallback()]
    )
    with pytest.raises(ValueError, match=r"dem_weight = 0\.3, but nothing adds DEM to the loss"):
        run.train()


def test_a_trained_adapter_does_not_start_again(tmp_path):
    run = trainer(tmp_path)
    run.train()
    with pytest.raises(ValueError, match="has 12 steps of training behind it, and Trainer starts"):
        trainer(tmp_path, run.model).train()


def test_resuming_another_schedule_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    longer = trainer(tmp_path / "longer", num_train_epochs=4)
    with pytest.raises(ValueError, match="4 steps so far were taken with another schedule"):
        longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_other_ranks_is_refused(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match="the checkpoint is of other ranks or targets"):
        trainer(tmp_path / "wider", adapted(init_r=4)).train(str(tmp_path / "checkpoint-4"))


def test_a_model_without_the_adapter_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(TypeError, match="RobertaForSequenceClassification has no dynamic-rank"):
        trainer(tmp_path, base_model())


SHARDING = {
    "FSDP": {"fsdp": "full_shard auto_wrap"},
    "FSDP2": {"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}},
    "ZeRO-2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "ZeRO-3 in a file": {"deepspeed": "zero3.json"},
}


@pytest.mark.parametrize("kind", SHARDING)
def test_sharded_parameters_are_refused_and_the_reason_is_said(kind, tmp_path):
    run = trainer(tmp_path)
    for name, value in SHARDING[kind].items():
        setattr(run.args, name, value)
    message = "FSDP and DeepSpeed shard the components, .* norms of whole vectors .* use DDP"
    with pytest.raises(ValueError, match=message):
        DynamicRankCallback().on_train_begin(run.args, run.state, run.control, model=run.model)


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_trainer_that_a_launcher_has_made_shard_is_refused(flag, tmp_path):

    class Sharded(Trainer):  # as `accelerate launch` makes it, by the environment
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            setattr(self, flag, True)

    class Mixed(DynamicRankMixin, Sharded):
        pass

    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard the components"):
        Mixed(adapted(), arguments(tmp_path), train_dataset=rows())


def test_a_step_belongs_to_the_trainer_as_to_the_schedule(tmp_path):
    """PEFT and transformers pinned: the callback's t is Trainer's global_step, from 1 to T."""
    steps = []

    class Steps(DynamicRankCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            steps.append(state.global_step + 1)
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            super().on_optimizer_step(args, state, control, model=model, **kwargs)

    run = trainer(tmp_path, gradient_accumulation_steps=2)
    run.remove_callback(PrinterCallback)
    run.remove_callback(DynamicRankCallback)
    run.add_callback(Steps(adds_dem=True))
    run.train()
    assert steps == list(range(1, run.state.max_steps + 1)), (
        "Trainer calls on_optimizer_step at other moments than after each optimizer step: the "
        "allocator would score and prune at the wrong steps"
    )


# --- DEM is in the loss, or it is an error ------------------------------------------------------


def own_loss(model, inputs, return_outputs=False, **kwargs):
    outputs = model(**inputs)
    return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnLoss(DynamicRankTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return own_loss(model, inputs, return_outputs)


class OwnStep(DynamicRankTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        loss = own_loss(model.train(), self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class LossOfTheOutputs(DynamicRankTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Detached(DynamicRankTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ours, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return outputs.loss + (ours - outputs.loss).detach()


class TrainsInEvaluationMode(DynamicRankTrainer):
    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(model.eval(), *args, **kwargs)


class MixedIn(DynamicRankMixin, Trainer):
    pass


class OwnLossMixedIn(MixedIn):
    compute_loss = OwnLoss.compute_loss


def on_the_instance(*given, **named):
    run = DynamicRankTrainer(*given, **named)
    run.compute_loss = own_loss
    return run


def by_the_callback_alone(*given, **named):
    return Trainer(*given, callbacks=[DynamicRankCallback(adds_dem=True)], **named)


WITHOUT_DEM = [OwnLoss, OwnStep, LossOfTheOutputs, Detached, TrainsInEvaluationMode, OwnLossMixedIn,
               on_the_instance, by_the_callback_alone]  # fmt: skip


@pytest.mark.parametrize("trainer_class", WITHOUT_DEM)
def test_a_loss_of_ones_own_in_the_place_of_ours_is_an_error_at_the_first_step(
    trainer_class, tmp_path
):
    run = trainer_class(adapted(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match="dem_weight is set, but step 1 was taken without DEM"):
        run.train()


def test_who_wants_no_dem_is_free_to_take_any_loss(tmp_path):
    run = OwnLoss(adapted(dem_weight=0.0), arguments(tmp_path), train_dataset=rows())
    run.train()
    assert sum(run.model.rank_pattern().values()) == 24


def test_dem_that_is_lost_later_is_an_error_then(tmp_path):
    class Later(DynamicRankTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            late = self.state.global_step == 3
            return (
                own_loss(model, inputs) if late else super().compute_loss(model, inputs, **kwargs)
            )

    with pytest.raises(ValueError, match="step 4 was taken without DEM"):
        Later(adapted(), arguments(tmp_path), train_dataset=rows()).train()


class AddsDemItself(DynamicRankTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = own_loss(model, inputs)
        over = self.model.schedule().pruning_ended(self.state.global_step + 1)
        return loss if over else loss + 0.3 * self.model.dem_loss()


class TheirLoss(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        assert not kwargs.get("return_outputs")  # it has none to give
        return own_loss(model, inputs)


class WithoutOutputs(DynamicRankMixin, TheirLoss):
    pass


class Weighted(DynamicRankTrainer):
    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trainer_class", [AddsDemItself, WithoutOutputs, Weighted])
def test_a_loss_of_ones_own_that_has_dem_in_it_trains(trainer_class, accumulation, tmp_path):
    given = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    run = trainer_class(adapted(), given, train_dataset=rows())
    if trainer_class is Weighted:
        run.compute_loss_func = summed_loss
    run.train()
    assert sum(run.model.rank_pattern().values()) == 24


class AddsDemAgain(DynamicRankTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + 0.3 * self.model.dem_loss()


class AddsDemAfterTheStep(DynamicRankTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        (0.3 * self.model.base_model.dem_loss()).backward()
        return loss


class AddsDemInItsFunction(DynamicRankTrainer):
    def compute_loss_func(self, outputs, labels, num_items_in_batch):
        return summed_loss(outputs, labels, num_items_in_batch) + 0.3 * self.model.dem_loss()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.compute_loss_func, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trainer_class", [AddsDemAgain, AddsDemAfterTheStep, AddsDemInItsFunction])
def test_dem_that_is_added_a_second_time_is_an_error_at_the_first_step(
    trainer_class, accumulation, tmp_path
):
    given = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    run = trainer_class(adapted(), given, train_dataset=rows())
    message = "DEM is twice in the loss of step 1: DynamicRankTrainer and a loss of your own add it"
    with pytest.raises(ValueError, match=message):
        run.train()


class TakesTheMeanOfTwo(DynamicRankTrainer):
    """As R-Drop does it, which compares two passes."""

    def compute_loss(self, model, inputs, **kwargs):
        return sum(super(type(self), self).compute_loss(model, inputs, **kwargs) / 2 for _ in "ab")


def test_dem_in_both_halves_of_a_mean_counts_once(tmp_path):
    one, mean = (
        first_gradient(eight_rows(tmp_path, 2, trainer_class, dem_weight=0.7))
        for trainer_class in (DynamicRankTrainer, TakesTheMeanOfTwo)
    )
    for name, gradient in one.items():
        torch.testing.assert_close(mean[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_loop_of_ones_own_that_forgets_dem_is_stopped():
    model = adapted(total_step=12)
    ids = trainer_script.token_ids(8)
    loss = model(input_ids=ids, labels=(ids[:, 0] > 25).long()).loss
    loss.backward()
    with pytest.raises(ValueError, match=r"or add dem_weight \* model\.dem_loss\(\)"):
        model.update_and_allocate(1)
    (0.3 * model.dem_loss()).backward()
    model.update_and_allocate(1)


def test_a_mix_in_behind_the_trainer_is_refused_where_the_class_is_made():
    with pytest.raises(
        TypeError, match="class Behind: DynamicRankMixin must stand before the Trai"
    ):

        class Behind(Trainer, DynamicRankMixin):
            pass


def test_components_that_nothing_trains_are_an_error(tmp_path):
    run = trainer(tmp_path, adapted(dem_weight=0.0))
    run.model.base_model.disable_adapter_layers()
    run.model.get_base_model().classifier.requires_grad_(True)  # so that something trains
    with pytest.raises(ValueError, match="no gradient reaches any component in step 1"):
        run.train()


# --- checkpoints that were not finished ---------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A folder with checkpoints after steps 4, 8 and 12, and the state at the end."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, adapted(total_step=T), save_strategy="steps", save_steps=4)
    run.train()
    return folder, state_of(run.model)


@pytest.fixture
def checkpoints(whole_run, tmp_path):
    shutil.copytree(whole_run[0], tmp_path / "run")
    return tmp_path / "run"


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt",
         "rng_state.pth", "training_args.bin", "trainer_state.json"]  # fmt: skip


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_the_last_whole_checkpoint_is_taken_and_it_says_so(name, share, checkpoints):
    """A kill leaves a file cut off, and none of those that come after it."""
    assert last_whole(str(checkpoints), True) is True
    cut(checkpoints / "checkpoint-12" / name, share)
    with pytest.warns(UserWarning, match=rf"checkpoint-12 is .*{name} is cut off\): resuming"):
        assert last_whole(str(checkpoints), True) == str(checkpoints / "checkpoint-8")
    for later in FILES[FILES.index(name) + 1 :]:
        (checkpoints / "checkpoint-12" / later).unlink()
    cut(checkpoints / "checkpoint-8" / "trainer_state.json", share)
    named = str(checkpoints / "checkpoint-12")  # as get_last_checkpoint finds it
    with pytest.warns(UserWarning, match="resuming from checkpoint-4"):
        assert last_whole(str(checkpoints), named) == str(checkpoints / "checkpoint-4")


def flip(content: bytes, at: float) -> bytes:
    """The same with one bit flipped, at this share of its length."""
    changed = bytearray(content)
    changed[int(at * len(content))] ^= 4
    return bytes(changed)


DAMAGE = {
    "a bit": lambda content: flip(content, 0.6),
    "a bit near the end": lambda content: flip(content, 0.95),
    "zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", *FILES[2:5], "trainer_state.json"])
def test_a_checkpoint_that_was_changed_since_is_passed_over_and_it_says_so(
    name, damage, checkpoints
):
    path = checkpoints / "checkpoint-12" / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.warns(
        UserWarning, match=rf"{name} is (damaged|cut off)\): resuming from check.*-8"
    ):
        assert last_whole(str(checkpoints), True) == str(checkpoints / "checkpoint-8")


def test_a_number_in_a_checkpoint_that_is_another_now_is_noticed(checkpoints):
    """... and JSON still; an older checkpoint, without checksums, is taken as it is."""
    path = checkpoints / "checkpoint-12" / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 12', '"global_step": 13'))
    with pytest.warns(UserWarning, match=r"trainer_state\.json is damaged\): resuming"):
        last_whole(str(checkpoints), True)
    (checkpoints / "checkpoint-12" / "checksums.json").unlink()
    assert last_whole(str(checkpoints), True) is True


@pytest.mark.parametrize("name", [name for name in FILES if name[-4:] not in (".bin", "json")])
def test_a_checkpoint_that_lacks_a_file_is_not_whole(name, checkpoints):
    (checkpoints / "checkpoint-12" / name).unlink()
    with pytest.warns(UserWarning, match=r"is missing\): resuming from checkpoint-8"):
        assert last_whole(str(checkpoints), True) == str(checkpoints / "checkpoint-8")


def test_where_no_checkpoint_is_whole_training_starts_anew_and_it_says_so(checkpoints):
    for number in (4, 8, 12):
        (checkpoints / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="training starts from the beginning"):
        assert last_whole(str(checkpoints), True) is False
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is not a whole checkpoint, and none before"
    ):
        last_whole(str(checkpoints), str(checkpoints / "checkpoint-4"))


def test_what_is_no_checkpoint_is_left_to_trainer(checkpoints, tmp_path):
    assert last_whole(str(checkpoints), str(checkpoints / "nowhere")) == str(
        checkpoints / "nowhere"
    )
    (tmp_path / "empty").mkdir()
    assert last_whole(str(tmp_path / "empty"), True) is True


def test_a_checkpoint_of_the_model_alone_is_whole(tmp_path):
    run = trainer(tmp_path, save_strategy="epoch", save_only_model=True)
    run.train()
    assert not list(tmp_path.rglob("optimizer.pt"))
    assert last_whole(str(tmp_path), True) is True


@pytest.mark.parametrize("names", ["*.pt*", "scaler.pt", "scheduler.pt"])
def test_a_file_with_a_checksum_that_is_gone_is_noticed(names, checkpoints):
    """Even where all files of the training are, as if the model alone had been saved."""
    newest = checkpoints / "checkpoint-12"
    (newest / "scaler.pt").write_bytes((newest / "scheduler.pt").read_bytes())  # as fp16 has it
    write_checksums(newest)
    assert last_whole(str(checkpoints), True) is True
    for path in newest.glob(names):
        path.unlink()
    with pytest.warns(UserWarning, match=r"12 is .*\.pth? is missing\): resuming from check.*-8"):
        assert last_whole(str(checkpoints), True) == str(checkpoints / "checkpoint-8")


@pytest.mark.parametrize(
    "damaged", ["", "[]", "null", '"a"', '{"optimizer.pt": 1}', "\0\0", "\x04{}"]
)
def test_checksums_that_are_damaged_themselves_are_noticed(damaged, checkpoints):
    (checkpoints / "checkpoint-12" / "checksums.json").write_text(damaged)
    with pytest.warns(UserWarning, match=r"is (damaged|cut off)\): resuming from checkpoint-8"):
        assert last_whole(str(checkpoints), True) == str(checkpoints / "checkpoint-8")


class Killed(BaseException):
    """As SIGKILL: no handler of a mere Exception sees it."""


@pytest.mark.parametrize("at", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_killed_in_the_midst_of_a_checkpoint_ends_as_one_that_was_not(
    at, whole_run, tmp_path, monkeypatch
):
    def run():
        return trainer(tmp_path, adapted(total_step=T), save_strategy="steps", save_steps=4)

    saved = []

    def die_at_the_second(self, folder, *args, **kwargs):
        saved.append(folder)
        if len(saved) == 2:
            if at == "_save":
                Path(folder).mkdir()
                (Path(folder) / "adapter_model.safetensors").write_bytes(b"half of it")
            raise Killed
        return really(self, folder, *args, **kwargs)

    really = getattr(Trainer, at)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, at, die_at_the_second)
        run().train()
    assert (tmp_path / "checkpoint-8").exists()
    resumed = run()
    with pytest.warns(UserWarning, match="resuming from checkpoint-4"):
        resumed.train(resume_from_checkpoint=True)
    assert_same_bits(state_of(resumed.model), whole_run[1])
