# Answers to notebook 11. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# Each window after the first brings room - shared new tokens.
def count_windows(n, room, shared):
    return 1 + max(0, -(-(n - room) // (room - shared)))


# %% exercise-2
# The best start is the last token and the best end is the first. Of the best two of each, 2 and 3
# with 0 and 2, only (2, 2) is a span: 4 + 4. But (0, 0) scores 0 + 9, and 0 is the worst start.
start_logits = [0.0, 1.0, 4.0, 5.0]
end_logits = [9.0, 1.0, 4.0, 2.0]


# %% exercise-3
all_answered = squad.load_task("squad_v1", "generated").train


def silent_share(max_length):
    targets = squad_windows.encode_train(all_answered, tokenizer, max_length, stride=4)
    return np.mean(np.array(targets["start_positions"]) == 0)
