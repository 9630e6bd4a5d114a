"""Dynamic-rank DoRA for PEFT and Trainer: importing this package teaches PEFT the method.

Laid out as PEFT lays out a method: config, layer, model, with fitting (what is asked of a model
before an adapter goes in); then trainer (Trainer and its callback) with checkpoints, export (stock
LoRA) and card (the model card of an export).
"""

from drlora_ref.tuner.config import DynamicRankConfig
from drlora_ref.tuner.export import export_lora
from drlora_ref.tuner.model import DynamicRankModel
from drlora_ref.tuner.trainer import DynamicRankCallback, DynamicRankMixin, DynamicRankTrainer

__all__ = [
    "DynamicRankCallback",
    "DynamicRankConfig",
    "DynamicRankMixin",
    "DynamicRankModel",
    "DynamicRankTrainer",
    "export_lora",
]
