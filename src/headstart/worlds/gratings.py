"""Stripes: sine and square waves of eight orientations and three frequencies, behind a soft window or without."""

from __future__ import annotations

import numpy as np
import torch

from .pictures import CHUNK, Pictures, asked, coarse, eight_bit, painted, uniform

ORIENTATIONS = tuple(180 * k / 8 for k in range(8))  # degrees from the horizontal
FREQUENCIES = {"coarse": (1.5, 2.5), "middle": (3.5, 5.0), "fine": (7.0, 10.0)}  # periods across the picture
CLASSES = tuple(f"{angle:g} degrees, {word}" for word in FREQUENCIES for angle in ORIENTATIONS)


def render(count: int, seed: int, *, size: int = 32) -> Pictures:
    """Pictures of one grating each; the label is its orientation and frequency.

    Args:
        count: how many pictures; the 24 classes are drawn evenly.
        seed: of every random choice; the same seed gives the same bytes.
        size: side of the square pictures, in pixels.

    Returns:
        images uint8 (count, size, size, 3), labels int64 (count,), the 24 class names.

    Cost: about 0.1 ms a picture of 32x32.

    Raises:
        Refused: count < 1, or size outside 8..256.

    >>> images, labels, names = render(2, 0)
    >>> images.shape, names[labels[1]]
    ((2, 32, 32, 3), '22.5 degrees, coarse')
    """
    asked(count, size)
    rng = np.random.default_rng([seed, 3])
    labels = np.arange(count) % len(CLASSES)
    parts = [_draw(labels[i : i + CHUNK], rng, size) for i in range(0, count, CHUNK)]
    return Pictures(np.concatenate(parts), labels.astype(np.int64), CLASSES)


def _draw(labels: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    n = len(labels)
    bands = np.array(list(FREQUENCIES.values()))[labels // len(ORIENTATIONS)]
    wide = 180 / len(ORIENTATIONS)
    angle = np.array(ORIENTATIONS)[labels % len(ORIENTATIONS)] + rng.uniform(-0.35, 0.35, n) * wide
    turn = torch.from_numpy(np.deg2rad(angle).astype(np.float32))[:, None, None]
    periods = torch.from_numpy(rng.uniform(bands[:, 0], bands[:, 1]).astype(np.float32))[:, None, None]
    across = (torch.arange(size) + 0.5) / size
    along = across * turn.sin() + across[:, None] * turn.cos()  # (n, size, size), y points down
    wave = torch.sin(2 * torch.pi * (periods * along + uniform(rng, 0, 1, n, 1, 1)))
    hard = uniform(rng, 0, 1, n, 1, 1) < 0.4
    wave = torch.where(hard, torch.tanh(6 * wave), wave)
    centre = uniform(rng, 0.3, 0.7, 2, n, 1, 1)
    far = (across - centre[0]) ** 2 + (across[:, None] - centre[1]) ** 2
    window = torch.where(uniform(rng, 0, 1, n, 1, 1) < 0.5, torch.exp(-far / 0.08), torch.ones(1))
    images = painted((1 + wave * window) / 2, rng, contrast=0.3)
    return eight_bit(coarse(images, rng, (16,), 0.2), rng, noise=0.04)
