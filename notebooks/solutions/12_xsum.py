# Answers to notebook 12. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# The count is proportional to the rank.
def largest_rank(budget, cross_attention):
    return budget // adapter_parameters(1, cross_attention)


# %% exercise-2
def winner(sequences, length_penalty):
    scores = [sum(log_p) / len(log_p) ** length_penalty for log_p in sequences]
    return scores.index(max(scores))


# %% exercise-3
def lead(document):
    return document.split("\n")[0]
