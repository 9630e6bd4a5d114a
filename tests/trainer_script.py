"""A small Trainer script, dynamic-rank by the two lines that say so. Tests import it and run it:

python trainer_script.py FOLDER [--still] [--score=NAME] [CHECKPOINT]

It leaves the adapter, and the mask after every step.
"""

import os
import sys
from pathlib import Path

import torch
from conftest import TINY
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from drlora_ref.tuner import DynamicRankConfig
from drlora_ref.tuner.trainer import DynamicRankTrainer

SIZES = dict(TINY, vocab_size=50)


def base_model(**config) -> RobertaForSequenceClassification:
    """The same random RoBERTa at every call."""
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SIZES | config))


def adapted(base=None, **given):
    """base_model (or `base`) with components, from 3 to 2 in each of 12 matrices."""
    defaults = dict(init_r=3, target_r=2, deltaT=2, dem_weight=0.3, task_type="SEQ_CLS")
    return get_peft_model(base or base_model(), DynamicRankConfig(**defaults | given))  # line 1


def still(**given):
    """The same without any dropout."""
    base = base_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return adapted(base, lora_dropout=0.0, **given)


def token_ids(n: int = 48, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 50, (n, length), generator=torch.Generator().manual_seed(1))


def rows(n: int = 48) -> Dataset:
    ids = token_ids(n)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] > 25).int().tolist()})


def arguments(folder, **given) -> TrainingArguments:
    """Twelve steps: 48 rows in batches of 8, two epochs; pruning ends at step 6."""
    defaults = dict(
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return TrainingArguments(folder, **defaults | given)


class MaskAtEveryStep(TrainerCallback):
    def __init__(self):
        self.masks = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.masks.append(model.base_model.allocator().mask.clone())


def trainer(folder, model=None, **given) -> DynamicRankTrainer:
    return DynamicRankTrainer(  # line 2
        model or adapted(), arguments(folder, **given), train_dataset=rows(), eval_dataset=rows()
    )


def main(folder: str, *rest: str) -> None:
    given = {}
    for word in rest:
        if word.startswith("--score="):
            given["score"] = word.removeprefix("--score=")
    model = still(**given) if "--still" in rest else adapted(**given)
    # Buffers are not broadcast: that both ranks have one mask is the allocator's doing.
    saving = dict(save_strategy="steps", save_steps=3) if "WORLD_SIZE" in os.environ else {}
    run = trainer(folder, model, ddp_broadcast_buffers=False, **saving)
    seen = MaskAtEveryStep()
    run.add_callback(seen)
    run.train(resume_from_checkpoint=next((word for word in rest if word[:2] != "--"), None))
    rank = run.args.process_index
    torch.save(torch.stack(seen.masks), Path(folder) / f"masks-{rank}.pt")
    run.model.save_pretrained(Path(folder) / f"adapter-{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
