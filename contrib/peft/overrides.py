"""Definitions that take the place of the package's where PEFT needs others (assemble.py)."""


def dem_loss(layers: dict[str, RankOneComponents]) -> Tensor:
    """R over all components of all layers (Eq. 10), a scalar with gradient: add dem_weight · R."""
    check_dem(layers)
    stacks = stack_by_shape(list(layers.values()))
    total = sum(dem_penalty(A, B).sum() * A.shape[-2] for _, (A, B, _) in stacks)
    return total / sum(layer.lora_c.numel() for layer in layers.values())


def whole_modules(model: nn.Module, config: DynamicRankConfig) -> list[str]:
    """Names of what is trained whole beside the components; PEFT adds the head of the task by itself."""
    return list(config.modules_to_save or [])


def in_head(name: str, modules: list[str]) -> bool:
    """Whether a module or parameter is one of these modules, or inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)
