"""Problems whose true ranks are known: does the method give components to the maps that need them?

Neither the paper nor a fine-tuning benchmark can say what the right rank of a layer is. Here the
update that each linear map needs is planted, with a rank of our choosing, and the whole method
(Eq. 6-9, one budget for all maps) looks for it through noisy input-output pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from drlora_ref.allocator import RankAllocator
from drlora_ref.layer import DynamicLoRALinear, RankOneComponents
from drlora_ref.regularizer import penalty_function
from drlora_ref.schedule import BudgetSchedule

SINGULAR_VALUE = 2.0  # of every planted direction, in every map
BATCH = 64  # fresh inputs per map and step
LEARNING_RATE = 1e-2


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

    Raises ValueError for a rank below 0 or above dim.

    >>> W = plant([0, 3], dim=8, generator=torch.Generator().manual_seed(0))
    >>> torch.linalg.matrix_rank(W).tolist()
    [0, 3]
    """
    if not all(0 <= rank <= dim for rank in planted_ranks):
        raise ValueError(f"planted_ranks = {planted_ranks}: each must be between 0 and dim = {dim}")
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
            setattr(layer, name, nn.Parameter(window, requires_grad=False))
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

    AdamW without decay, no dropout, no penalty; schedule and allocator as everywhere. A seed of
    1,500 steps takes seconds on a CPU. Raises ValueError as `plant`, BudgetSchedule and
    RankAllocator do, for an unknown penalty, or for numbers that are out of range or not one a map.

    >>> recover([0, 2], dim=8, init_r=4, target_r=1, total_steps=400, noise=0.0).ranks
    [0, 2]
    """
    check_training(noise, penalty_weight, learning_rate)
    penalise = penalty_function(penalty)
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

    found = torch.stack([layer.delta_weight() for layer in allocator.layers.values()])
    seen = weights.sqrt().view(-1, 1, 1) * lengths  # E‖Mx‖² = ‖M · lengths‖²
    error = ((found - truth) * seen).square().sum() / (truth * seen).square().sum()
    ranks = list(allocator.rank_pattern().values())
    return RecoveryResult(
        list(planted_ranks),
        ranks,
        error.item(),
        rank_correlation(planted_ranks, ranks),
        history,
        *norms.T.tolist(),
    )


def check_training(noise: float, penalty_weight: float, learning_rate: float) -> None:
    """Raise ValueError for a number out of its range.

    >>> check_training(noise=0.0, penalty_weight=0.0, learning_rate=0.01)
    """
    if noise < 0:
        raise ValueError(f"noise = {noise}: a standard deviation, must be at least 0")
    if not 0 <= penalty_weight < math.inf:
        raise ValueError(f"penalty_weight = {penalty_weight}: must be 0 (none) or more, and finite")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate = {learning_rate}: must be above 0 and finite")


def of_each_map(
    planted_ranks: list[int],
    input_scales: list[float] | None,
    strengths: list[float] | None,
    loss_weights: list[float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and strengths (maps, 1, 1), weights (maps,): 1 where none are given.

    Raises ValueError unless there is one a map, scales and strengths above 0, weights 0 or more and
    not all 0.
    """
    ones, tensors = [1.0] * len(planted_ranks), {}
    given = dict(input_scales=input_scales, strengths=strengths, loss_weights=loss_weights)
    for name, numbers in given.items():
        values = torch.tensor(ones if numbers is None else numbers)
        if values.shape != (len(ones),):
            raise ValueError(f"{name} = {numbers}: must be {len(ones)} numbers, one for each map")
        if name != "loss_weights" and not (values.isfinite().all() and (values > 0).all()):
            raise ValueError(f"{name} = {numbers}: each must be above 0 and finite")
        tensors[name] = values
    scales, factors, weights = tensors.values()
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"loss_weights = {loss_weights}: each must be 0 or more, and one above 0")
    return scales.view(-1, 1, 1), factors.view(-1, 1, 1), weights


def directions(dim: int, stretch: float) -> Tensor:
    """Lengths of the directions of x, log-spaced over `stretch` decades: (dim,).

    Raises ValueError if stretch is negative or not finite.

    >>> directions(3, stretch=2.0)
    tensor([ 0.1000,  1.0000, 10.0000])
    """
    if not 0 <= stretch < math.inf:
        raise ValueError(f"stretch = {stretch}: decades, must be at least 0 and finite")
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
