# Answers to notebook 06. A test puts each cell in the place of its stub and runs the notebook.


# %% exercise-1
# Lift the best of every layer above all others, then select as before. A plain selection of one per
# row names them; adding more than the largest score keeps the order among the rest.
def select_at_least_one(scores, keep):
    best_of_layer = select_components(scores, 1)
    lifted = scores + best_of_layer * (scores.max() + 1)
    return select_components(lifted.flatten(), keep).view(scores.shape)


# %% exercise-2
# Stack the masks to (events, N): False anywhere in a column, and True in its last row.
def pruned_but_there_at_the_end(event_masks):
    table = torch.stack(list(event_masks.values()))
    back = ~table.all(dim=0) & table[-1]
    return back.nonzero().flatten().tolist()


# %% exercise-3
# Multiplying by the mask writes exact zeros. `no_grad`, and in place, so that the optimizer goes on
# with the same parameter.
@torch.no_grad()
def zero_again(model):
    for layer in model.values():
        layer.lora_c.mul_(layer.component_mask)


# %% exercise-4
# Fewer than with 20 steps between events: one step of about the learning rate is all that c can move.
# What still brings components back is the smoothed score, which fades by 0.9 a step only, while the
# share of a neighbour may fall faster.
returns_with_deltaT_1 = sum(
    len(run_until_the_end_of_pruning(needs, s, every=1)[1]) for s in range(n_seeds)
)
