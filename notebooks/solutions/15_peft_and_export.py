# Answers to notebook 15. A test puts each cell in the place of its stub and runs the notebook.

# %% exercise-1
# The mask takes rows of A and columns of B; c and the scaling are factors of the columns of B.
def folded(layer):
    mask = layer.component_mask
    B = layer.lora_B * (layer.scaling * layer.lora_c)
    return layer.lora_A[mask], B[:, mask]


# %% exercise-2
# The order is Algorithm 1's: loss with DEM, backward, optimizer, and only then the allocator.
def training_step(model, batch, optimizer, step):
    loss = model(**batch).loss
    if not model.schedule().pruning_ended(step):
        loss = loss + dem_weight * model.dem_loss()
    loss.backward()
    optimizer.step()
    model.update_and_allocate(step)
    optimizer.zero_grad()


# %% exercise-3
# Trainer calls the loss once for each batch, and DEM is in it each time: four times a quarter. Adding
# it once, whole, would do as well. DEM depends on the weights alone, which do not change in between.
additions, factor = 4, 1 / 4
