# Answers to notebook 03. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# Orthogonal components of norm |c|: a 3-4-5 triangle. The first has the share 3/5.
scalars = [3.0, 4.0]


# %% exercise-2
# ‖cᵢ bᵢ ⟨aᵢ, x⟩‖ = |cᵢ| ‖bᵢ‖ |⟨aᵢ, x⟩|: only the reading ⟨aᵢ, x⟩ depends on the input. With
# isotropic inputs its mean square is ‖aᵢ‖², and this is component_norms again.
def norms_on_inputs(lora_A, lora_B, lora_c, x):
    reading = (x @ lora_A.T).square().mean(dim=0).sqrt()  # (r,)
    return lora_c.abs() * lora_B.norm(dim=0) * reading


# %% exercise-3
# What is removed is itself a sum of components, so update_norm measures it. For one component that is
# the score; for several, they may cancel or add up.
def change_when_pruned(lora_A, lora_B, lora_c, k):
    gone = importance_scores(lora_A, lora_B, lora_c).argsort()[:k]
    removed = update_norm(lora_A[gone], lora_B[:, gone], lora_c[gone])
    return removed / update_norm(lora_A, lora_B, lora_c)
