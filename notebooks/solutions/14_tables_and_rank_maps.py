# Answers to notebook 14. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# The interval is difference ± t · std / √n, and t itself depends on n: so try.
def seeds_needed(difference, std):
    n = 2
    while stats.t.ppf(0.975, df=n - 1) * std / np.sqrt(n) >= difference:
        n += 1
    return n


# %% exercise-2
def best_of_equals(n_values, n_seeds, rng):
    return rng.normal(size=(n_values, n_seeds)).mean(axis=1).max()
