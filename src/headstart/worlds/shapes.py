"""Flat shapes, filled or outlined, at any angle, on plain or shaded ground."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from .pictures import CHUNK, Pictures, asked, coarse, eight_bit, painted, uniform
from .warp import signed_distance, warp

CLASSES = (
    "disc", "half disc", "crescent", "triangle", "square", "pentagon", "star", "cross", "arrow", "heart", "corner",
    "bar",
)  # fmt: skip
_CANVAS = 64


def render(count: int, seed: int, *, size: int = 32, low_resolution: float = 0.3) -> Pictures:
    """Pictures of one shape each, of twelve kinds.

    Args:
        count: how many pictures; the classes are drawn evenly.
        seed: of every random choice; the same seed gives the same bytes.
        size: side of the square pictures, in pixels.
        low_resolution: share of pictures averaged down to 8..16 pixels and up again.

    Returns:
        images uint8 (count, size, size, 3), labels int64 (count,), the names of the shapes.

    Cost: about 0.2 ms a picture of 32x32.

    Raises:
        Refused: count < 1, or size outside 8..256.

    >>> images, labels, names = render(3, 0)
    >>> images.shape, [names[label] for label in labels]
    ((3, 32, 32, 3), ['disc', 'half disc', 'crescent'])
    """
    asked(count, size)
    rng = np.random.default_rng([seed, 2])
    labels = np.arange(count) % len(CLASSES)
    parts = [_draw(labels[i : i + CHUNK], rng, size, low_resolution) for i in range(0, count, CHUNK)]
    return Pictures(np.concatenate(parts), labels.astype(np.int64), CLASSES)


def _draw(labels: np.ndarray, rng: np.random.Generator, size: int, low_resolution: float) -> np.ndarray:
    n = len(labels)
    distance = warp(
        _atlas()[torch.from_numpy(labels)][:, None], rng, size=size,
        rotate=180, shear=0.2, scale=(0.5, 1.3), stretch=0.5, shift=0.3, elastic=0.02,
    )[:, 0]  # fmt: skip
    outlined = (uniform(rng, 0, 1, n) < 0.4)[:, None, None]
    pen = uniform(rng, 2.0, 4.5, n)[:, None, None]
    ink = torch.sigmoid(torch.where(outlined, pen - distance.abs(), distance) / 0.8)
    images = painted(ink, rng, colourful=0.6, contrast=0.25)
    slope = uniform(rng, -0.25, 0.25, n, 2)  # light that falls off across the picture
    across = torch.linspace(-1, 1, size)
    light = slope[:, :1, None] * across + slope[:, 1:, None] * across[:, None]
    return eight_bit(coarse(images + light[:, None], rng, (10, 12, 16), low_resolution), rng)


@cache
def _atlas() -> Tensor:
    """Signed distances (shapes, 64, 64); y points down."""
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS] / (_CANVAS - 1) * 2 - 1
    y, x = y * 1.4, x * 1.4  # shapes live in the unit disc, with room around
    radius = np.hypot(x, y)
    ink = {
        "disc": radius < 0.9,
        "half disc": (radius < 1) & (y > -0.2),
        "crescent": (radius < 1) & (np.hypot(x - 0.5, y) > 0.8),
        "triangle": _polygon(x, y, 3),
        "square": np.maximum(abs(x), abs(y)) < 0.75,
        "pentagon": _polygon(x, y, 5),
        "star": radius * (1 + 0.55 * np.cos(5 * np.arctan2(x, -y) + np.pi)) < 0.62,
        "cross": (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.9),
        "arrow": ((abs(y) < 0.2) & (abs(x) < 0.9)) | ((x > 0.1) & (abs(y) < 0.9 - x)),
        "heart": (x**2 + y**2 - 0.5) ** 3 + 1.6 * x**2 * y**3 < 0,
        "corner": (np.maximum(abs(x), abs(y)) < 0.8) & ((x < -0.3) | (y > 0.3)),
        "bar": (abs(x) < 0.95) & (abs(y) < 0.25),
    }
    return torch.from_numpy(np.stack([signed_distance(ink[name]) for name in CLASSES]))


def _polygon(x: np.ndarray, y: np.ndarray, sides: int) -> np.ndarray:
    angles = 2 * np.pi * np.arange(sides) / sides
    reach = np.max([x * np.sin(a) + y * np.cos(a) for a in angles], axis=0)  # edges face outwards, one straight down
    return np.asarray(reach < 0.95 * np.cos(np.pi / sides))
