"""Fine-tune a model through small bottlenecks beside or behind its layers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.surgery import freeze, head_of, matching, replace_layers
from headstart.core.validate import finite, one_of, require, suggestion

PAPER = Paper(
    title="Towards a Unified View of Parameter-Efficient Transfer Learning",
    authors="He et al.",
    year=2022,
    arxiv="2110.04366",
    code="https://github.com/jxhe/unify-parameter-efficient-tuning",
    departs="No dropout and no layer norm inside the bottleneck; no prefix tuning and so no mix-and-match adapter.",
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A model that trains small networks of its own beside frozen layers, and starts as what it was.

    A matched layer h(x) becomes h + scale U relu(D z), with z = x where the adapter is parallel and z = h where it is
    sequential; U starts at zero.

    Args:
        rank: width of the bottleneck, >= 1; 16 in the paper for classification.
        scale: what the change is multiplied by, > 0; the paper's 2 for classification, 4 for generation.
        placement: "parallel" reads the layer's input, "sequential" its output.
        layers: shell pattern over dotted names of layers that hold linear ones, such as "blocks.*.mlp". The first of
            them tells the width of z = x, the last that of h, on the last axis.
        head: dotted name of the head, which is trained whole; by default the last linear layer.
        seed: of D.

    Shape: (..., in) -> (..., out) for every matched layer.

    Use it when: a low-rank change of the weights is not enough, and some extra time at prediction is no matter.
    Not when: the model must come out plain and as fast as before (see `LoRA`).

    Cost: trains rank (in + out) + rank + out numbers for each matched layer (in = out where sequential), and the head.

    Notes: cannot be folded, because of the relu; `fold` gives the adapted model back. D is uniform in +-1 / sqrt(in).

    Raises:
        Refused: no layer matches (with the names there are), rank < 1, scale <= 0, NaN in the weights.

    Reference: He et al. 2022, table 1 (scaled parallel adapter) and section 4.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> adapted = Adapter(rank=2, layers="0").apply(model)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)  # 2 (8 + 8) + 2 + 8 + 8 * 3 + 3
    69
    """

    layers: str
    rank: int = 16
    scale: float = 4.0
    placement: Literal["parallel", "sequential"] = "parallel"
    head: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "Adapter needs rank >= 1", self.rank, "Pass a number such as 16.")
        require(0 < self.scale < math.inf, "Adapter needs a finite scale > 0", self.scale, "Pass a number such as 4.0.")
        one_of("placement", self.placement, ["parallel", "sequential"])

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy with frozen weights, a bottleneck at each matched layer, and a head that trains."""
        head = self.head or head_of(model)
        found = [name for name in matching(model, self.layers, nn.Module) if name != head]
        names = [name for name in found if any(isinstance(m, nn.Linear) for m in model.get_submodule(name).modules())]
        every = [name for name, _ in model.named_modules() if name]
        require(bool(names), f"layers={self.layers!r} must match a layer with a linear one, beside the head {head!r}",
                found or "none", suggestion(self.layers, every))  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed)
        # inner layers first, so that outer names still lead to them
        new = replace_layers(freeze(model), reversed(names), lambda layer: Bottleneck(layer, self, generator))
        return replace_layers(new, [head], lambda layer: copy.deepcopy(layer).requires_grad_())

    def fold(self, model: nn.Module) -> nn.Module:
        """The model as it is: a bottleneck with a relu is no weight matrix."""
        return model


class Bottleneck(nn.Module):
    """A frozen layer with a small trained network beside it or behind it."""

    def __init__(self, layer: nn.Module, adapter: Adapter, generator: torch.Generator) -> None:
        super().__init__()
        linear = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        for m in linear:
            finite("a weight under an adapter", m.weight, "Load a model that has not diverged.")
        self.parallel, self.scale = adapter.placement == "parallel", adapter.scale
        like, out = linear[0].weight, linear[-1].out_features
        reads = linear[0].in_features if self.parallel else out
        down = (2 * torch.rand(adapter.rank, reads, generator=generator) - 1) / math.sqrt(reads)
        self.layer = layer
        self.down, self.down_bias = nn.Parameter(down.to(like)), nn.Parameter(like.new_zeros(adapter.rank))
        self.up, self.up_bias = nn.Parameter(like.new_zeros(out, adapter.rank)), nn.Parameter(like.new_zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        z = F.linear(x if self.parallel else h, self.down, self.down_bias).relu()
        return h + self.scale * F.linear(z, self.up, self.up_bias)
