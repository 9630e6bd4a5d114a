# Answers to notebook 20. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# |ahead| / √d must reach the normal quantile, so d is at most its square.
def most_disagreements(ahead):
    return int((ahead / norm.ppf(1 - level / 2)) ** 2)


# %% exercise-2
# One pair has no spread, so start at two. What k pairs can find shrinks as k grows: the first is the least.
def seeds_needed(points):
    k = 2
    while smallest_effect(scatter / k**0.5, k - 1) > points:
        k += 1
    return k


# %% exercise-3
# A named task, so that PEFT adds the term; and lora_alpha / init_r = 2, as LoRA's 64 / 32.
def repaired():
    shape = dict(init_r=64, target_r=32, tinit=200, tfinal=500, total_step=5000)
    return AdaLoraConfig(**shape, task_type="CAUSAL_LM", lora_alpha=of_lora * 64)
