"""Problems with a known answer."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

from drlora_ref import PENALTIES, SCORES, ZWatch, dynamic_layers, penalty_loss, planted

SMALL = dict(dim=16, init_r=6, target_r=2, total_steps=600)


def test_planted_updates_have_the_rank_and_the_singular_values_they_should():
    updates = planted.plant([0, 1, 5], dim=8, generator=torch.Generator().manual_seed(0))
    expected = [[0.0] * 8, [2.0] + [0.0] * 7, [2.0] * 5 + [0.0] * 3]
    torch.testing.assert_close(
        torch.linalg.svdvals(updates), torch.tensor(expected), atol=1e-5, rtol=0
    )


def test_the_layers_are_windows_on_the_stacked_tensors():
    layers, stacks = planted.stacked_layers(3, dim=4, r=2)
    with torch.no_grad():
        stacks["lora_A"].add_(1)
        layers[1].lora_c.fill_(7)
    assert all(torch.equal(m.lora_A, a) for m, a in zip(layers, stacks["lora_A"], strict=True))
    assert stacks["lora_c"].tolist() == [[0, 0], [7, 7], [0, 0]]
    asked = [n for n, p in layers.named_parameters() if p.requires_grad]
    assert asked == ["0.lora_c", "1.lora_c", "2.lora_c"]  # what an allocator asks


@pytest.mark.slow
def test_recovery_is_reproducible_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (planted.recover([0, 4], seed=3, **SMALL) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), before)
    assert planted.recover([0, 4], seed=4, **SMALL).relative_error != first.relative_error


@pytest.mark.parametrize("score", SCORES)
def test_the_budget_is_exact_for_every_score(score):
    result = planted.recover([0, 1, 3, 4], score=score, **SMALL)
    assert sum(result.ranks) == 4 * 2 and list(result.rank_history)[-1] == 300
    assert result.rank_history[300] == result.ranks


@pytest.mark.slow
def test_under_noise_the_norm_recovers_the_planted_ranks_better_than_the_share():
    ranks, seeds = [0, 0, 1, 2, 4, 6, 8, 11], range(3)
    errors = {
        score: [
            planted.recover(ranks, score=score, seed=s, total_steps=500).relative_error
            for s in seeds
        ]
        for score in ("frobenius_norm", "frobenius_share", "random")
    }
    assert max(errors["frobenius_norm"]) < min(errors["frobenius_share"])
    assert max(errors["frobenius_share"]) < min(errors["random"])


@pytest.mark.parametrize(
    "first, second",
    [
        ([0, 1, 2, 3], [1, 2, 5, 9]),
        ([0, 1, 2, 3], [9, 5, 2, 1]),
        ([0, 0, 1, 2, 4, 6, 8, 11], [4, 3, 3, 3, 5, 3, 6, 5]),  # ties in both
        ([0, 0, 1, 1], [0, 1, 0, 1]),  # no correlation
    ],
)
def test_the_rank_correlation_is_spearmans(first, second):
    from scipy.stats import spearmanr

    expected = spearmanr(first, second).statistic
    assert planted.rank_correlation(first, second) == pytest.approx(expected, abs=1e-14)


def test_a_constant_list_correlates_with_nothing():
    assert math.isnan(planted.rank_correlation([1, 2, 3], [4, 4, 4]))


ONES = dict(input_scales=[1.0] * 3, loss_weights=[1.0] * 3, stretch=0.0, strengths=[1.0] * 3,
            penalty="l2", penalty_weight=0.0, uniform=False, learning_rate=0.01)  # fmt: skip


@pytest.mark.slow
def test_what_is_given_as_it_is_by_default_changes_no_bit():
    assert planted.recover([0, 1, 4], **SMALL) == planted.recover([0, 1, 4], **SMALL, **ONES)


@pytest.mark.slow
def test_the_units_of_a_maps_inputs_move_the_norm_and_not_the_output_norm():
    """Inputs ten times as long, weights a tenth: the norm starves that map, the answers do not."""

    def ranks(score, scales):
        return planted.recover([2, 2], score=score, input_scales=scales, **SMALL).ranks

    assert ranks("output_norm", [1.0, 10.0]) == ranks("output_norm", [1.0, 1.0]) == [2, 2]
    assert ranks("frobenius_norm", [1.0, 10.0])[1] == 0


def test_the_output_norm_in_recover_is_that_of_the_layers_own_forward_pass():
    layers, stacks = planted.stacked_layers(2, dim=4, r=3)
    with torch.no_grad():
        stacks["lora_c"].normal_()
    x, y, weights = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.tensor([1.0, 3.0])
    by_name = dynamic_layers(layers)
    watch = ZWatch(list(by_name.values()))
    planted.train_together(by_name, stacks, x, y, weights)
    in_the_stack, gradients = watch.mean(), [m.lora_c.grad for m in layers]
    for layer, own in zip(layers, x, strict=True):
        layer.base_layer.weight.zero_()
        layer(own)
    torch.testing.assert_close(in_the_stack, watch.mean())
    for layer, own, target, w, g in zip(layers, x, y, weights, gradients, strict=True):
        c = layer.lora_c.detach().requires_grad_()
        prediction = (own @ layer.lora_A.mT * c) @ layer.lora_B.mT
        (expected,) = torch.autograd.grad(w * (prediction - target).square().mean(), c)
        torch.testing.assert_close(g, expected)


@pytest.mark.slow
def test_a_map_whose_loss_weighs_nothing_counts_nothing():
    result = planted.recover([0, 2], loss_weights=[0.0, 1.0], noise=0.0, **SMALL)
    other = planted.recover([5, 2], loss_weights=[0.0, 1.0], noise=0.0, **SMALL)
    assert result.relative_error < 0.01 and other.relative_error < 0.01


def test_a_score_may_be_a_function():
    from drlora_ref import component_norms

    by_function = planted.recover([0, 4], score=component_norms, **SMALL)
    assert by_function == planted.recover([0, 4], score="frobenius_norm", **SMALL)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(planted_ranks=[0, 33]), r"planted_ranks = \[0, 33\]: each must be between 0 and dim"),
        (dict(planted_ranks=[1], noise=-1.0), "noise = -1.0"),
        (dict(planted_ranks=[1], target_r=13), "target_r = 13 is above init_r = 12"),
        (dict(planted_ranks=[1], input_scales=[1.0, 1.0]), "must be 1 numbers, one for each map"),
        (dict(planted_ranks=[1], input_scales=[0.0]), r"input_scales = \[0.0\]: each .* 1e-06"),
        (dict(planted_ranks=[1], input_scales=[math.inf]), r"input_scales = \[inf\]: .* 1e\+06"),
        (dict(planted_ranks=[1], input_scales=[10**400]), "input_scales = .* 1e-06 and"),
        (dict(planted_ranks=[1], loss_weights=[-1.0]), "loss_weights = .*, or 0"),
        (dict(planted_ranks=[1, 1], loss_weights=[0.0, 0.0]), "loss_weights = .*one must be above"),
        (dict(planted_ranks=[1], loss_weights=[math.nan]), r"loss_weights = \[nan\]: each must be"),
        (dict(planted_ranks=[1], stretch=-1.0), "stretch = -1.0: decades, .* between 0 and 12"),
        (dict(planted_ranks=[1], stretch=60.0), "stretch = 60.0: decades, .* between 0 and 12"),
        (dict(planted_ranks=[1], noise=math.nan), "noise = nan: .* between 0 and 1e"),
        (dict(planted_ranks=[1], noise=math.inf), "noise = inf: .* between 0 and 1e"),
        (dict(planted_ranks=[0, 0]), r"planted_ranks = \[0, 0\]: one must be above 0"),
        (dict(planted_ranks=[0, 2], loss_weights=[1, 0]), r"loss_weights = \[1, 0\]: one must be"),
        (dict(planted_ranks=[1], strengths=[1.0, 1.0]), "strengths = .*must be 1 numbers"),
        (dict(planted_ranks=[1], strengths=[0.0]), r"strengths = \[0.0\]: each must be between"),
        (dict(planted_ranks=[1], penalty="l3"), "penalty = 'l3': must be one of dem, l1"),
        (dict(planted_ranks=[1], penalty_weight=-1.0), "penalty_weight = -1.0: must be 0"),
        (dict(planted_ranks=[1], penalty_weight=math.nan), "penalty_weight = nan"),
        (dict(planted_ranks=[1], learning_rate=0.0), "learning_rate = 0.0: must be above 0"),
        (dict(planted_ranks=[1], score="norm"), "score = 'norm': must be one of"),
    ],
)
def test_impossible_problems_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        planted.recover(**given)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(penalty=3), "penalty = 3: must be one of dem"),
        (dict(penalty=[]), r"penalty = \[\]: must be one of dem"),
        (dict(score=None), "score = None: must be a function"),
        (dict(uniform="no"), "uniform = 'no': must be True or False"),
        (dict(events=[]), r"events = \[\]: must be an Events"),
        (dict(total_steps="40"), "total_steps = '40': must be a whole number"),
    ],
)
def test_options_of_another_kind_are_refused_before_anything_is_trained(
    options, message, monkeypatch
):
    monkeypatch.setattr(planted, "train_together", None)
    with pytest.raises(ValueError, match=message):
        planted.recover([0, 2], **options)


@pytest.mark.parametrize("given", ["ab", ["a", "b"], [1, None], {0: 1, 1: 2}, 2, [1j, 1], [True, 1],
                                   [[1], [2]], []])  # fmt: skip
@pytest.mark.parametrize("name", ["planted_ranks", "input_scales", "strengths", "loss_weights"])
def test_what_is_no_list_of_numbers_is_refused_by_the_name_of_its_argument(name, given):
    """Before torch sees it, whose own errors name nothing."""
    message = re.escape(f"{name} = {given!r}: must be ")
    with pytest.raises(ValueError, match=f"^{message}(2|whole) numbers, one for each map"):
        planted.recover(**{"planted_ranks": [0, 2], name: given})


@pytest.mark.parametrize("given", ["1", None, 1j, True, [1.0]])
@pytest.mark.parametrize(
    "name", ["noise", "stretch", "penalty_weight", "learning_rate", "dim", "seed"]
)
def test_what_is_no_number_is_refused_by_the_name_of_its_argument(name, given):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} = {given!r}: ')}.*must be"):
        planted.recover([0, 2], **{name: given})


@pytest.mark.parametrize("ranks", [[1.5, 2], [2.0, 1], [math.nan, 1]])
def test_ranks_are_whole_numbers(ranks):
    with pytest.raises(ValueError, match=r"planted_ranks = \[.*: must be whole numbers"):
        planted.recover(ranks)
    with pytest.raises(ValueError, match=r"planted_ranks = \[.*: must be whole numbers"):
        planted.plant(ranks, 8, torch.Generator())


def test_tuples_ranges_arrays_and_tensors_are_lists_of_numbers_too():
    small = dict(dim=8, init_r=2, target_r=1, total_steps=20)
    of_a_list = planted.recover([0, 1], loss_weights=[0.0, 1.0], **small)
    for given in [(0, 1), range(2), torch.arange(2), torch.arange(2).numpy()]:
        assert planted.recover(given, loss_weights=given, **small) == of_a_list


@pytest.mark.parametrize("score", ["frobenius_share", "output_norm", "loss_sensitivity"])
@pytest.mark.parametrize("at_the_limit", [
    dict(input_scales=[1e-6, 1e6]), dict(strengths=[1e-6, 1e6]), dict(loss_weights=[1e-6, 1e6]),
    dict(stretch=12.0), dict(noise=1e6),
])  # fmt: skip
def test_up_to_the_limits_float32_holds_every_number(at_the_limit, score):
    small = dict(dim=8, init_r=4, target_r=2, total_steps=60, score=score)
    result = planted.recover([1, 2], **at_the_limit, **small)
    assert all(map(math.isfinite, [result.relative_error, *result.gradient_norms]))


def test_the_gradient_norms_are_those_of_the_whole_loss_at_every_step():
    """The first by hand: only c moves, so the penalty's part is all there is of lora_A's."""
    ranks, given = [0, 2], dict(dim=8, init_r=4, target_r=2, total_steps=40, penalty_weight=3.0)
    result = planted.recover(ranks, penalty="l1", seed=5, **given)
    assert len(result.gradient_norms) == 40 and min(result.gradient_norms) > 0
    draw = torch.Generator().manual_seed(5)
    truth = planted.plant(ranks, 8, draw)
    torch.manual_seed(5)
    _, stacks = planted.stacked_layers(2, 8, 4)
    x = torch.randn(2, 64, 8, generator=draw)
    y = x @ truth.mT + 0.5 * torch.randn(x.shape, generator=draw)
    A, B, c = stacks.values()
    answers = (x @ A.mT * c.unsqueeze(1)) @ B.mT
    loss = (answers - y).square().mean(dim=(1, 2)).sum() + 3 * PENALTIES["l1"](A, B).mean()
    gradients = torch.autograd.grad(loss, [A, B, c])
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert result.gradient_norms[0] == pytest.approx(norm, rel=1e-5)


def test_the_gradient_of_pruned_components_is_the_part_of_their_c():
    """None before the first event, and some of it at every step once pruning has ended."""
    result = planted.recover([0, 2], dim=8, init_r=4, target_r=2, total_steps=100)
    assert len(result.pruned_norms) == 100 and not any(result.pruned_norms[:15])  # tinit
    norms = zip(result.pruned_norms[50:], result.gradient_norms[50:], strict=True)
    assert all(0 < part < whole for part, whole in norms)
    stacks = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("lora_A", "lora_c")}
    for stack in stacks.values():
        stack.grad = torch.full((2, 3), 2.0)
    pruned = torch.tensor([[True, False, False], [False, True, True]])
    found = planted.gradient_norms(stacks, pruned)
    torch.testing.assert_close(found, torch.tensor([12.0, 3.0]).sqrt() * 2)


def test_the_penalty_of_the_stack_is_that_of_the_model_and_counts_until_pruning_has_ended():
    seen = []

    def watched(A, B):
        seen.append((A.shape, B.shape))
        return PENALTIES["l2"](A, B)

    given = dict(SMALL, total_steps=100, penalty_weight=0.1)
    by_function = planted.recover([0, 4], penalty=watched, **given)
    assert seen == [((2, 6, 16), (2, 16, 6))] * 50  # t_end
    by_name = planted.recover([0, 4], penalty="l2", **given)
    assert by_function.gradient_norms == by_name.gradient_norms
    layers, stacks = planted.stacked_layers(3, dim=4, r=2)
    for name, penalty in PENALTIES.items():
        of_the_stack = penalty(stacks["lora_A"], stacks["lora_B"]).mean()
        torch.testing.assert_close(of_the_stack, penalty_loss(layers, name))


@pytest.mark.slow
def test_a_map_with_weak_answers_is_starved_by_the_norm_and_not_by_the_share():
    def ranks(score):
        return planted.recover([2, 2], score=score, strengths=[1.0, 0.1], noise=0.1, **SMALL).ranks

    assert ranks("frobenius_norm")[1] == 0
    assert ranks("frobenius_share") == [2, 2]


def test_strengths_multiply_what_is_planted():
    """Twice the answers and the noise: the same problem, in units half as long."""
    still = dict(SMALL, learning_rate=1e-12, total_steps=60)
    even = planted.recover([1, 1], **still, strengths=[2.0, 2.0], noise=1.0)
    half = planted.recover([1, 1], **still, noise=0.5)
    assert even.gradient_norms[0] == pytest.approx(2 * half.gradient_norms[0], rel=1e-5)
    assert even.relative_error == pytest.approx(1.0) == half.relative_error


@pytest.mark.slow
def test_uniform_leaves_every_map_the_same():
    result = planted.recover([0, 1, 3, 4], score="frobenius_norm", uniform=True, **SMALL)
    assert result.ranks == [2, 2, 2, 2] and math.isnan(result.spearman)
    missed = (1 + 2) / 8  # of the maps that need 3 and 4
    assert missed < result.relative_error < missed + 0.05


@pytest.fixture(scope="module")
def studies():
    """results/planted_studies.py as a module."""
    path = Path(__file__).parents[1] / "results" / "planted_studies.py"
    spec = importlib.util.spec_from_file_location("planted_studies", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_record_of_the_studies_holds_every_run_that_its_script_asks_for(studies):
    record = json.loads(studies.OUT.read_text())
    assert record["worlds"] == studies.WORLDS and record["defaults"] == studies.DEFAULTS
    there, seeds = [studies.key(run) for run in record["runs"]], range(5)
    assert sorted(there) == sorted(studies.jobs(seeds)) and len(set(there)) == len(there)


@pytest.mark.slow
def test_a_run_of_the_studies_comes_out_again(studies):
    given = {"init_r": 4, "total_steps": 750, "seed": 3}
    (found,) = [
        run
        for run in json.loads(studies.OUT.read_text())["runs"]
        if studies.key(run) == studies.key(given)
    ]
    again = studies.one_run(given)
    assert again.keys() == found.keys() and again["ranks"] == found["ranks"] == [4] * 8
    assert again["relative_error"] == pytest.approx(found["relative_error"], rel=1e-3)
    assert again["alive"]["after"] == pytest.approx(found["alive"]["after"], rel=0.05)
