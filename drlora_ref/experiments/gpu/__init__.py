"""One command for a GPU: does all work there, how fast, and then what is most worth doing.

    python -m drlora_ref.experiments gpu --minutes 60      # `make gpu MINUTES=60`
    python -m drlora_ref.experiments gpu check             # one of the three parts: check,
    python -m drlora_ref.experiments gpu queue --dry-run   # benchmark, queue

check.py holds the graph against the eager step, and replicas against single runs; benchmark.py
measures steps a second; queue.py works through notebooks/grids/queue.yaml and fits what is left
into the time there is. pack.py brings the project to a machine without a network.
"""

import torch

NO_GPU = (
    "no GPU: `{}` would check the captured step against the eager one, measure steps a second, and "
    "work through notebooks/grids/queue.yaml for as long as --minutes says"
)


def has_gpu() -> bool:
    """Whether there is a GPU that torch can use."""
    return torch.cuda.is_available()
