"""The plainest transformer for pictures, of any small size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchTransformer(nn.Module):
    """Patches with learned places, `torch.nn.TransformerEncoder` with norms first, and the mean of the tokens.

    Args:
        classes: outputs of `head`.
        side: of the picture.
        patch: side of a patch; divides `side`.
        width: dimension of a token.
        depth: layers.
        heads: attention heads; divides width.
        channels: of the picture.

    Shape: (n, channels, side, side) -> (n, classes).

    >>> PatchTransformer(10)(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self, classes: int, side: int = 8, patch: int = 2, width: int = 32, depth: int = 2, heads: int = 4,
        channels: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See Shape."""
        logits: Tensor = self.head(self.layers(self.patches(x).flatten(2).mT + self.place).mean(1))
        return logits
