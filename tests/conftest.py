"""What several test files share: random adapters away from zero, and a tiny encoder."""

import pytest
import torch
from torch import nn

from drlora_ref import DynamicLoRALinear


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def random_components(*leading: int, r: int = 5, d_in: int = 7, d_out: int = 9):
    """(lora_A, lora_B, lora_c) in float64, none of them zero."""
    like = dict(dtype=torch.float64)
    A, B = torch.randn(*leading, r, d_in, **like), torch.randn(*leading, d_out, r, **like)
    return A, B, torch.randn(*leading, r, **like)


def randomised(layer: DynamicLoRALinear) -> DynamicLoRALinear:
    """The layer with a random c: at c = 0 most statements hold trivially."""
    nn.init.normal_(layer.lora_c)
    return layer


def layers_of_two_shapes(n: int = 4, r: int = 3) -> nn.Sequential:
    """n adapted layers whose shapes alternate, so that stacking by shape must reorder them."""
    sizes = [(6, 6) if i % 2 else (6, 10) for i in range(n)]
    return nn.Sequential(*[randomised(DynamicLoRALinear(nn.Linear(*s), r)) for s in sizes])


@pytest.fixture
def tiny_roberta():
    """A random RoBERTa classifier, two layers of hidden size 16, in float32."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    return RobertaForSequenceClassification(config)
