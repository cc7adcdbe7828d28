"""Fine-tune a model through small low-rank changes of its layers, which fold away afterwards."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from headstart.core.paper import Paper
from headstart.core.surgery import freeze, head_of, matching, replace_layers
from headstart.core.validate import finite, require

PAPER = Paper(
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors="Hu et al.",
    year=2021,
    arxiv="2106.09685",
    code="https://github.com/microsoft/LoRA",
    departs="No dropout on the input of A.",
)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A model that trains a small share of its weights and is afterwards the same plain model, no slower.

    Each matched layer computes W x + scale B A x with W frozen, A (rank, in) random and B (out, rank) zero, so the
    model starts as what it was, bit for bit. `fold` puts W + scale B A in its place.

    Args:
        rank: columns of B, >= 1; 4 to 16 in the papers.
        scale: what the change is multiplied by (s = alpha / rank elsewhere), > 0; 2 in He et al. 2022 for
            classification, 4 for generation.
        layers: shell pattern over dotted names of linear and convolutional layers, such as "*.query,*.value".
        head: dotted name of the head, which is trained whole and never adapted; by default the last linear layer.
        seed: of A.

    Shape: any; a layer keeps its own.

    Use it when: the model is large against the data, or many tasks share one model.
    Not when: the model is small enough to be trained whole and labels are plenty.

    Cost: trains rank (in + out) numbers for each matched layer, where `in` counts a convolution's kernel, and the head.
        Memory of gradients and optimizer falls in proportion. A linear layer costs rank (in + out) more an input row.

    Notes: A is uniform in +-1 / sqrt(in) as in the paper's code. A weight shared by an adapted layer and another layer
    is no longer shared after `fold`; nor is the head's.

    Raises:
        Refused: no layer matches (with the names there are), rank < 1, scale <= 0, NaN in the weights.

    Reference: Hu et al. 2021, equation 3; He et al. 2022 (arXiv 2110.04366), table 1.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> adapted = LoRA(rank=2).apply(model)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad)  # 2 (8 + 16) + 16 * 3 + 3
    99
    >>> LoRA(rank=2).fold(adapted)
    Sequential(
      (0): Linear(in_features=8, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=3, bias=True)
    )
    """

    rank: int = 4
    scale: float = 2.0
    layers: str = "*"
    head: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "LoRA needs rank >= 1", self.rank, "Pass a number such as 4.")
        require(0 < self.scale < math.inf, "LoRA needs a finite scale > 0", self.scale, "Pass a number such as 2.0.")

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy with frozen weights, low-rank changes in the matched layers, and a head that trains."""
        head = self.head or head_of(model)
        names = [name for name in matching(model, self.layers, (nn.Linear, nn.Conv2d)) if name != head]
        require(bool(names), "LoRA needs a layer beside the head", f"layers={self.layers!r}, which matches {head!r}",
                "Match more layers, or name another head.")  # fmt: skip
        twice = [name for name in names if isinstance(model.get_submodule(name.rpartition(".")[0]), LowRank)]
        require(not twice, "LoRA needs layers without LoRA", twice[:3], "Fold it first, or raise rank.")
        generator = torch.Generator().manual_seed(self.seed)
        new = replace_layers(freeze(model), names, lambda layer: LowRank(layer, self.rank, self.scale, generator))
        return replace_layers(new, [head], lambda layer: copy.deepcopy(layer).requires_grad_())

    def fold(self, model: nn.Module) -> nn.Module:
        """A plain model of the same function: each change is added to its weight."""
        names = [name for name, module in model.named_modules() if isinstance(module, LowRank)]
        return replace_layers(model, names, _folded)


class LowRank(nn.Module):
    """A frozen layer plus a change of low rank."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight = layer.weight
        finite("a weight under LoRA", weight, "Load a model that has not diverged.")
        fan_in = weight[0].numel()
        down = (2 * torch.rand(rank, fan_in, generator=generator) - 1) / math.sqrt(fan_in)
        self.layer, self.scale = layer, scale
        self.down = nn.Parameter(down.to(weight))  # A
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))  # B

    @property
    def weight(self) -> Tensor:
        """W + s B A, also for code that reads a layer's weight instead of calling the layer (attention does)."""
        return self.layer.weight + self.scale * (self.up @ self.down).view_as(self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            y: Tensor = self.layer(x)
            return y + self.scale * F.linear(F.linear(x, self.down), self.up)
        changed: Tensor = functional_call(self.layer, {"weight": self.weight}, (x,))
        return changed


def _folded(module: nn.Module) -> nn.Module:
    assert isinstance(module, LowRank)
    module.layer.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
    return module.layer
