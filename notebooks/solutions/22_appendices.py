# Answers to notebook 22. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# The components cancel inside the product of two small triangles, entry by entry, *before*
# anything is squared. The Gram form squares first, and so loses half of the digits.
def norm_by_qr(lora_A, lora_B, lora_c):
    R_B = torch.linalg.qr(lora_B, mode="r").R  # (r, r)
    R_A = torch.linalg.qr(lora_A.T, mode="r").R
    return ((R_B * lora_c) @ R_A.T).norm()


# %% exercise-2
# A Fraction is a pair of whole numbers; int() cuts its decimals off, which rounds down what is pruned.
def kept_in_fractions(n, r0, rT, p):
    return n - int(n * Fraction(r0 - rT, r0) * p**3)
