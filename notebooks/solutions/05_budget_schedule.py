# Answers to notebook 05. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# p = (255 - 150) / 350 = 0.3. The paper's curve prunes 72 · 0.027 = 1.9 components, rounded down 1.
# AdaLoRA's prunes 72 · (1 - 0.343) = 47.3, rounded down 47.
stay_paper = 216 - 1
stay_adalora = 216 - 47

# %% exercise-2
# The events are tinit, those every deltaT steps after it, and t_end: ⌈350 / deltaT⌉ + 1 of them. That
# is 5 for every interval from 88 to 116.
interval_for_five = 100


# %% exercise-3
# p itself instead of its cube. Halfway through pruning half is gone: neither early nor late.
def linear_budget(t):
    p = min(max((t - tinit) / (t_end - tinit), 0), 1)
    return init_r - (init_r - target_r) * p
