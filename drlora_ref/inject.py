"""Putting the adapters into a transformer, counting them, and folding them away again."""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import nn

from drlora_ref.layer import DynamicLoRALinear, bare, dynamic_layers
from drlora_ref.precision import train_in_float32
from drlora_ref.watch import stop_watching


class BaseModel(NamedTuple):
    """What the package knows of one kind of transformer; a new kind is a new entry in BASE_MODELS.

    matrices: what is adapted in each layer, {end of the module's dotted name: the label of the
    paper's Figure 2; Wg for the gate of a feed-forward part that has one, which the paper's models
    have not}. cross_attention: the same for a decoder's, adapted only if asked for. causal: each
    token sees those before it only (a decoder without an encoder).
    """

    matrices: dict[str, str]
    cross_attention: dict[str, str] = {}  # noqa: RUF012 (never changed)
    causal: bool = False


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
# Several query heads may share one of key and value (grouped queries): Wk, Wv are then smaller.
_LLAMA = {f"self_attn.{p}_proj": f"W{p}" for p in "qkvo"} | {
    "mlp.gate_proj": "Wg",
    "mlp.up_proj": "Wf1",
    "mlp.down_proj": "Wf2",
}
BASE_MODELS = {
    "roberta": BaseModel(_BERT),
    "bert": BaseModel(_BERT),
    "mpnet": BaseModel(_MPNET),
    "bart": BaseModel(
        {f"self_attn.{p}": label for p, label in _PROJECTIONS.items()}
        | {"fc1": "Wf1", "fc2": "Wf2"},
        {f"encoder_attn.{p}": f"{label} cross" for p, label in _PROJECTIONS.items()},
    ),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), BaseModel(_LLAMA, causal=True)
    ),
}

# What a head is called in the kinds above, and in a model that does not say what is pretrained.
HEADS = {"classification_head", "classifier", "pooler", "qa_outputs", "score"}


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that a new task brings: trained whole, never adapted.

    A head is what the pretrained model did not have. In a model of transformers that is

    - what lies outside its pretrained part, which the model names by `base_model_prefix`; but a
      language model (get_output_embeddings) is pretrained with all that it has;
    - inside that part a pooler, which only a head reads (Perceiver: the decoder);
    - any module for which from_pretrained had no weights and drew random ones.

    In any other model a head goes by its name, as in HEADS. PEFT calls these modules_to_save.

    >>> head_modules(nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)}))
    ['classifier']
    """
    model = bare(model)
    if hasattr(model, "get_base_model"):  # PEFT's, and these are its names for what is in it
        inside = cast(Any, model).get_base_model()
        vars(inside).setdefault("new_modules", [])  # if not known by now: PEFT's own are new too
        return [f"base_model.model.{name}" for name in head_modules(inside)]
    found = task_modules(model) + new_modules(model)
    return [n for n in dict.fromkeys(found) if not in_head(n.rpartition(".")[0], found)]


def task_modules(model: nn.Module) -> list[str]:
    """The part of head_modules that a model's structure tells, whatever weights it was given."""
    named = [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters())]
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(body, nn.Module):
        return [name for name, _ in named if name.split(".")[-1] in HEADS]
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    outside = [n for n, m in named if n and "." not in n and m is not body]
    pooler = "decoder" if model.base_model_prefix == "perceiver" else "pooler"
    return outside + [name for name, _ in named if name.split(".")[-1] == pooler]


def new_modules(model: nn.Module) -> list[str]:
    """The modules for which from_pretrained had no weights, or [] if it did not make the model.

    transformers marks each parameter that it has loaded. A copy of the model loses the marks, and
    what is put in later (components, adapters) never had one; so the first answer is kept.
    """
    if "new_modules" not in vars(model):
        ours = dynamic_layers(model)
        named = {n: p for n, p in model.named_parameters() if not in_head(n, ours)}
        loaded = {n for n, p in named.items() if getattr(p, "_is_hf_initialized", False)}
        new = {n.rpartition(".")[0]: None for n in named if loaded and n not in loaded}
        vars(model)["new_modules"] = [name for name in new if name]
    return vars(model)["new_modules"]


def in_head(name: str, heads: Iterable[str] | None = None) -> bool:
    """Whether a module or parameter is one of these modules, or inside one.

    Without a model's head_modules it goes by HEADS, which serves for the kinds in BASE_MODELS.

    >>> [in_head(name, ["classifier"]) for name in ("classifier.dense.weight", "pre_classifier")]
    [True, False]
    >>> in_head("classifier.dense.weight"), in_head("encoder.layer.0.output.dense.weight")
    (True, False)
    """
    if heads is None:
        return not HEADS.isdisjoint(name.split("."))
    return any(name == head or name.startswith(head + ".") for head in heads)


def default_target_modules(model: nn.Module, cross_attention: bool = False) -> list[str]:
    """The matrices of each layer: six for RoBERTa, BERT, MPNet and BART, seven for Llama's kin.

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


def check_target(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise an error naming a module of the model that cannot be adapted.

    TypeError for what is no nn.Linear, or has a quantised weight; ValueError for a weight that is
    another module's too.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        raise TypeError(f"target_modules: {name} is {kind}; only nn.Linear can be adapted")
    if not module.weight.is_floating_point():
        raise TypeError(
            f"target_modules: {name} is {kind} with a weight of {module.weight.dtype}; quantised "
            "layers cannot be adapted, load the model in float32 or bfloat16"
        )
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is module.weight and not in_head(other, [name]):
            raise ValueError(
                f"target_modules: {name} has its weight in common with {other}: merged, the update "
                "would change both; leave it out, or load the model with tie_word_embeddings=False"
            )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def find_targets(model: nn.Module, target_modules: list[str]) -> dict[str, nn.Linear]:
    """The linear layers that these names, or ends of dotted names, mean; nothing in the head.

    Raises ValueError naming a target that matches nothing, and as check_target does.

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    >>> list(find_targets(model, ["query"]))
    ['query']
    """
    heads = head_modules(model)
    modules = {n: m for n, m in model.named_modules() if not in_head(n, heads)}
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
        check_target(name, module, model)
    return found


def inject_adapters(
    model: nn.Module,
    target_modules: Iterable[str] | None = None,
    r: int = 12,
    lora_alpha: float = 8,
    lora_dropout: float = 0.1,
) -> nn.Module:
    """Replace each target by a DynamicLoRALinear around it, in place; returns the model.

    `target_modules` are names or ends of dotted names; None takes default_target_modules. Nothing
    in the head is ever matched. Raises, before anything is changed: ValueError for no names at all,
    naming a target that matches nothing, with near names, or one whose weight is another module's
    too; TypeError for a target that is not an nn.Linear (or is adapted already).

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    >>> list(dynamic_layers(inject_adapters(model, ["query"], r=2)))
    ['query']
    """
    model_inside = bare(model)
    if target_modules is None:
        target_modules = default_target_modules(model_inside)
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not names:
        raise ValueError("target_modules is empty: name linear layers, or leave it out")
    for name, linear in find_targets(model_inside, names).items():
        adapted = DynamicLoRALinear(linear, r, lora_alpha, lora_dropout)
        model_inside.set_submodule(name, adapted.train(linear.training))
    return model


def mark_only_adapters_trainable(model: nn.Module) -> nn.Module:
    """Freeze all but the adapters and the head, in place; returns the model.

    The head is new and knows nothing, so every method that the paper compares trains it. It is
    trained in float32, as the adapters are, whatever the type of the frozen weights.

    >>> model = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    >>> model = mark_only_adapters_trainable(inject_adapters(model, ["query"], r=2))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['query.lora_A', 'query.lora_B', 'query.lora_c']
    """
    model.requires_grad_(False)
    for name in head_modules(model):
        train_in_float32(bare(model).get_submodule(name)).requires_grad_(True)
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
    heads = head_modules(model)
    for name, parameter in bare(model).named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            counts["head" if in_head(name, heads) else "adapter"] += parameter.numel()
    return counts


def merge_adapters(model: nn.Module) -> nn.Module:
    """Fold the surviving components into the base weights, in place; returns a plain model.

    In evaluation mode its outputs equal the adapted model's. Read with care: only once pruning has
    ended. Before that, components outside the mask may have revived; they are left out here.
    Raises TypeError for a model of PEFT, which has a method of its own for that.
    """
    if isinstance(model, DynamicLoRALinear):
        return model.merge()
    inside = bare(model)
    ours = {n: m for n, m in inside.named_modules() if isinstance(m, DynamicLoRALinear)}
    if len(ours) < len(dynamic_layers(model)):
        raise TypeError("merge_adapters is for inject_adapters; PEFT's model: merge_and_unload()")
    stop_watching(ours.values())
    for name, layer in ours.items():
        inside.set_submodule(name, layer.merge())
    return model
