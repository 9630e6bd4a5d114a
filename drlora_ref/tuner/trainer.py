"""Dynamic-rank DoRA in transformers' Trainer: a callback for Algorithm 1, a mix-in for DEM.

A script that trains a PeftModel by Trainer becomes dynamic-rank by two lines: get_peft_model takes
a DynamicRankConfig, and DynamicRankTrainer stands where Trainer stood. A subclass of Trainer joins
by `class MyTrainer(DynamicRankMixin, TheirTrainer)`.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback

from drlora_ref.tuner.checkpoints import (
    last_whole,
    write_checksum_of_random_numbers,
    write_checksums,
)
from drlora_ref.tuner.layer import SHARDED
from drlora_ref.tuner.model import find_tuner

# Losses of transformers that are a sum over tokens, divided by the number they are given.
DIVIDED = {"ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"}


class DynamicRankCallback(TrainerCallback):
    """Runs the allocator after every optimizer step of a Trainer (Algorithm 1, lines 7-9).

    A step is what Trainer's `global_step` counts: accumulation counts once. The callback has no
    memory of its own; EMA, masks and step count are buffers of the model, so they are in every
    checkpoint, and resume_from_checkpoint goes on exactly.

    It fills in the configuration's total_step where that is None. `load_best_model_at_end` chooses
    only among evaluations after pruning has ended: those before are of a model with more
    components. DynamicRankMixin adds the callback by itself; added by hand, it does all but DEM.

    Raises ValueError when training begins: if total_step is not the number of steps to come, if
    the adapter has been trained for other than the steps that Trainer resumes from, or if
    dem_weight is set and nothing adds DEM. At the first step whose gradients are without DEM, since
    a loss of the user's own has taken the place of ours. And when training ends before pruning
    does. Parameters sharded by FSDP or DeepSpeed are refused; DDP is fine.
    """

    def __init__(self, adds_dem: bool = False):
        self.adds_dem = adds_dem

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.fsdp or args.deepspeed:
            raise ValueError(SHARDED)
        tuner = find_tuner(model)
        name = tuner.one_adapter()
        saved = tuner.memory(name)
        fresh = saved.found_total_step and not int(saved.last_step)  # an attempt without a step
        if tuner.peft_config[name].total_step is None or fresh:
            tuner.set_total_step(state.max_steps)
        config = tuner.peft_config[name]
        if config.total_step != state.max_steps:
            raise ValueError(
                f"total_step = {config.total_step}, but this training has {state.max_steps} "
                "optimizer steps: leave total_step out, or let epochs or max_steps make as many"
            )
        if config.dem_weight and not self.adds_dem:
            raise ValueError(
                f"dem_weight = {config.dem_weight}, but nothing adds DEM to the loss: take "
                "DynamicRankTrainer, or DynamicRankMixin before your own Trainer class"
            )
        if tuner.allocator().last_step != state.global_step:
            raise ValueError(
                f"the adapter has {tuner.allocator().last_step} steps of training behind it, and "
                f"Trainer starts after step {state.global_step}: resume from that checkpoint "
                "(resume_from_checkpoint), or take a fresh adapter"
            )

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Scores may need the gradients: before Trainer sets them to zero and counts the step.
        tuner, step = find_tuner(model), state.global_step + 1
        if all(layer.lora_c.grad is None for layer in tuner.adapted_layers().values()):
            raise ValueError(f"no gradient reaches any component in step {step}: none is trained")
        tuner.update_and_allocate(step)
        # This step's evaluation comes after this call, so what was best through t_end is forgotten
        # in the step after it.
        if not tuner.schedule().pruning_ended(step - 1):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not checkpoint.is_dir():  # a search for parameters has folders within
            return
        if args.should_save:
            write_checksums(checkpoint)
        if args.world_size > 1:
            write_checksum_of_random_numbers(checkpoint, args.process_index)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        find_tuner(model).check_pruned()


def divides_its_loss(model: nn.Module) -> bool:
    """Whether a model of transformers divides its loss by the `num_items_in_batch` it is given.

    Trainer believes so of every model whose forward takes **kwargs, and leaves the loss as it is.
    Classifiers (of RoBERTa, BERT, MPNet, BART, Llama) take them too and return the batch's mean
    all the same: with k accumulated batches the gradient is then k times too large, with n
    processes n times. Language models do divide, where they call `self.loss_function`. A wrong no
    does little harm: Trainer then divides a mean by the number of batches itself.
    """
    if hasattr(model, "accepts_loss_kwargs"):  # a model that says so itself is believed
        return bool(model.accepts_loss_kwargs)
    calls = inspect.unwrap(type(model).forward).__code__.co_names
    return "loss_function" in calls and getattr(model, "loss_type", None) in DIVIDED


# To a type checker the mix-in is a Trainer: it has what it asks of self, and super() is one.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class DynamicRankMixin(_Trainer):
    """Put before a Trainer class: adds DEM to its training loss, ranks to its logs, the callback.

        loss + dem_weight · R                      Eq. 10, until pruning has ended

    R depends on the weights alone, so it counts once in an optimizer step however many batches are
    accumulated, and not at all in an evaluation's loss. The training loss in the logs contains it.

    That the number of accumulated batches changes no gradient holds for the task's loss as well:
    where Trainer would take a mean for a share (see divides_its_loss), it is told so.

    Logged with each training loss: `rank` (surviving components, mean over matrices), `rank_min`,
    `rank_max`, and `rank_budget`, the b(t) of Eq. 9.

    Who kills a training may leave a half-written checkpoint, and a disk may change one. Asked to
    resume from it, or from the last one (resume_from_checkpoint=True), `train` takes the last that
    is whole, and says so.

    Raises TypeError for a model without a dynamic-rank adapter and for a class in which a Trainer
    stands before it, ValueError under FSDP or DeepSpeed.
    """

    model_accepts_loss_kwargs: bool
    items_of_step: Any = None  # labels that count, in all batches of the step that is being taken

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(DynamicRankMixin):
            raise TypeError(f"class {cls.__name__}: DynamicRankMixin must stand before the Trainer")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(SHARDED)
        base = find_tuner(self.model).model
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and divides_its_loss(base)
        self.remove_callback(DynamicRankCallback)  # one that was added by hand: it would step twice
        self.add_callback(DynamicRankCallback(adds_dem=True))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_whole(folder, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.items_of_step = num_items_in_batch
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.items_of_step = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is None:  # a compute_loss in between did not hand it on
            num_items_in_batch = self.items_of_step
        result: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = result if return_outputs else (result, None)
        tuner = find_tuner(self.model)
        weight = tuner.peft_config[tuner.one_adapter()].dem_weight
        step = self.state.global_step + 1  # the one that this loss belongs to
        if weight and model.training and not tuner.schedule().pruning_ended(step):
            # Trainer divides a loss by the number of accumulated batches, except where the model
            # has done so already; then R must be divided here.
            divided = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
            if self.loss_is_scaled_for_ga is not None:
                divided = self.loss_is_scaled_for_ga
            loss = loss + weight * tuner.dem_loss(by="DynamicRankTrainer") / (
                self.current_gradient_accumulation_steps if divided else 1
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.is_in_train:
            tuner = find_tuner(self.model)
            ranks = tuner.rank_pattern().values()
            logs["rank"] = sum(ranks) / len(ranks)
            logs["rank_min"], logs["rank_max"] = min(ranks), max(ranks)
            logs["rank_budget"] = tuner.schedule().budget(self.state.global_step)
        super().log(logs, *args, **kwargs)


class DynamicRankTrainer(DynamicRankMixin, Trainer):
    """transformers' Trainer for a PeftModel with a DynamicRankConfig; arguments as Trainer's."""
