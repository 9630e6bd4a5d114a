"""What is trained is float32, and so is what decides about it, whatever the model is cast to."""

import copy
import pickle

import pytest
import torch
from conftest import layers_of_two_shapes, random_components, random_extras
from peft import get_peft_model
from torch import nn
from trainer_script import base_model, token_ids

from drlora_ref import (
    SCORES,
    BudgetSchedule,
    DynamicLoRALinear,
    RankAllocator,
    dem_loss,
    dynamic_layers,
    ema_update,
    importance_scores,
    inject_adapters,
    mark_only_adapters_trainable,
)
from drlora_ref.precision import StaysFloat32, train_in_float32
from drlora_ref.tuner import DynamicRankConfig

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HALF = [torch.float16, torch.bfloat16]
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device and type": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
    "half and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_components_keep_every_bit_and_the_frozen_weight_is_cast(cast):
    layer = DynamicLoRALinear(nn.Linear(6, 5), r=3)
    before = {n: t.clone() for n, t in layer.state_dict().items() if "lora" in n}
    CASTS[cast](nn.Sequential(layer))
    for name, tensor in before.items():
        assert torch.equal(layer.state_dict()[name], tensor), name
    assert (layer.base_layer.weight.dtype in HALF) == ("back" not in cast)


def test_float64_is_not_held_back():
    layer = DynamicLoRALinear(nn.Linear(6, 5), r=3).double()
    assert layer.lora_A.dtype == layer.base_layer.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF)
def test_a_copy_and_a_pickled_one_stay_float32_too(dtype):
    layer = DynamicLoRALinear(nn.Linear(6, 5), r=3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, StaysFloat32) and other.to(dtype).lora_A.dtype == torch.float32
    head = pickle.loads(pickle.dumps(copy.deepcopy(train_in_float32(nn.Linear(3, 2)))))
    assert head.to(dtype)(torch.ones(1, 3, dtype=dtype)).dtype == dtype
    assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("score", SCORES)
def test_a_layer_without_a_component_scores_zero_in_half_precision(score, dtype):
    """Under Eq. 7 its share is 0 / ε, and in float16 ε was 0."""
    model = layers_of_two_shapes(2)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # as no cast of the model would do it
    dynamic_layers(model)["0"].lora_c.data.zero_()
    allocator = RankAllocator(model, BudgetSchedule(3, 2, 40), score=score)
    sum(layer(torch.randn(5, 6, dtype=dtype)).float().sum() for layer in model).backward()
    for step in range(1, 21):
        if "z_square" in allocator.needs:
            model[0](torch.randn(5, 6, dtype=dtype)), model[1](torch.randn(5, 6, dtype=dtype))
        allocator.step(step)
    assert allocator.ema.dtype == torch.float32 and allocator.ema.isfinite().all()
    assert dem_loss(model).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_scores_of_half_precision_are_those_of_the_same_numbers_in_float32(dtype):
    A, B, c = (t.to(dtype) for t in random_components())
    assert torch.equal(
        importance_scores(A, B, c), importance_scores(A.float(), B.float(), c.float())
    )
    assert importance_scores(A, B, torch.zeros_like(c)).eq(0).all()
    for score in SCORES.values():  # float64 is as it was
        like = [t.double() for t in (A, B, c)]
        assert score(*like, **random_extras(score, like[2])).dtype == torch.float64


@pytest.mark.parametrize("beta", [0.9, 0.999])
@pytest.mark.parametrize("dtype", HALF)
def test_the_average_of_ones_does_not_stick(dtype, beta):
    average = torch.zeros(1, dtype=dtype)
    for _ in range(3000):
        average = ema_update(average, torch.ones(1, dtype=dtype), beta)
    assert average.item() == pytest.approx(1 - beta**3000, abs=1e-3)


def adapted_by_peft(base):
    given = dict(init_r=3, target_r=2, total_step=12, deltaT=2, task_type="SEQ_CLS")
    model = get_peft_model(base, DynamicRankConfig(**given, lora_dropout=0.0))
    return model, model.update_and_allocate


def adapted_by_core(base):
    model = mark_only_adapters_trainable(inject_adapters(base, r=3, lora_dropout=0.0))
    return model, RankAllocator(model, BudgetSchedule(3, 2, 12, deltaT=2)).step


def train(model, step, lr=1e-2, steps=12):
    ids = token_ids(16)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    for t in range(1, steps + 1):
        model.eval()(input_ids=ids, labels=(ids[:, 0] > 25).long()).loss.backward()
        optimizer.step()
        step(t)
        optimizer.zero_grad()
    return model


def head_of(model) -> torch.Tensor:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    return torch.cat([p.detach().flatten().float() for p in trained.values()])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("door", [adapted_by_core, adapted_by_peft])
def test_all_that_is_trained_is_float32_in_a_half_precision_model(door, dtype, when):
    """Cast before it is adapted, or after: no NaN, and the ranks come out."""
    base = base_model().to(dtype) if when == "before" else base_model()
    model, step = door(base)
    model = train(model if when == "before" else model.to(dtype), step)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.isfinite().all() for p in trained)
    assert sum(layer.rank for layer in dynamic_layers(model).values()) == 24
    frozen = {p.dtype for n, p in model.named_parameters() if "base_layer" in n}
    assert frozen == {dtype} and model(input_ids=token_ids(2)).logits.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("door", [adapted_by_core, adapted_by_peft])
def test_the_head_of_a_half_precision_model_moves_as_in_float32(door, dtype):
    moved = []
    for base in (base_model(), base_model().to(dtype)):
        model, step = door(base)
        before = head_of(model)
        moved.append((head_of(train(model, step, lr=1e-5)) - before).norm().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.15)


class Inputs(nn.Module):
    """Takes tensors by place, by name and in a tuple, and gives a tuple back."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, pair, mask=None, *, scale=None):
        a, b = pair
        assert {a.dtype, b.dtype, scale.dtype} == {torch.float32} and mask.dtype == torch.bool
        return self.linear(a + b) * scale, mask


@pytest.mark.parametrize("dtype", HALF)
def test_inputs_are_taken_up_and_outputs_go_back_wherever_they_stand(dtype):
    module = train_in_float32(Inputs().to(dtype))
    a = torch.ones(2, 3, dtype=dtype)
    out, mask = module((a, a), a > 0, scale=a)
    assert out.dtype == dtype and mask.dtype == torch.bool
    embedding = train_in_float32(nn.Embedding(4, 3).to(dtype))
    assert embedding(torch.tensor([1])).dtype == dtype and embedding.weight.dtype == torch.float32
    whole = train_in_float32(nn.Linear(3, 2))
    assert whole(torch.ones(1, 3)).dtype == torch.float32


@pytest.mark.parametrize("name", ["LayerNorm", "word_embeddings", "intermediate.dense"])
@pytest.mark.parametrize("dtype", HALF)
def test_any_module_that_is_trained_whole_is_float32_within_a_half_precision_body(name, dtype):
    given = dict(init_r=3, target_r=2, total_step=12, task_type="SEQ_CLS")
    config = DynamicRankConfig(**given, target_modules=["query"], modules_to_save=[name])
    model = get_peft_model(base_model().to(dtype), config)
    train(model, model.update_and_allocate, steps=2)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(f"{name}.modules_to_save" in n for n in trained)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trained.values())


def test_memory_of_the_allocator_keeps_every_bit_through_a_cast():
    model, step = adapted_by_peft(base_model())
    train(model, step, steps=3)
    before = model.base_model.memory().ema.clone()
    assert before.any() and torch.equal(model.half().base_model.memory().ema, before)
