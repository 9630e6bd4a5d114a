# Answers to notebook 17. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# Each input stays what it is on average, and gets a variance of x² p / (1-p) of its own; variances of
# independent terms add up, each with the square of its weight.
def expected_z_square(A, x, p):
    added = p / (1 - p) * A.square() @ x.square().mean(dim=0)
    return (x @ A.T).square().mean(dim=0) + added


# %% exercise-2
# The parabola in c: slope and curvature at c say where it is at zero. A mean over d_out outputs, hence
# the division.
def damage_in_loss(lora_A, lora_B, lora_c, *, z_square, c_grad):
    answers = lora_c.square() * lora_B.square().sum(dim=-2) * z_square
    return answers / lora_B.shape[-2] - lora_c * c_grad


# %% exercise-3
# The second-order term of a loss that weighs w is w times the squared answers; its root is as good an
# order, and keeps the units of the answers.
def weighted_answers(weights):
    def score(lora_A, lora_B, lora_c, *, z_square):
        answers = output_norms(lora_A, lora_B, lora_c, z_square=z_square)
        return weights.sqrt().unsqueeze(-1) * answers

    return score
