# Answers to notebook 04. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# Take logarithms of βᵏ = 1/2. A β ten times closer to 1 (0.99 for 0.9) lives about ten times longer.
def half_life_of(beta):
    return math.log(0.5) / math.log(beta)


# %% exercise-2
# Solve (1 - β) / (1 + β) = f² for β. A tenth of the noise takes β = 0.980, which is a hundred scores'
# worth of averaging, and about 115 steps for 90 % of a jump.
def beta_for(f):
    return (1 - f**2) / (1 + f**2)


# %% exercise-3
# After t steps the weights sum to 1 - βᵗ. Dividing by that makes them sum to 1 at every step.
def smooth_corrected(raw, beta):
    t = torch.arange(1, len(raw) + 1).unsqueeze(1)  # (steps, 1)
    return smooth(raw, beta) / (1 - beta**t)
