# Answers to notebook 02. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# An adapter adds a layer with a nonlinearity: no matrix can do its work, so it stays in the model
# when the model is used. A LoRA-style update changes the weight: it can be folded into it.
mergeable = "lora"


def outputs_of_best_single_matrix(module, points):
    with_ones = torch.cat([points, torch.ones(len(points), 1)], dim=1)  # the ones carry the bias
    weight_and_bias = torch.linalg.lstsq(with_ones, module(points)).solution
    return with_ones @ weight_and_bias


# %% exercise-2
# c = 1, so the gradient of lora_B, s·c·G·a, is there. The other two, s·bᵀ·G·a and s·c·Gᵀ·b, carry
# lora_B as a factor, which is zero: the same start as LoRA's.
learn_at_first_step = {"lora_B"}

# %% exercise-3
# 12 layers x 4 attention matrices x 3 components = 144: all survivors may lie in attention.
fewest = 144 * (768 + 768)
# There are 24 feed-forward matrices with 72 components; the other 72 survivors are in attention.
most = 72 * (768 + 3072) + 72 * (768 + 768)


# %% exercise-4
# c = 0, so the update is zero and the outputs are equal bit for bit, at every rank.
def farthest_from_base(layers, x):
    return max((layer(x) - layer.base_layer(x)).abs().max().item() for layer in layers)
