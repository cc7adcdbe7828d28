"""Convolutional families for 32x32 pictures: plain, residual, and depthwise with layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Five convolutions with batch norm; keeps a 2x2 layout of the last maps as features.

    Args:
        classes: outputs of `head`.
        width: channels of the first stage.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, 16 * width).
    """

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            unit(3, w, 2), unit(w, 2 * w, 1), unit(2 * w, 3 * w, 2), unit(3 * w, 4 * w, 1), unit(4 * w, 4 * w, 2)
        )
        self.head = nn.Linear(16 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.avg_pool2d(self.layers(x), 2).flatten(1))
        return logits


def unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """A small ResNet: a strided stem, four residual blocks, global average pooling.

    Args:
        classes: outputs of `head`.
        width: channels of the first stage.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, 8 * width).
    """

    def __init__(self, classes: int, width: int = 20) -> None:
        super().__init__()
        w = width
        self.stem = unit(3, w, 2)
        self.blocks = nn.Sequential(
            _Block(w, w, 1), _Block(w, 2 * w, 2), _Block(2 * w, 4 * w, 2), _Block(4 * w, 8 * w, 2)
        )
        self.head = nn.Linear(8 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = unit(inputs, outputs, stride)
        self.conv = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(self.first(x))) + self.skip(x))


class Depthwise(nn.Module):
    """A small ConvNeXt: patches of 4x4, depthwise 5x5 convolutions, channel mixing behind layer norm.

    Args:
        classes: outputs of `head`.
        width: channels of the first stage; the second has twice as many.
        blocks: blocks of each stage.

    Shape: (n, 3, 32, 32) -> (n, classes); features (n, 2 * width).
    """

    def __init__(self, classes: int, width: int = 56, blocks: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.near = nn.Sequential(*[_Mixing(width) for _ in range(blocks[0])])
        self.down = nn.Conv2d(width, 2 * width, 2, 2)
        self.far = nn.Sequential(*[_Mixing(2 * width) for _ in range(blocks[1])])
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.far(self.down(self.near(self.stem(x)))).mean((2, 3))))
        return logits


class _Mixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 3 * width)
        self.narrow = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.space(x).permute(0, 2, 3, 1))  # (n, H, W, width)
        change: Tensor = self.narrow(F.gelu(self.widen(y)))
        return x + change.permute(0, 3, 1, 2)
