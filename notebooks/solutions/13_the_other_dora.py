# Answers to notebook 13. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# One number for every output: four matrices of attention and the second of feed-forward have 768
# outputs, the first of feed-forward has 3072. A quarter of LoRA's at rank 2; at rank 8 a sixteenth.
numbers_in_m = 12 * (4 * 768 + 3072 + 768)


# %% exercise-2
# W' = m V / ‖V‖. With ‖V‖ constant that is linear in V. The exact gradient has lost the part along V:
# the norm in the denominator undoes every stretch.
def gradients_at_V(G, V, m):
    norm = V.norm(dim=1, keepdim=True)
    constant = m.unsqueeze(1) / norm * G
    direction = V / norm
    exact = constant - (constant * direction).sum(dim=1, keepdim=True) * direction
    return exact, constant


# %% exercise-3
# The components build the direction, so c belongs inside the norm. The allocator of notebook 06 could
# prune them as they are; what it would not know is that a removal now turns rows instead of moving them.
def dynamic_decomposed_weight(W0, m, lora_A, lora_B, lora_c, scaling):
    V = W0 + scaling * (lora_B * lora_c) @ lora_A
    return m.unsqueeze(1) * V / V.norm(dim=1, keepdim=True)
