"""Putting the adapters into a transformer, counting them, and folding them away again."""

import difflib
from typing import NamedTuple

from torch import nn

from drlora_ref.layer import DynamicLoRALinear, dynamic_layers


class BaseModel(NamedTuple):
    """What the package knows of one kind of transformer; a new kind is a new entry in BASE_MODELS.

    matrices: what is adapted in each layer, {end of the module's dotted name: the label of the
    paper's Figure 2}. cross_attention: the same for a decoder's, adapted only if asked for.
    head: the modules that a new task brings. They are trained whole and never adapted.
    """

    matrices: dict[str, str]
    cross_attention: dict[str, str] = {}  # noqa: RUF012 (never changed)
    head: tuple[str, ...] = ("classifier", "qa_outputs")


_BERT = {
    "query": "Wq",
    "key": "Wk",
    "value": "Wv",
    "attention.output.dense": "Wo",
    "intermediate.dense": "Wf1",
    "output.dense": "Wf2",
}
_MPNET = {f"attn.{p}": f"W{p}" for p in "qkvo"} | {
    "intermediate.dense": "Wf1",
    "output.dense": "Wf2",
}
_PROJECTIONS = {"q_proj": "Wq", "k_proj": "Wk", "v_proj": "Wv", "out_proj": "Wo"}
BASE_MODELS = {
    "roberta": BaseModel(_BERT),
    "bert": BaseModel(_BERT, head=("classifier", "pooler", "qa_outputs")),  # it trains its pooler
    "mpnet": BaseModel(_MPNET),
    "bart": BaseModel(
        {f"self_attn.{p}": label for p, label in _PROJECTIONS.items()}
        | {"fc1": "Wf1", "fc2": "Wf2"},
        {f"encoder_attn.{p}": f"{label} cross" for p, label in _PROJECTIONS.items()},
        head=("classification_head", "qa_outputs"),
    ),
}

# Of any kind of model; "score" is what decoders call a classifier.
HEADS = {"score"}.union(*(kind.head for kind in BASE_MODELS.values()))


def in_head(name: str) -> bool:
    """Whether a module or parameter belongs to the head.

    >>> in_head("classifier.dense.weight"), in_head("encoder.layer.0.output.dense.weight")
    (True, False)
    """
    return not HEADS.isdisjoint(name.split("."))


def head_modules(model: nn.Module) -> list[str]:
    """The names in HEADS that the model has, sorted: what PEFT calls modules_to_save.

    >>> head_modules(nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)}))
    ['classifier']
    """
    return sorted(HEADS & {name.split(".")[-1] for name, _ in model.named_modules()})


def default_target_modules(model: nn.Module, cross_attention: bool = False) -> list[str]:
    """The six matrices of each layer, for RoBERTa, BERT, MPNet and BART.

    Choice: BART without the decoder's cross-attention, since Table 4's 0.33M and 1.33M are exactly
    the count without it (weak evidence: the whole column equals Table 2's, which is RoBERTa's);
    `cross_attention=True` includes it, as the authors' code does.
    Raises ValueError for any other kind of model: name its target_modules yourself.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in BASE_MODELS:
        raise ValueError(
            f"no default target_modules for {kind!r} (there are some for "
            f"{', '.join(BASE_MODELS)}): pass the names of its linear layers"
        )
    known = BASE_MODELS[kind]
    return [*known.matrices, *(known.cross_attention if cross_attention else [])]


def matrix_label(module: str) -> str:
    """The paper's label of an adapted matrix, by the longest end of its name that is known; or "".

    >>> matrix_label("encoder.layer.3.attention.output.dense"), matrix_label("layer.3.output.dense")
    ('Wo', 'Wf2')
    """
    ends = [kind.matrices | kind.cross_attention for kind in BASE_MODELS.values()]
    found = {end: label for one in ends for end, label in one.items() if _matches(module, end)}
    return found[max(found, key=len)] if found else ""


def check_target(name: str, module: nn.Module) -> None:
    """Raise TypeError for what cannot be adapted: no nn.Linear, or one with a quantised weight."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        raise TypeError(f"target_modules: {name} is {kind}; only nn.Linear can be adapted")
    if not module.weight.is_floating_point():
        raise TypeError(
            f"target_modules: {name} is {kind} with a weight of {module.weight.dtype}; quantised "
            "layers cannot be adapted, load the model in float32 or bfloat16"
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def find_targets(model: nn.Module, target_modules: list[str]) -> dict[str, nn.Linear]:
    """The linear layers that these names, or ends of dotted names, mean; nothing in the head.

    Raises ValueError naming a target that matches nothing, TypeError as check_target does.

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    >>> list(find_targets(model, ["query"]))
    ['query']
    """
    modules = {n: m for n, m in model.named_modules() if not in_head(n)}
    found = {n: m for n, m in modules.items() if any(_matches(n, t) for t in target_modules)}
    linear = sorted({n.split(".")[-1] for n, m in modules.items() if isinstance(m, nn.Linear)})
    for target in target_modules:
        if not any(_matches(n, target) for n in found):
            near = difflib.get_close_matches(target.split(".")[-1], linear) or linear
            raise ValueError(
                f"target_modules: {target!r} matches no module outside the head; "
                f"linear layers with a near name: {', '.join(near)}"
            )
    for name, module in found.items():
        check_target(name, module)
    return found


def inject_adapters(
    model: nn.Module,
    target_modules: list[str] | None = None,
    r: int = 12,
    lora_alpha: float = 8,
    lora_dropout: float = 0.1,
) -> nn.Module:
    """Replace each target by a DynamicLoRALinear around it, in place; returns the model.

    `target_modules` are names or ends of dotted names; None takes default_target_modules. Nothing
    in the head is ever matched. Raises, before anything is changed: ValueError naming a target
    that matches nothing, with near names; TypeError for a target that is not an nn.Linear (or is
    adapted already).

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    >>> list(dynamic_layers(inject_adapters(model, ["query"], r=2)))
    ['query']
    """
    if isinstance(target_modules, str):
        target_modules = [target_modules]
    targets = find_targets(model, target_modules or default_target_modules(model))
    for name, linear in targets.items():
        adapted = DynamicLoRALinear(linear, r, lora_alpha, lora_dropout)
        model.set_submodule(name, adapted.train(linear.training))
    return model


def mark_only_adapters_trainable(model: nn.Module) -> nn.Module:
    """Freeze all but the adapters and the head, in place; returns the model.

    The head is new and knows nothing, so every method that the paper compares trains it.

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    >>> model = mark_only_adapters_trainable(inject_adapters(model, ["query"], r=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['query.lora_A', 'query.lora_B', 'query.lora_c']
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name))
    for layer in dynamic_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_c):
            parameter.requires_grad_(True)
    return model


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"adapter": ..., "head": ...}: trainable parameters as the paper's tables count them.

    An adapter counts its *surviving* components, d_in + d_out each; c is not counted, since it
    folds into lora_B. Any other trainable parameter outside the head counts as adapter, so the
    same function serves PEFT's LoRA. On the meta device give the masks values first: they are
    what is counted.

    >>> count_parameters(DynamicLoRALinear(nn.Linear(10, 5), r=3))
    {'adapter': 45, 'head': 0}
    """
    layers = dynamic_layers(model)
    counts = {"adapter": 0, "head": 0}
    for layer in layers.values():
        counts["adapter"] += layer.rank * (layer.lora_A.shape[1] + layer.lora_B.shape[0])
    ours = {id(p) for layer in layers.values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            counts["head" if in_head(name) else "adapter"] += parameter.numel()
    return counts


def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold the surviving components into the base weights, in place; returns a plain model.

    In evaluation mode its outputs equal the adapted model's. Read with care: only once pruning has
    ended. Before that, components outside the mask may have revived; they are left out here.
    Raises TypeError for a model of PEFT, which has a method of its own for that.
    """
    if isinstance(model, DynamicLoRALinear):
        return model.merge()
    layers = dynamic_layers(model)
    ours = {n: layer for n, layer in layers.items() if isinstance(layer, DynamicLoRALinear)}
    if len(ours) < len(layers):
        raise TypeError("merge_adapters is for inject_adapters; PEFT's model: merge_and_unload()")
    for name, layer in ours.items():
        model.set_submodule(name, layer.merge())
    return model
