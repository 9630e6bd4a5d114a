# Answers to notebook 01. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# lora_A maps 768 inputs to 4 numbers, lora_B maps those 4 back to 768 outputs.
shape_of_lora_A = (4, 768)
shape_of_lora_B = (768, 4)


# %% exercise-2
# The singular value decomposition only rotates, and rotations keep lengths: ‖M‖²_F = Σ σᵢ².
def norm_from_singular_values(matrix):
    return torch.linalg.svdvals(matrix).square().sum().sqrt()


# %% exercise-3
# U and V have orthonormal columns, so the components are orthogonal and of norm σᵢ.
def orthogonal_components(matrix, r):
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Vh[:r], U[:, :r], sigma[:r]
