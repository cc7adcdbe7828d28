"""What every world returns, and the three steps worlds share: colours, lower resolution, 8-bit images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.validate import require

CHUNK = 1024  # images made at a time: bounds memory, and fixes the order of random draws


class Pictures(NamedTuple):
    """Images made by code: `images` uint8 (n, size, size, 3), `labels` int64 (n,), `classes` their names."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def asked(count: int, size: int) -> None:
    """Refuse an empty or absurd order before any picture is made."""
    require(count >= 1, "A world needs count >= 1", count, "Pass how many images to make.")
    require(8 <= size <= 256, "A world needs 8 <= size <= 256", size, "Pass the side of the square images in pixels.")


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Float32 numbers from [low, high)."""
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Float32 standard normal numbers."""
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def painted(ink: Tensor, rng: np.random.Generator, *, colourful: float = 0.4, contrast: float = 0.4) -> Tensor:
    """Coverage of the foreground in [0, 1] to pictures of two colours.

    Args:
        ink: (n, H, W).
        rng: source of the colours.
        colourful: share of pictures that are not grey.
        contrast: smallest difference in brightness between foreground and background.

    Shape: (n, H, W) -> (n, 3, H, W), values in [0, 1].
    """
    n = len(ink)
    dark = uniform(rng, 0.0, 1.0 - contrast, n, 1)
    bright = dark + contrast + (1.0 - contrast - dark) * uniform(rng, 0.0, 1.0, n, 1)
    tint = uniform(rng, -0.35, 0.35, 2, n, 3) * (uniform(rng, 0, 1, 1, n, 1) < colourful)
    # tints sum to zero over the channels, so that brightness keeps its distance
    dark, bright = ((v + t - t.mean(-1, keepdim=True)).clamp(0, 1) for v, t in zip((dark, bright), tint, strict=True))
    swap = uniform(rng, 0, 1, n, 1) < 0.5
    front, back = torch.where(swap, dark, bright), torch.where(swap, bright, dark)
    ink = ink[:, None]
    return back[:, :, None, None] * (1 - ink) + front[:, :, None, None] * ink


def coarse(images: Tensor, rng: np.random.Generator, sides: tuple[int, ...], share: float) -> Tensor:
    """A share of the pictures as a poor camera would give them: averaged down to one of `sides`, and up again.

    Shape: (n, 3, H, W) -> the same.
    """
    out = images.clone()
    n, side = len(images), images.shape[-1]
    chosen = np.where(rng.random(n) < share, rng.integers(0, len(sides), n), -1)
    for k, low in enumerate(sides):
        rows = torch.from_numpy(np.flatnonzero(chosen == k))
        if len(rows) and low < side:
            small = F.interpolate(images[rows], (low, low), mode="bilinear", antialias=True)
            out[rows] = F.interpolate(small, (side, side), mode="bilinear").clamp(0, 1)
    return out


def eight_bit(images: Tensor, rng: np.random.Generator, noise: float = 0.02) -> np.ndarray:
    """Pictures in [0, 1], (n, 3, H, W), with a little sensor noise, as uint8 (n, H, W, 3)."""
    if noise:
        images = images + noise * normal(rng, *images.shape)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
