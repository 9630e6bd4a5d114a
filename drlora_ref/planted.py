"""Problems whose true ranks are known: does the method give components to the maps that need them?

Neither the paper nor a fine-tuning benchmark can say what the right rank of a layer is. Here the
update that each linear map needs is planted, with a rank of our choosing, and the whole method
(Eq. 6-9, one budget for all maps) looks for it through noisy input-output pairs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.events import Events
from drlora_ref.layer import DynamicLoRALinear, RankOneComponents
from drlora_ref.regularizer import penalty_function
from drlora_ref.schedule import BudgetSchedule

SINGULAR_VALUE = 2.0  # of every planted direction, in every map
BATCH = 64  # fresh inputs per map and step
LEARNING_RATE = 1e-2

# Within which a map's numbers may be, and over how many decades its inputs. The optimizer squares
# gradients, which are products of two inputs. Float32 holds that with any one number at its limit.
SMALLEST, LARGEST = 1e-6, 1e6
MOST_DECADES = 12.0


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` found.

    planted_ranks, ranks: per map, as planted and as found. relative_error: Σ‖ΔW - ΔW*‖² / Σ‖ΔW*‖²
    over all maps; where inputs or losses differ, each norm is E‖·x‖², weighted as the loss.
    spearman: rank correlation of the two lists (nan if one of them is constant).
    rank_history: {step: ranks} after every pruning event. gradient_norms: at every step, of the
    whole gradient, the penalty's part included; pruned_norms: of its part for the c of components
    that are pruned then. Once pruning has ended, that part moves nothing.
    """

    planted_ranks: list[int]
    ranks: list[int]
    relative_error: float
    spearman: float
    rank_history: dict[int, list[int]] = field(repr=False)
    gradient_norms: list[float] = field(repr=False)
    pruned_norms: list[float] = field(repr=False)


def plant(planted_ranks: list[int], dim: int, generator: torch.Generator) -> Tensor:
    """Updates ΔW* = 2 U Vᵀ with orthonormal columns: (maps, dim, dim), every singular value 2 or 0.

    Raises ValueError as check_ranks.

    >>> W = plant([0, 3], dim=8, generator=torch.Generator().manual_seed(0))
    >>> torch.linalg.matrix_rank(W).tolist()
    [0, 3]
    """
    planted_ranks = check_ranks(planted_ranks, dim)
    noise = torch.randn(2, len(planted_ranks), dim, dim, generator=generator)
    U, V = torch.linalg.qr(noise).Q  # orthonormal columns, (maps, dim, dim) each
    columns = torch.arange(dim).unsqueeze(0)  # each map uses as many columns as its rank
    used = columns < torch.tensor(planted_ranks).unsqueeze(-1)  # (maps, dim)
    return SINGULAR_VALUE * (U * used.unsqueeze(-2)) @ V.mT


def stacked_layers(n_maps: int, dim: int, r: int) -> tuple[nn.ModuleList, dict[str, nn.Parameter]]:
    """Layers for the allocator, and the stacked tensors that they are windows on.

    Eight small matrices cost eight times the overhead of one; as one batched product they cost
    once. So what trains are stacks, lora_A (maps, r, dim) and so on, and each layer's own lora_A
    is a view of its slice: what the optimizer writes, the layer shows; the allocator writes zeros
    through the layers' lora_c into the stack. So is the gradient of its lora_c, as long as the
    stack's gradient is set to zero in place.
    """
    layers = nn.ModuleList(
        DynamicLoRALinear(nn.Linear(dim, dim, bias=False), r, lora_alpha=r, lora_dropout=0.0)
        for _ in range(n_maps)
    )
    stacks = {}
    for name in ("lora_A", "lora_B", "lora_c"):
        stacks[name] = nn.Parameter(torch.stack([getattr(layer, name).data for layer in layers]))
        for layer, window in zip(layers, stacks[name].data, strict=True):
            setattr(layer, name, nn.Parameter(window, requires_grad=name == "lora_c"))
    stacks["lora_c"].grad = torch.zeros(n_maps, r)
    for layer, window in zip(layers, stacks["lora_c"].grad, strict=True):
        layer.lora_c.grad = window
    return layers, stacks


def recover(
    planted_ranks: list[int],
    dim: int = 32,
    init_r: int = 12,
    target_r: int = 4,
    total_steps: int = 1500,
    noise: float = 0.5,
    score: str | Callable = "frobenius_share",
    seed: int = 0,
    input_scales: list[float] | None = None,
    loss_weights: list[float] | None = None,
    stretch: float = 0.0,
    strengths: list[float] | None = None,
    penalty: str | Callable = "dem",
    penalty_weight: float = 0.0,
    uniform: bool = False,
    learning_rate: float = LEARNING_RATE,
    events: Events | None = None,
) -> RecoveryResult:
    """Plant updates of known rank, train the whole method on them, and say what it found.

        y = ΔW* x + noise · N(0, I),  x ~ N(0, I)      64 fresh pairs per map and step
        loss = Σ over maps of mean (ΔW x - y)²          ΔW of Eq. 6, base weight 0, scaling 1

    Four ways in which maps may differ beyond their rank, each off by default:
    input_scales: one number a map; its x is so many times longer, and its ΔW* divided by it, so
        that the answers keep their size.
    loss_weights: one number a map, by which its part of the loss is multiplied.
    stretch: decades from the shortest to the longest direction of x, log-spaced, in every map.
    strengths: one number a map, by which its ΔW* is multiplied: answers of unlike size.

    And three ways to train otherwise: penalty_weight times a penalty of regularizer.PENALTIES (or a
    function like dem_penalty) in the loss until pruning has ended, as Eq. 10 times η; `uniform`,
    the same number of components in every map (see RankAllocator); another learning rate.

    `events`, if given, takes the scores and the mask of every pruning event (plotting.film).

    AdamW without decay, no dropout, no penalty; schedule and allocator as everywhere. A seed of
    1,500 steps takes seconds on a CPU. Raises ValueError as `plant`, BudgetSchedule and
    RankAllocator do, for an unknown penalty, for numbers that are out of range or not one a map, or
    where nothing that counts is planted: the error is relative to that.

    >>> recover([0, 2], dim=8, init_r=4, target_r=1, total_steps=400, noise=0.0).ranks
    [0, 2]
    """
    check_training(noise, penalty_weight, learning_rate)
    check_whole(dim=dim, seed=seed)
    planted_ranks = check_ranks(planted_ranks, dim)
    penalise = penalty_function(penalty)
    if not (events is None or isinstance(events, Events)):
        raise ValueError(f"events = {events!r}: must be an Events(), or None")
    scales, factors, weights = of_each_map(planted_ranks, input_scales, strengths, loss_weights)
    lengths = scales * directions(dim, stretch)  # (maps, 1, dim)
    schedule = BudgetSchedule(init_r, target_r, total_steps)
    draw = torch.Generator().manual_seed(seed)
    truth = factors * plant(planted_ranks, dim, draw) / scales
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator
        torch.manual_seed(seed)
        layers, stacks = stacked_layers(len(planted_ranks), dim, init_r)
    allocator = RankAllocator(layers, schedule, score=score, seed=seed, uniform=uniform)
    optimizer = torch.optim.AdamW(stacks.values(), lr=learning_rate, weight_decay=0.0)

    history, norms = {}, torch.empty(total_steps, 2)
    pruned = torch.zeros(len(planted_ranks), init_r, dtype=torch.bool)
    for step in range(1, total_steps + 1):
        x = lengths * torch.randn(len(planted_ranks), BATCH, dim, generator=draw)
        y = x @ truth.mT + noise * torch.randn(x.shape, generator=draw)
        optimizer.zero_grad(set_to_none=False)
        train_together(allocator.layers, stacks, x, y, weights)
        if penalty_weight and not schedule.pruning_ended(step):
            R = penalise(stacks["lora_A"], stacks["lora_B"]).mean()  # all maps have init_r
            (penalty_weight * R).backward()
        norms[step - 1] = gradient_norms(stacks, pruned)
        optimizer.step()
        allocator.step(step)
        if schedule.prunes_at(step):
            history[step] = list(allocator.rank_pattern().values())
            pruned = ~allocator.mask.view_as(pruned)
            if events is not None:
                events.add(step, allocator)

    found = torch.stack([layer.delta_weight() for layer in allocator.layers.values()])
    seen = weights.sqrt().view(-1, 1, 1) * lengths  # E‖Mx‖² = ‖M · lengths‖²
    error = ((found - truth) * seen).square().sum() / (truth * seen).square().sum()
    ranks = list(allocator.rank_pattern().values())
    return RecoveryResult(
        planted_ranks,
        ranks,
        error.item(),
        rank_correlation(planted_ranks, ranks),
        history,
        *norms.T.tolist(),
    )


def check_training(noise: float, penalty_weight: float, learning_rate: float) -> None:
    """Raise ValueError for a number out of its range, or for what is no number.

    >>> check_training(noise=0.0, penalty_weight=0.0, learning_rate=0.01)
    """
    if not (is_number(noise) and 0 <= noise <= LARGEST):
        raise ValueError(
            f"noise = {noise!r}: a standard deviation, must be between 0 and {LARGEST:g}"
        )
    if not (is_number(penalty_weight) and 0 <= penalty_weight < math.inf):
        raise ValueError(
            f"penalty_weight = {penalty_weight!r}: must be 0 (none) or more, and finite"
        )
    if not (is_number(learning_rate) and 0 < learning_rate < math.inf):
        raise ValueError(f"learning_rate = {learning_rate!r}: must be above 0 and finite")


def check_whole(**given: int) -> None:
    """Raise ValueError unless each is a whole number.

    >>> check_whole(dim=8, seed=0)
    """
    for name, value in given.items():
        if not (is_number(value) and isinstance(value, Integral)):
            raise ValueError(f"{name} = {value!r}: must be a whole number")


def check_ranks(planted_ranks: Sequence[int], dim: int) -> list[int]:
    """The ranks as a list. Raises ValueError unless they are whole numbers from 0 to dim.

    >>> check_ranks(range(3), dim=8)
    [0, 1, 2]
    """
    ranks = listed(planted_ranks)
    if not (ranks and all(isinstance(rank, Integral) for rank in ranks)):
        raise ValueError(
            f"planted_ranks = {planted_ranks!r}: must be whole numbers, one for each map, and at "
            "least one"
        )
    if not all(0 <= rank <= dim for rank in ranks):
        raise ValueError(f"planted_ranks = {planted_ranks}: each must be between 0 and dim = {dim}")
    return [int(rank) for rank in ranks]


def of_each_map(
    planted_ranks: list[int],
    input_scales: list[float] | None,
    strengths: list[float] | None,
    loss_weights: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and strengths (maps, 1, 1), weights (maps,): 1 where none are given.

    Raises ValueError unless there is one a map, each from SMALLEST to LARGEST, or a weight of 0;
    and unless a map with a rank above 0 has a weight above 0.
    """
    n, tensors = len(planted_ranks), []
    given = dict(input_scales=input_scales, strengths=strengths, loss_weights=loss_weights)
    for name, numbers in given.items():
        values = [1.0] * n if numbers is None else listed(numbers)
        if values is None or len(values) != n:
            raise ValueError(f"{name} = {numbers!r}: must be {n} numbers, one for each map")
        or_zero = name == "loss_weights"
        if not all(SMALLEST <= v <= LARGEST or (or_zero and v == 0) for v in values):
            limits = f"between {SMALLEST:g} and {LARGEST:g}" + (", or 0" if or_zero else "")
            raise ValueError(f"{name} = {numbers}: each must be {limits}")
        tensors.append(torch.tensor([float(v) for v in values]))
    scales, factors, weights = tensors
    if not any(planted_ranks):
        raise ValueError(
            f"planted_ranks = {planted_ranks}: one must be above 0, since the error is relative to "
            "what is planted"
        )
    if not (weights * torch.tensor(planted_ranks)).any():
        raise ValueError(
            f"loss_weights = {loss_weights}: one must be above 0 where planted_ranks = "
            f"{planted_ranks} are, since the error is relative to what is planted and counts"
        )
    return scales.view(-1, 1, 1), factors.view(-1, 1, 1), weights


def listed(given: object) -> list | None:
    """The numbers of a list, tuple, range, array or tensor; None of anything else.

    >>> listed((1, 2.5)), listed(torch.ones(2)), listed(["a"]), listed({1: 2}), listed(None)
    ([1, 2.5], [1.0, 1.0], None, None, None)
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    return [*values] if isinstance(values, Sequence) and all(map(is_number, values)) else None


def is_number(value: object) -> bool:
    """Whether a value is a real number; True and False are none here.

    >>> is_number(2), is_number(2.5), is_number(True), is_number("2"), is_number(2j)
    (True, True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def directions(dim: int, stretch: float) -> Tensor:
    """Lengths of the directions of x, log-spaced over `stretch` decades: (dim,).

    Raises ValueError if stretch is not between 0 and MOST_DECADES.

    >>> directions(3, stretch=2.0)
    tensor([ 0.1000,  1.0000, 10.0000])
    """
    if not (is_number(stretch) and 0 <= stretch <= MOST_DECADES):
        raise ValueError(
            f"stretch = {stretch!r}: decades, must be between 0 and {MOST_DECADES:g}, beyond which "
            "products of x do not fit into float32"
        )
    return torch.logspace(-stretch / 2, stretch / 2, dim)


def train_together(
    layers: dict[str, RankOneComponents],
    stacks: dict[str, nn.Parameter],
    x: Tensor,
    y: Tensor,
    weights: Tensor,
) -> None:
    """Forward and backward pass of all maps; a layer that is watched is shown the z that is its.

    Shapes: x, y (maps, batch, dim), weights (maps,)
    """
    A, B, c = stacks["lora_A"], stacks["lora_B"], stacks["lora_c"]
    z = x @ A.mT  # (maps, batch, r)
    prediction = (z * c.unsqueeze(-2)) @ B.mT  # (maps, batch, dim)
    losses = (prediction - y).square().mean(dim=(1, 2))
    (losses * weights).sum().backward()
    for i, layer in enumerate(layers.values()):
        if layer.watch:
            layer.watch(z[i])


def gradient_norms(stacks: dict[str, nn.Parameter], pruned: Tensor) -> Tensor:
    """Norm of the whole gradient, and of its part for the c of pruned components: (2,).

    Shapes: pruned (maps, r) of bool
    """
    gradients = [cast(Tensor, stack.grad) for stack in stacks.values()]
    parts = torch.cat([g.flatten() for g in gradients]), cast(Tensor, stacks["lora_c"].grad)[pruned]
    return torch.stack([torch.linalg.vector_norm(part) for part in parts])


def rank_correlation(first: list[int], second: list[int]) -> float:
    """Spearman's rank correlation: +1 if both lists have the same order, -1 if the opposite.

        2 · rank(xᵢ) + a constant = Σⱼ sign(xᵢ - xⱼ)

    Equal values share the mean of their ranks, and the right side sums to zero over i. So Pearson's
    correlation of the ranks is a cosine; it is nan for a constant list, which has no order.

    >>> rank_correlation([0, 1, 2, 9], [1, 1, 5, 6]), rank_correlation([1, 2], [3, 3])
    (0.9486832980505138, nan)
    """
    values = torch.tensor([first, second], dtype=torch.float64)
    x, y = (values.unsqueeze(-1) - values.unsqueeze(-2)).sign().sum(dim=-1)
    return (x @ y / (x.square().sum() * y.square().sum()).sqrt()).item()
