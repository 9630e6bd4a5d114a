# Answers to notebook 00. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# Columns of lora_B are the paper's A_i; index 3 is the fourth.
letter = "A_4"

# %% exercise-2
# Six matrices in each of 12 layers: 72 matrices, 12 components each at first and 8 at the end.
at_the_start = 6 * 12 * 12
at_the_end = 6 * 12 * 8
