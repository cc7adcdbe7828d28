"""Families that treat a 32x32 picture as a sequence: attention, mixing, and no structure at all."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutional import unit


class Attention(nn.Module):
    """A small ViT: a convolutional stem to 4x4 tokens, pre-norm blocks, and the mean tokens of the four quarters.

    The stem replaces the cut into patches because it makes small transformers train fast (Xiao et al. 2021,
    arXiv 2106.14881).

    Args:
        classes: outputs of `head`.
        width: dimension of a token.
        depth: blocks.
        heads: attention heads; divides width.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, 4 * width).
    """

    def __init__(self, classes: int, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        sides = (3, width // 4, width // 2, width)
        self.stem = nn.Sequential(*[unit(inputs, outputs, 2) for inputs, outputs in pairwise(sides)])
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        nn.init.normal_(self.position, std=0.5)
        self.blocks = nn.Sequential(*[_Attending(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position  # (n, 16, width)
        maps = self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(2, (4, 4))  # (n, width, 4, 4)
        logits: Tensor = self.head(F.avg_pool2d(maps, 2).flatten(1))
        return logits


class _Attending(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.look = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.think = _perceptron(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.look(self.norm(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        out: Tensor = x + self.think(x)
        return out


class Mixer(nn.Module):
    """An MLP-Mixer: patches of 4x4, perceptrons across the patches in turn with perceptrons across the channels.

    Args:
        classes: outputs of `head`.
        width: dimension of a patch.
        depth: pairs of perceptrons.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, width).
    """

    def __init__(self, classes: int, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.across = nn.ModuleList([_perceptron(64, 64) for _ in range(depth)])
        self.along = nn.ModuleList([_perceptron(width, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)  # (n, width, 64)
        for across, along in zip(self.across, self.along, strict=True):
            x = x + across(x)
            x = x + along(x.transpose(1, 2)).transpose(1, 2)
        logits: Tensor = self.head(self.norm(x.mean(2)))
        return logits


class Perceptron(nn.Module):
    """Three layers that see the whole picture at half resolution, and know nothing of neighbourhood.

    Args:
        classes: outputs of `head`.
        width: units of a layer, and features.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, width).
    """

    def __init__(self, classes: int, width: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3 * 16 * 16, width, width):
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(F.avg_pool2d(x, 2).flatten(1)))
        return logits


def _perceptron(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
