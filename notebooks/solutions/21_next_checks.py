# Answers to notebook 21. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# Each map keeps a hypergeometric number of its components; what it misses is averaged over that number.
def expected_by_chance(planted):
    chance = hypergeom(96, 12, 32)
    lost = sum(chance.pmf(k) * max(p - k, 0) for p in planted for k in range(13))
    return lost / sum(planted)


# %% exercise-2
# What a variance does not see is the square of the mean. With it, DEM is L2 (up to d / (d - 1)).
def repaired(lora_A, lora_B):
    means = lora_A.mean(dim=-1).square() + lora_B.mean(dim=-2).square()
    return dem_penalty(lora_A, lora_B) + means.mean(dim=-1)
