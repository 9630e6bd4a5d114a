# Answers to notebook 18. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# Shuffling within each group keeps what the shapes get, and moves everything else.
def permuted(ranks, groups, rng):
    for places in groups:
        ranks[places] = rng.permutation(ranks[places])
    return ranks


# %% exercise-2
# Subtract first, example by example: only where the two disagree is there anything to vary.
def paired_error(first, second):
    difference = first - second
    return difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))


# %% exercise-3
# The error falls as 1/√n, and Student's t with it: try one number after the other.
def pairs_needed(std, effect):
    n = 2
    while power.smallest_effect(std / math.sqrt(n), n - 1) > effect:
        n += 1
    return n
