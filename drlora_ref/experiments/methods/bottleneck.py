"""Adapters of Houlsby et al. (1902.00751) and Pfeiffer et al. (2005.00247): small networks between
the sub-layers of a frozen transformer.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from drlora_ref.inject import default_target_modules, in_head, matrix_label


class BottleneckAdapter(nn.Module):
    """A frozen linear layer and, behind it, a narrow network with a way around it.

        h = W0 x + b0                           the last linear layer of a sub-layer
        y = h + W_up σ(W_down h + b_down) + b_up      d -> bottleneck -> d

    Around the linear layer, not around the sub-layer: so one class serves every model whose
    sub-layers end in one, and the adapter stands where Houlsby et al. put it, before the
    sub-layer's own residual connection and layer norm.

    Shapes: x (..., d_in) -> (..., d); W_down (bottleneck, d), W_up (d, bottleneck)
    Raises ValueError for a bottleneck below 1 or above d.

    Choice: σ is GELU, and no layer norm is added; with both biases the counts are the paper's.
    Choice: weights start from N(0, 0.01²), biases at 0 (Houlsby et al.): y ≈ h, but W_down has a
    gradient from the first step on, which it would not have behind an exact zero.

    >>> adapter = BottleneckAdapter(nn.Linear(5, 4), bottleneck=2)
    >>> sum(p.numel() for p in adapter.parameters() if p.requires_grad)  # 2·4·2 + 2 + 4
    22
    """

    def __init__(self, base_layer: nn.Linear, bottleneck: int):
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck = {bottleneck}: an adapter needs a width of at least 1")
        if bottleneck > base_layer.out_features:
            raise ValueError(
                f"bottleneck = {bottleneck}: must be at most {base_layer.out_features}"
            )
        self.base_layer = base_layer.requires_grad_(False)
        like = dict(device=base_layer.weight.device, dtype=base_layer.weight.dtype)
        self.down = nn.Linear(base_layer.out_features, bottleneck, **like)
        self.up = nn.Linear(bottleneck, base_layer.out_features, **like)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base_layer(x)
        return h + self.up(F.gelu(self.down(h)))


def insert_adapters(model: nn.Module, bottleneck: int, after_attention: bool) -> nn.Module:
    """An adapter after every feed-forward sub-layer and, if wanted, after self-attention; in place.

    Both is Houlsby's arrangement, the feed-forward one alone is Pfeiffer's. Raises ValueError as
    default_target_modules and BottleneckAdapter do.

    Choice: none after BART's cross-attention, where by default the other methods do nothing either.
    Choice: Pfeiffer's adapter, too, comes before the residual connection; in their paper it comes
    behind the layer norm after it. The number of parameters is the same.
    """
    ends = ("Wo", "Wf2") if after_attention else ("Wf2",)  # the last matrices of the sub-layers
    default_target_modules(model)  # raises for a kind of model that is not known
    for name, module in list(model.named_modules()):
        if not in_head(name) and matrix_label(name) in ends:
            model.set_submodule(name, BottleneckAdapter(module, bottleneck))
    return model
