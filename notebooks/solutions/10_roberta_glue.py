# %% exercise-1
OF_THE_METHOD = {"method", "init_r", "target_r", "bottleneck", "dem_weight", "learning_rate"}
OF_THE_METHOD |= {"lora_alpha"}


def unfair(first, second):
    first, second = dataclasses.asdict(first), dataclasses.asdict(second)
    return {name for name in first if first[name] != second[name]} - OF_THE_METHOD


# %% exercise-2
def big_tasks(steps):
    return {name for name, n in steps.items() if n > sum(steps.values()) / 5}
