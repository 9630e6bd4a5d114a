# Answers to notebook 16. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# Less than the encoder: that is why they fit. (What grows is the memory of the activations.)
megabytes = 20 * (3 * 165_888 + 592_130) * 4 * 4 / 1e6


# %% exercise-2
# One length for each replica, over all of its tensors; torch adds 1e-6, so as not to divide by zero.
def clipped(gradients, max_norm):
    lengths = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # (R,)
    factors = (max_norm / (lengths + 1e-6)).clamp(max=1.0)
    return [g * factors.reshape(-1, *[1] * (g.dim() - 1)) for g in gradients]


# %% exercise-3
# Whatever belongs to a run alone may differ. The batch, the sentences and the encoder are the pass's own,
# and full fine-tuning has no frozen encoder to share.
can = {"seeds": True, "batch sizes": False, "budgets": True, "methods": False, "tasks": False}
