"""Train two blocks once, start transformers of any depth from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from headstart.core.paper import Paper
from headstart.core.validate import finite, one_of, require

from .learngene import Learngene, blocks_of
from .linearity import fitted_line

PAPER = Paper(
    title="Transformer as Linear Expansion of Learngene",
    authors="Shiyu Xia and Miaosen Zhang and Xu Yang and Ruiming Chen and Haokun Chen and Xin Geng",
    year=2024,
    arxiv="2312.05614",
    code="https://github.com/AlphaXia/TLEG",
    departs="Any model with a list of equal blocks, class token or not; one order of pooling and final norm, that of "
    "the model, so that a descendant of the same depth computes what the auxiliary model computes. The divergence is "
    "averaged over examples, not over logits.",
)


@dataclass(frozen=True, kw_only=True)
class TLEG:
    """Models of one width and any depth, started from two trained blocks instead of trained one by one.

    Block l of L, counted from 0, is base + l / L · slope: weights, biases and norms. `apply` makes a model whose blocks
    are built from the two in every forward pass; train it once, with a teacher, then `expand` it to each depth and
    fine-tune all blocks freely and shortly, without warm-up. `fold` expands to the depth it was trained at.

    Args:
        blocks: dotted name of the model's list of blocks: "blocks" (timm), "encoder.layer" (BERT), "encoder.layers".
        start: "first" takes the model's first block as base; give a fresh model (in the paper normal weights of std
            0.02, biases 0, norms 1; small widths need more). "fitted" takes base and slope by least squares from all
            blocks of a trained model; experimental and not in the paper: blocks are near a line only if trained so.
        slope: std of the slope's matrices at a "first" start, >= 0 (paper: 0.02); its biases and norms start at 0.
        seed: of the slope.

    Shape: a model with at least two blocks of the same shapes; any inputs.

    Use it when: one task is to run on devices of several sizes, or each new depth would be trained from scratch.
    Not when: a single depth is wanted, or a trained model of that very depth exists.

    Cost: the steps are those of the model's own depth, plus two operations on each weight; gradients and optimizer
    state of two blocks. `expand`: one pass over the new weights.

    Notes: the teacher is a term, `SoftTargets(teacher, temperature=1.0)` alone in the paper's code, which leaves the
    labels out. Stochastic depth and dropout are 0 while it is trained. Decay of the slope pulls towards equal blocks.

    Raises:
        Refused: no such list, blocks that differ in shape, share tensors or keep statistics, fewer than two, NaN.

    Reference: Xia et al. 2024, the linear expansion and its two stages.

    >>> block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    >>> model = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
    >>> learngene = TLEG(blocks="layers").apply(model)
    >>> block_size = sum(p.numel() for p in block.parameters())
    >>> sum(p.numel() for p in learngene.parameters()) == 2 * block_size
    True
    >>> len(learngene.expand(7).layers)
    7
    """

    blocks: str = "blocks"
    start: Literal["first", "fitted"] = "first"
    slope: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("start", self.start, ["first", "fitted"])
        require(0 <= self.slope < math.inf, "TLEG needs a finite slope >= 0", self.slope, "The paper uses 0.02.")

    def apply(self, model: nn.Module) -> Learngene:
        """The auxiliary model: as deep as the given one, with two blocks' worth of weights and the shared parts."""
        first = blocks_of(model, self.blocks, least=2)[0]
        if self.start == "fitted":
            return Learngene(model, self.blocks, *fitted_line(model, self.blocks))
        base = {name: p.detach() for name, p in first.named_parameters()}
        generator, slope = torch.Generator().manual_seed(self.seed), {}
        for name, value in base.items():
            finite(f"tensor {name!r} of the first block", value, "Build a fresh model.")
            std = self.slope if value.dim() > 1 else 0.0
            slope[name] = (std * torch.randn(value.shape, generator=generator)).to(value)
        return Learngene(model, self.blocks, base, slope)

    def fold(self, model: nn.Module) -> nn.Module:
        """The ordinary model of the same depth and the same function; every block its own."""
        require(isinstance(model, Learngene), "fold needs what apply made", type(model).__name__, "Pass a Learngene.")
        assert isinstance(model, Learngene)
        return model.expand(model.depth)
