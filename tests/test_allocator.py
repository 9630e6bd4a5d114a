"""Algorithm 1, lines 7-9: selection, revival and its end, saving and going on."""

import copy
import io

import pytest
import torch
from conftest import layers_of_two_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drlora_ref import (
    SCORES,
    BudgetSchedule,
    RankAllocator,
    dynamic_layers,
    importance_scores,
    inject_adapters,
    select_components,
)
from drlora_ref.allocator import Diverged, spread_evenly, zero_pruned

SCHEDULE = BudgetSchedule(init_r=3, target_r=2, total_steps=40, deltaT=5)  # events 6, 11, 16, 20


def training(model: nn.Module, seed: int = 1):
    """(optimizer, one_step): a small regression that gives every parameter a gradient."""
    for layer in dynamic_layers(model).values():
        layer.lora_dropout.p = 0.0
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)

    def one_step():
        optimizer.zero_grad()
        for layer in dynamic_layers(model).values():
            x = torch.randn(8, layer.base_layer.in_features, generator=generator)
            (layer(x) - x[:, :1]).square().mean().backward()
        optimizer.step()

    return optimizer, one_step, generator


def test_selection_keeps_the_highest_scores():
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]])
    expected = [[False, True, True], [True, False, False]]
    assert select_components(scores, torch.tensor([2, 1])).tolist() == expected


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=40), st.data())
def test_selection_is_exact_and_the_earlier_position_wins_a_tie(values, data):
    keep = data.draw(st.integers(0, len(values)))
    by_score_then_position = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    mask = select_components(torch.tensor(values), keep)
    assert mask.nonzero().flatten().tolist() == sorted(by_score_then_position)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_selection_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="1 of 3 scores are NaN or infinite"):
        select_components(torch.tensor([0.1, bad, 0.2]), 2)


@pytest.mark.parametrize("keep", [-1, 4])
def test_selection_refuses_a_count_outside_its_range(keep):
    with pytest.raises(ValueError, match=f"keep = {keep}: must be between 0 and the 3"):
        select_components(torch.rand(3), keep)


def test_stacked_scores_lie_in_named_modules_order():
    model = layers_of_two_shapes(5)
    allocator = RankAllocator(model, SCHEDULE)
    one_by_one = [
        importance_scores(m.lora_A, m.lora_B, m.lora_c) for m in dynamic_layers(model).values()
    ]
    torch.testing.assert_close(allocator.scores(), torch.cat(one_by_one))


def test_ties_are_broken_by_position_across_layers_of_different_shapes():
    model = layers_of_two_shapes(4)
    allocator = RankAllocator(model, SCHEDULE, score=lambda A, B, c: torch.ones_like(c))
    for step in range(1, 21):
        allocator.step(step)
    assert allocator.mask.tolist() == [True] * 8 + [False] * 4
    assert list(allocator.rank_pattern().values()) == [3, 3, 2, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(2, 60),
    st.integers(1, 20),
    st.sampled_from(list(SCORES)),
)
def test_exactly_layers_times_target_r_survive(target_r, extra, n_layers, total, deltaT, score):
    model = layers_of_two_shapes(n_layers, r=target_r + extra)
    schedule = BudgetSchedule(target_r + extra, target_r, total, deltaT=deltaT)
    allocator = RankAllocator(model, schedule, score=score)
    for step in range(1, total + 1):
        sum(layer(torch.randn(5, 6)).sum() for layer in model).backward()
        allocator.step(step)
        kept = schedule.keep_count(step, n_layers * schedule.init_r)
        assert allocator.mask.sum() == kept or not schedule.prunes_at(step)
    assert sum(allocator.rank_pattern().values()) == n_layers * target_r


def test_a_pruned_component_comes_back_before_the_end_of_pruning_and_never_after():
    model = layers_of_two_shapes()
    allocator, (_, one_step, _) = RankAllocator(model, SCHEDULE, score="random"), training(model)
    layers = dynamic_layers(model).values()
    moved, selected_again, previous = 0, 0, allocator.mask
    for step in range(1, 41):
        one_step()
        if step <= SCHEDULE.t_end:  # c of pruned components has trained away from zero
            moved += sum(int((m.lora_c[~m.component_mask] != 0).sum()) for m in layers)
        allocator.step(step)
        selected_again += int((allocator.mask & ~previous).sum())
        if step == SCHEDULE.t_end:
            final = allocator.mask
        if step > SCHEDULE.t_end:
            assert torch.equal(allocator.mask, final)
        if step >= SCHEDULE.t_end:
            assert all(not m.lora_c[~m.component_mask].any() for m in layers)
        previous = allocator.mask
    assert moved > 0 and selected_again > 0


def test_the_gradient_of_a_zeroed_c_is_not_zero():
    model = layers_of_two_shapes()
    allocator, (_, one_step, _) = RankAllocator(model, SCHEDULE), training(model)
    for step in range(1, 21):
        one_step()
        allocator.step(step)
    one_step()
    pruned = [m for m in dynamic_layers(model).values() if m.rank < 3]
    assert pruned and all(m.lora_c.grad[~m.component_mask].abs().min() > 0 for m in pruned)


def test_momentum_alone_would_move_a_pruned_c_after_the_end():
    c = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([c], lr=0.1, weight_decay=0.0)
    c.grad = torch.ones(1)
    optimizer.step()
    with torch.no_grad():
        c.zero_()
    c.grad = torch.zeros(1)
    optimizer.step()
    assert c.item() != 0


@pytest.mark.parametrize("score", ["frobenius_share", "random", "output_norm", "loss_sensitivity"])
@pytest.mark.parametrize("stop_at", [3, 12, 25])  # warm-up, pruning, mask fixed
def test_saving_loading_and_going_on_is_bit_identical_to_never_stopping(score, stop_at):
    model = layers_of_two_shapes()
    allocator, (optimizer, one_step, generator) = (
        RankAllocator(model, SCHEDULE, score=score, seed=3),
        training(model),
    )
    for step in range(1, 41):
        one_step()
        allocator.step(step)
        if step == stop_at:
            saved = io.BytesIO()
            state = (model.state_dict(), optimizer.state_dict(), allocator.state_dict())
            torch.save((*state, generator.get_state()), saved)

    again = layers_of_two_shapes()
    second, (optimizer2, one_step, generator2) = (
        RankAllocator(again, SCHEDULE, score=score, seed=3),
        training(again),
    )
    saved.seek(0)
    weights, optimizer_state, allocator_state, data_state = torch.load(saved)
    again.load_state_dict(weights)
    optimizer2.load_state_dict(optimizer_state)
    second.load_state_dict(allocator_state)
    generator2.set_state(data_state)
    for step in range(stop_at + 1, 41):
        one_step()
        second.step(step)

    assert torch.equal(second.ema, allocator.ema) and torch.equal(second.mask, allocator.mask)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_state_alone_restores_the_masks():
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE)
    for step in range(1, 21):
        allocator.step(step)
    other = RankAllocator(layers_of_two_shapes(), SCHEDULE)
    other.load_state_dict(copy.deepcopy(allocator.state_dict()))
    assert other.rank_pattern() == allocator.rank_pattern() and other.last_step == 20


def test_two_processes_with_one_seed_draw_the_same_random_scores_whatever_else_they_drew():
    masks = []
    for noise in (0, 5):
        model = layers_of_two_shapes()
        allocator = RankAllocator(model, SCHEDULE, score="random", seed=7)
        for step in range(1, 21):
            torch.rand(noise)
            allocator.step(step)
        masks.append(allocator.mask)
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(beta=0.5), "of another beta: 0.9, here 0.5"),
        (dict(score="abs_c"), "of another score: frobenius_share, here abs_c"),
        (dict(schedule=BudgetSchedule(3, 1, 40)), "of another schedule"),
    ],
)
def test_a_state_of_another_configuration_is_refused(given, message):
    state = RankAllocator(layers_of_two_shapes(), SCHEDULE).state_dict()
    other = RankAllocator(layers_of_two_shapes(), **{"schedule": SCHEDULE, **given})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(score="frobenius"), "score = 'frobenius': must be one of frobenius_share, "),
        (dict(score=None), "score = None: must be a function or one of frobenius_share, "),
        (dict(beta=1.0), "beta = 1.0"),
        (dict(beta=float("nan")), "beta = nan"),
        (dict(beta="x"), "beta = 'x'"),
        (dict(uniform="no"), "uniform = 'no': must be True or False"),
        (dict(schedule=BudgetSchedule(4, 2, 40)), "init_r = 4, but the layers have r = 3"),
        (dict(model=nn.Linear(2, 2)), "call inject_adapters first"),
    ],
)
def test_impossible_allocators_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RankAllocator(**{"model": layers_of_two_shapes(), "schedule": SCHEDULE, **given})


@pytest.mark.parametrize("step", [0, 2, 17])
def test_a_step_left_out_is_refused(step):
    with pytest.raises(ValueError, match=rf"step\({step}\) after step 0: call it once after every"):
        RankAllocator(layers_of_two_shapes(), SCHEDULE).step(step)


@pytest.mark.parametrize("score", SCORES)
def test_uniform_keeps_the_same_number_in_every_layer_its_own_best(score):
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE, score=score, uniform=True)
    _, one_step, _ = training(model)
    for step in range(1, SCHEDULE.t_end + 1):
        one_step()
        allocator.step(step)
        ranks = allocator.rank_pattern().values()
        assert max(ranks) - min(ranks) <= 1
        if SCHEDULE.prunes_at(step):  # as many at every event as where one queue is cut
            assert sum(ranks) == SCHEDULE.keep_count(step, 12)
    assert set(ranks) == {2}
    worst = allocator.ema.view(4, 3).argmin(dim=1)
    assert (~allocator.mask).nonzero().flatten().tolist() == [
        3 * i + w for i, w in enumerate(worst)
    ]


def test_spread_evenly_takes_each_layers_best_and_of_the_rest_the_best_of_all():
    """Against the same rule written out, at every number that may be kept; ties too."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (2, 5, 3), generator=draw).float()
    for keep in range(16):
        masks = select_components(spread_evenly(scores), keep).view(2, 5, 3)
        for own, mask in zip(scores, masks, strict=True):
            queue = []
            for i, layer in enumerate(own.tolist()):
                best_first = sorted(range(3), key=lambda j: (-layer[j], j))
                queue += [(place, -layer[j], i, j) for place, j in enumerate(best_first)]
            kept = {(i, j) for _, _, i, j in sorted(queue)[:keep]}
            assert kept == {tuple(at) for at in mask.nonzero().tolist()}
    with pytest.raises(Diverged, match="1 of 6 scores are NaN or infinite"):
        spread_evenly(torch.tensor([[1.0, torch.nan], [0, 0], [0, 0]]))


def test_a_state_from_before_uniform_had_a_name_is_that_of_one_budget():
    model = layers_of_two_shapes()
    state = RankAllocator(model, SCHEDULE).state_dict()
    del state["configuration"]["uniform"]
    RankAllocator(model, SCHEDULE).load_state_dict(state)
    with pytest.raises(ValueError, match="another uniform: False, here True"):
        RankAllocator(model, SCHEDULE, uniform=True).load_state_dict(state)


def test_zeros_are_written_over_nan_too():
    model = layers_of_two_shapes()
    for layer in dynamic_layers(model).values():
        layer.lora_c.data.fill_(float("nan"))
        layer.component_mask[1:] = False
    zero_pruned(dynamic_layers(model))
    for layer in dynamic_layers(model).values():
        assert layer.lora_c[0].isnan() and not layer.lora_c[1:].any()


@pytest.mark.parametrize("wrap", ["compiled", "in parallel", "a compiled part"])
def test_a_state_goes_on_in_a_model_that_is_wrapped_otherwise(wrap):
    model = layers_of_two_shapes()
    saved = RankAllocator(model, SCHEDULE).state_dict()
    if wrap == "a compiled part":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        wrapper = nn.DataParallel if wrap == "in parallel" else torch.compile
        model = wrapper(model)
    other = RankAllocator(model, SCHEDULE)
    other.load_state_dict(saved)
    assert list(other.rank_pattern()) == ["0", "1", "2", "3"]


class Blocks(nn.Module):
    """Three blocks of two layers; some are passed by, or skipped in a step."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({n: nn.Linear(6, 6) for n in ("query", "value")})  # noqa: E731
        self.h = nn.ModuleList([block() for _ in range(3)])

    def forward(self, x, skipped=(), passed_by=()):
        for i, block in enumerate(self.h):
            if i not in skipped:
                for name, layer in block.items():
                    past = f"{i}.{name}" in passed_by or name in passed_by
                    x = nn.functional.linear(x, layer.weight, layer.bias) if past else layer(x)
        return x


def steps_of(skipped=lambda step: (), passed_by=(), steps=40, score="frobenius_share"):
    model = inject_adapters(Blocks(), ["query", "value"], r=3)
    allocator = RankAllocator(model, SCHEDULE, score=score)
    for step in range(1, steps + 1):
        model(torch.randn(5, 6), skipped(step), passed_by).sum().backward()
        allocator.step(step)
        model.zero_grad()
    return allocator


@pytest.mark.parametrize("score", ["frobenius_share", "frobenius_norm", "random"])
def test_layers_that_no_gradient_reaches_are_refused_at_the_first_step(score):
    message = r"no gradient reaches h\.0\.value, h\.1\.value, h\.2\.value: the model does not call"
    with pytest.raises(ValueError, match=message):
        steps_of(passed_by=("value",), steps=1, score=score)


def test_one_of_many_is_refused_before_anything_is_pruned():
    """It might have been skipped by chance until then."""
    steps_of(passed_by=("1.value",), steps=5)
    with pytest.raises(ValueError, match=r"no gradient reaches h\.1\.value: .*Leave it out"):
        steps_of(passed_by=("1.value",), steps=6)  # the first event


def test_blocks_that_are_skipped_at_random_are_not_refused():
    assert sum(steps_of(skipped=lambda step: (step % 3, 2)[: step % 2 + 1]).rank_pattern().values())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_to_a_score_of_gradients_a_skipped_layer_has_zeros(set_to_none):
    """Whichever way the gradients were cleared before the step."""
    model = inject_adapters(Blocks(), ["query", "value"], r=3)
    with torch.no_grad():
        for layer in dynamic_layers(model).values():
            layer.lora_c.normal_()
    allocator = RankAllocator(model, SCHEDULE, score="loss_sensitivity")
    for step, skipped in enumerate([(), (1,)], 1):
        model.zero_grad(set_to_none)
        model(torch.randn(5, 6), skipped).sum().backward()
        scores = allocator.scores().view(3, 2, 3)  # block, layer, component
        assert [bool(block.all()) for block in scores] == [i not in skipped for i in range(3)]
        assert not scores[list(skipped)].any()
        allocator.step(step)


@pytest.mark.parametrize("score", SCORES)
def test_blocks_may_be_skipped_at_random_under_every_score(score):
    ranks = steps_of(skipped=lambda step: (step % 3,), score=score).rank_pattern()
    assert sum(ranks.values()) == 6 * SCHEDULE.target_r


def test_a_loop_without_gradients_is_not_asked_for_them():
    allocator = RankAllocator(inject_adapters(Blocks(), ["query"], r=3), SCHEDULE)
    for step in range(1, 41):
        allocator.step(step)
    assert sum(allocator.rank_pattern().values()) == 6


@pytest.mark.parametrize("frozen", ["all", "one"])
@pytest.mark.parametrize("score", ["frobenius_share", "output_norm", "loss_sensitivity"])
def test_frozen_components_are_refused_at_the_first_step(frozen, score):
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE, score=score)
    _, one_step, _ = training(model)
    layers = dynamic_layers(model)
    first = next(iter(layers))
    for layer in layers.values() if frozen == "all" else [layers[first]]:
        layer.lora_c.requires_grad_(False)
    one_step()
    with pytest.raises(ValueError, match=rf"lora_c of {first}.* is frozen"):
        allocator.step(1)


def test_components_that_are_frozen_later_are_refused_at_the_next_event():
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE)
    optimizer, one_step, _ = training(model)
    for step in range(1, 8):
        one_step()
        allocator.step(step)
    optimizer.zero_grad(set_to_none=False)
    model[0].lora_c.requires_grad_(False)
    for step in range(8, 11):
        allocator.step(step)
    with pytest.raises(ValueError, match="lora_c of 0 is frozen"):
        allocator.step(11)


@pytest.mark.parametrize("score", ["loss_sensitivity", "output_norm"])
def test_a_step_that_a_grad_scaler_skips_counts_for_nothing(score):
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE, score=score)
    _, one_step, _ = training(model)
    cs = [layer.lora_c for layer in dynamic_layers(model).values()]
    for step in range(1, 21):
        before = allocator.ema.clone()
        one_step()
        if step in (3, 6, 7):  # 6 is an event
            cs[0].grad[1] = float("inf")
        allocator.step(step)
        assert torch.equal(allocator.ema, before) == (step in (3, 6, 7))
    assert allocator.mask.sum() == SCHEDULE.target_r * len(cs)


@pytest.mark.parametrize("score", ["loss_sensitivity", "output_norm"])
def test_where_every_step_was_skipped_there_is_nothing_to_select_by(score):
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE, score=score)
    _, one_step, _ = training(model)
    with pytest.raises(Diverged):
        for step in range(1, 7):
            one_step()
            model[0].lora_c.grad[1] = float("nan")
            allocator.step(step)
    assert allocator.last_step == 6 and allocator.mask.all()


def test_gradients_of_a_run_that_has_diverged_do_count():
    model = layers_of_two_shapes()
    allocator = RankAllocator(model, SCHEDULE, score="loss_sensitivity")
    _, one_step, _ = training(model)
    cs = [layer.lora_c for layer in dynamic_layers(model).values()]
    with pytest.raises(Diverged):
        for step in range(1, 7):
            one_step()
            cs[0].grad[1] = cs[0].data[1] = float("nan")
            allocator.step(step)
