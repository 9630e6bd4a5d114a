# Answers to notebook 08. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# A map of rank p that starts with init_r components misses at least p - init_r of its directions, and
# every direction has the same strength. A ratio of 1.5 (the paper's) caps every layer at 1.5 times the
# average.
def least_error(planted_ranks, init_r):
    return sum(max(p - init_r, 0) for p in planted_ranks) / sum(planted_ranks)


# %% exercise-2
# The product a c does not change, so the norm cannot; it is even equal bit for bit, since 8 is a power
# of two. |c| sees the last map's components eight times smaller and prunes them.
def in_other_units(score, units):
    def rescaled(lora_A, lora_B, lora_c):
        factor = units.unsqueeze(-1)  # (maps, 1)
        return score(lora_A * factor.unsqueeze(-1), lora_B, lora_c / factor)

    return rescaled


# %% exercise-3
# For x ~ N(0, s² I) a component moves the outputs by |c| ‖b‖ |aᵀx|, and the root mean square of aᵀx is
# s ‖a‖: the norm times the scale of the inputs.
def score_by_use(lora_A, lora_B, lora_c, input_scale):
    return component_norms(lora_A, lora_B, lora_c) * input_scale.unsqueeze(-1)
