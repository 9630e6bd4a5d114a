"""Many runs at once on one frozen encoder: what each of them trains gets a leading dimension R.

The runs of a table differ in seed, learning rate, score or budget, and all of them read through the
same frozen weights. So the encoder sees one batch of R · B sequences, replica by replica, and only
the small trained parts know that there are R: components and head are stacked, (R, r, d_in) instead
of (r, d_in). The gradient of a sum of R losses, each of its own sequences, is R gradients: no
replica can see another.

    x (R · B, length, d_in) -> W0 x, as ever                                   one large product
                             + scaling · B diag(c) A x, R small ones side by side

Here is what stands in the model; engine.py trains it, step.py allocates its components.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from drlora_ref.experiments.methods import Prepared
from drlora_ref.experiments.tasks.data import Batch
from drlora_ref.inject import in_head
from drlora_ref.layer import dynamic_layers

# In one matrix: lora_A (r, d_in), lora_B (d_out, r), lora_c (r,), scaling.
Components = tuple[Tensor, Tensor, Tensor, float]


class Part(NamedTuple):
    """What one run trains, taken out of its model: its components by matrix, and its head.

    components: by the matrix's name. LoRA's c is 1 and `prunes` False: it is not trained. A matrix
    that a rank map leaves out is there with r = 0: so all runs have the same matrices.
    head: {name of the parameter: its tensor}.
    """

    components: dict[str, Components]
    head: dict[str, Tensor]
    prunes: bool


def take_apart(prepared: Prepared) -> Part:
    """The Part of a run that methods.prepare made ready: drlora or lora.

    Raises ValueError for another method: nothing else of the paper fits on a shared encoder as
    rank-1 components.
    """
    model = prepared.model
    parts: dict[str, Components]
    if layers := dynamic_layers(model):
        parts = {n: (m.lora_A, m.lora_B, m.lora_c, m.scaling) for n, m in layers.items()}
    else:
        lora = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        parts = {n.removeprefix("base_model.model."): _as_components(m) for n, m in lora.items()}
    head = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad and in_head(name)
    }
    trained = sum(p.requires_grad for p in model.parameters())
    if not parts or trained != len(head) + len(parts) * (3 if layers else 2):
        raise ValueError("only drlora and lora can be replicas on one encoder, run others singly")
    for name in prepared.without_rank:
        parts[name] = _no_components(
            cast(nn.Linear, model.get_submodule(f"base_model.model.{name}"))
        )
    return Part(
        {n: (*(t.detach() for t in part[:3]), part[3]) for n, part in parts.items()},
        {n: p.detach() for n, p in head.items()},
        bool(layers),
    )


def _as_components(layer: LoraLayer) -> Components:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return A, B, torch.ones_like(A[:, 0]), layer.scaling["default"]


def _no_components(linear: nn.Linear) -> Components:
    """What a run has in a matrix that its rank map leaves out."""
    d_out, d_in = linear.weight.shape
    return torch.zeros(0, d_in), torch.zeros(d_out, 0), torch.zeros(0), 1.0


class ReplicatedLoRALinear(nn.Module):
    """One frozen linear layer with the components of R runs (Eq. 6, R times).

    Shapes: x (R · B, ..., d_in), replica by replica -> (R · B, ..., d_out); lora_A (R, r, d_in),
    lora_B (R, d_out, r), lora_c (R, r), component_mask (R, r) of bool, scaling (R,).

    Fewer components than r, the most that any run has in any matrix, are filled up with zeros, and
    stay zero: a component whose a, b and c are all 0 has no gradient. component_mask (R, r) is
    False for them.
    """

    def __init__(self, base_layer: nn.Linear, parts: list[tuple], r: int, lora_dropout: float):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_dropout = nn.Dropout(lora_dropout)
        device = base_layer.weight.device
        As, Bs, cs, scalings = zip(*parts, strict=True)
        wide_A = [F.pad(A, (0, 0, 0, r - len(A))) for A in As]
        wide_B = [F.pad(B, (0, r - B.shape[1])) for B in Bs]
        wide_c = [F.pad(c, (0, r - len(c))) for c in cs]
        self.lora_A = nn.Parameter(torch.stack(wide_A).to(device))
        self.lora_B = nn.Parameter(torch.stack(wide_B).to(device))
        self.lora_c = nn.Parameter(torch.stack(wide_c).to(device))
        sizes = torch.tensor([[len(c)] for c in cs])
        self.register_buffer("component_mask", (torch.arange(r) < sizes).to(device))
        self.register_buffer("scaling", torch.tensor(scalings).to(self.lora_c))
        self.watch: Callable[[Tensor], None] | None = None  # as RankOneComponents'

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        rows = x.to(self.lora_A.dtype).reshape(len(self.lora_A), -1, x.shape[-1])
        c = self.scaling.unsqueeze(1) * self.lora_c
        z = self.lora_dropout(rows) @ self.lora_A.mT  # (R, B · length, r)
        if self.watch and self.training:
            self.watch(z.reshape(*x.shape[:-1], -1))
        update = (z * c.unsqueeze(1)) @ self.lora_B.mT
        return result + update.reshape(result.shape).to(result.dtype)


class ReplicatedLinear(nn.Module):
    """R linear layers of a head side by side: weight (R, d_out, d_in), bias (R, d_out)."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.stack(weights).to(device))
        self.bias = nn.Parameter(torch.stack(biases).to(device))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1]).to(self.weight.dtype)
        rows = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.mT)
        return rows.reshape(*x.shape[:-1], -1)


def replicate(model: nn.Module, parts: list[Part], lora_dropout: float) -> nn.Module:
    """Put the parts of R runs into one plain model, in place, and freeze all else; returns it.

    A matrix in which no run has a component is replaced too. It adds nothing, but every record
    gives its rank, and what a run draws for dropout does not hang on the maps of the others.

    Raises ValueError if the runs adapt other matrices, or the head is more than linear layers.
    """
    adapted = {name for part in parts for name in part.components}
    names = [name for name, _ in model.named_modules() if name in adapted]
    if any(part.components.keys() != adapted for part in parts):
        raise ValueError("replicas must adapt the same matrices: these runs differ")
    r = max(len(c) for part in parts for _, _, c, _ in part.components.values())
    model.requires_grad_(False)
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        components = [part.components[name] for part in parts]
        model.set_submodule(name, ReplicatedLoRALinear(linear, components, r, lora_dropout))
    left = set(parts[0].head)
    for name, module in list(model.named_modules()):
        weight, bias = f"{name}.weight", f"{name}.bias"
        if isinstance(module, nn.Linear) and {weight, bias} <= left:
            values = ([part.head[n] for part in parts] for n in (weight, bias))
            model.set_submodule(name, ReplicatedLinear(*values, module.weight.device))
            left -= {weight, bias}
    if left:
        raise ValueError(f"the head's {', '.join(sorted(left))} cannot be replicated: run singly")
    return model


def replicated_layers(model: nn.Module) -> dict[str, ReplicatedLoRALinear]:
    """The adapted layers by name, in the order that decides ties (as layer.dynamic_layers)."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ReplicatedLoRALinear)}


class Together(nn.Module):
    """The model for a task's own evaluation, which sees one replica but computes all of them.

    evaluate(together.of(i)) calls it batch by batch, for one replica after another. The first
    replica's calls run each batch for all R in one pass and keep the logits; the others read them.
    Raises ValueError if a later replica is given other batches: it would read the wrong logits.
    """

    def __init__(self, model: nn.Module, replicas: int):
        super().__init__()
        self.model, self.replicas = model, replicas
        # (a batch, {"logits": (R, B, classes)}, or start_logits and end_logits (R, B, length))
        self.kept: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.replica, self.calls = 0, 0

    def of(self, replica: int) -> "Together":
        """The same, from the first batch on, for this replica; 0 comes first."""
        self.replica, self.calls = replica, 0
        return self

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        if self.replica == 0:
            self.kept = [*self.kept[: self.calls], (batch, self._all(batch))]
        elif not (self.calls < len(self.kept) and _same(batch, self.kept[self.calls][0])):
            raise ValueError(
                f"evaluation gave replica {self.replica} another batch {self.calls} than replica "
                "0: all must be given the same batches in the same order"
            )
        self.calls += 1
        said = self.kept[self.calls - 1][1]
        return SimpleNamespace(**{name: logits[self.replica] for name, logits in said.items()})

    def _all(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        widened = {n: t.repeat(self.replicas, *[1] * (t.dim() - 1)) for n, t in batch.items()}
        output = self.model(**widened)
        found = {n: getattr(output, n, None) for n in ("logits", "start_logits", "end_logits")}
        return {
            name: logits.reshape(self.replicas, -1, *logits.shape[1:])
            for name, logits in found.items()
            if logits is not None
        }


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


LABELS = ("labels", "start_positions", "end_positions")  # what a batch holds beside the rows


def losses(output: Any, batch: Batch, replicas: int) -> Tensor:
    """Each replica's mean loss: (R,), of what the model says of a batch of R · B rows.

    As transformers' models compute it: cross-entropy over classes; the squared error of a score,
    where there is one logit; or the mean of two, over the places where an answer starts and ends.

    Shapes: logits (R · B, classes) or (R · B, 1); start_logits and end_logits (R · B, length)

    >>> said = SimpleNamespace(logits=torch.tensor([[0.0], [2.0]]))
    >>> losses(said, {"labels": torch.tensor([1.0, 1.0])}, replicas=2)
    tensor([1., 1.])
    """
    if "start_positions" in batch:
        ends = [
            F.cross_entropy(getattr(output, f"{end}_logits").float(), batch[f"{end}_positions"],
                            reduction="none")
            for end in ("start", "end")
        ]  # fmt: skip
        each = (ends[0] + ends[1]) / 2
    elif output.logits.shape[-1] == 1:
        each = (output.logits.float().squeeze(-1) - batch["labels"].float()).square()
    else:
        each = F.cross_entropy(output.logits.float(), batch["labels"], reduction="none")
    return each.reshape(replicas, -1).mean(dim=1)
