"""Dynamic-rank DoRA (arXiv 2405.17357), equation by equation.

LoRA gives every weight matrix the same rank. This method starts each layer with a few rank-1
components too many, scores them by their share of the layer's update, and prunes the weakest over
all layers, so that the rank goes where it is needed. It is not the *weight-decomposed* DoRA
(arXiv 2402.09353, `use_dora` in PEFT), which only shares the name.

The paper writes ΔW = Σ Aᵢ Bᵢ cᵢ with Aᵢ a column. LoRA's and PEFT's code writes ΔW = B A, and so
do we:

    paper               here             shape or meaning
    Bᵢ (row)            lora_A[i]        lora_A: (r, d_in)
    Aᵢ (column)         lora_B[:, i]     lora_B: (d_out, r)
    cᵢ                  lora_c[i]        lora_c: (r,)
    r′ = b(0)           init_r           components per layer at the start
    r = b(T)            target_r         components per layer at the end, on average
    tᵢ, t_f             tinit, tfinal    steps before pruning and after it (15 %, 50 % of all)
    pruning interval    deltaT           steps between two pruning events
    β, η                beta, dem_weight

The names below are in the paper's order; read the files in that order too.
"""

# isort: skip_file
from drlora_ref.layer import DynamicLoRALinear, RankOneComponents, dynamic_layers  # Eq. 5-6
from drlora_ref.importance import (  # Eq. 7-8
    SCORES,
    component_norms,
    ema_update,
    importance_scores,
    loss_sensitivity,
    output_norms,
    update_norm,
)
from drlora_ref.schedule import BudgetSchedule  # Eq. 9
from drlora_ref.regularizer import PENALTIES, dem_loss, dem_penalty, penalty_loss  # Eq. 10
from drlora_ref.watch import ZWatch  # for scores of answers; not in the paper
from drlora_ref.allocator import RankAllocator, select_components  # Algorithm 1
from drlora_ref.inject import (
    count_parameters,
    default_target_modules,
    inject_adapters,
    mark_only_adapters_trainable,
    merge_adapters,
)

# The training loop is drlora_ref.train.train, the test with a known answer drlora_ref.planted.

__version__ = "0.1.0"
__all__ = [
    "PENALTIES",
    "SCORES",
    "BudgetSchedule",
    "DynamicLoRALinear",
    "RankAllocator",
    "RankOneComponents",
    "ZWatch",
    "component_norms",
    "count_parameters",
    "default_target_modules",
    "dem_loss",
    "dem_penalty",
    "dynamic_layers",
    "ema_update",
    "importance_scores",
    "inject_adapters",
    "loss_sensitivity",
    "mark_only_adapters_trainable",
    "merge_adapters",
    "output_norms",
    "penalty_loss",
    "select_components",
    "update_norm",
]
