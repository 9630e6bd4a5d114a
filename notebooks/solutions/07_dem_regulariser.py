# Answers to notebook 07. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# `pruning_ended` is True after t_end, not yet at it: the last selection still sees a regularised step.
def regularisation(model, schedule, t, weight):
    return 0.0 if schedule.pruning_ended(t) else weight * dem_loss(model)


# %% exercise-2
# s²·Var(a) + Var(b)/s² has the derivative 2s·Var(a) - 2·Var(b)/s³. It is zero at s⁴ = Var(b)/Var(a),
# and there both variances are equal.
def best_scale(a, b):
    return (b.var() / a.var()) ** 0.25


# %% exercise-3
# Numerator and denominator grow with the square of the length, so the length cancels; c is not in it.
def shape_penalty(lora_A, lora_B):
    rows = lora_A.var(dim=-1) / lora_A.square().mean(dim=-1)
    columns = lora_B.var(dim=-2) / lora_B.square().mean(dim=-2)
    return (rows + columns).mean(dim=-1)


# %% exercise-4
# The vectors do become even, and they do not become shorter: this penalty does what DEM's name says.
# Pruning costs more than twice as much, and the final error is larger. A likely reason: flat vectors
# fit these updates badly, so that the components must work against each other. So evenness is not what
# softened the pruning. (Nor is this a fair rival of DEM: the same factor is another strength.)
def scale_free(lora_A, lora_B):
    rows = lora_A.var(dim=-1) / lora_A.square().mean(dim=-1)
    columns = lora_B.var(dim=-2) / lora_B.square().mean(dim=-2)
    return (rows + columns).mean(dim=-1)


with_shape_penalty = train(2 * dem_weight, scale_free)
