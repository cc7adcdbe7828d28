"""Textures without objects: coloured noise, its folds and thresholds, cells, and leaves that cover each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .pictures import Pictures, asked, eight_bit, normal, painted, uniform

_CHUNK = 512  # cells need a distance from every pixel to every seed


def render(count: int, seed: int, *, size: int = 32) -> Pictures:
    """Pictures of textures from twelve random processes; the label is the process.

    Args:
        count: how many pictures; the classes are drawn evenly.
        seed: of every random choice; the same seed gives the same bytes.
        size: side of the square pictures, in pixels.

    Returns:
        images uint8 (count, size, size, 3), labels int64 (count,), the names of the processes.

    Cost: about 0.3 ms a picture of 32x32.

    Raises:
        Refused: count < 1, or size outside 8..256.

    Reference: coloured noise and dead leaves as pretraining data: Baradad et al. 2021, arXiv 2106.05963.

    >>> images, labels, names = render(2, 0)
    >>> images.shape, names[labels[1]]
    ((2, 32, 32, 3), 'pink')
    """
    asked(count, size)
    rng = np.random.default_rng([seed, 4])
    labels = np.arange(count) % len(PROCESSES)
    images = np.empty((count, size, size, 3), np.uint8)
    for first in range(0, count, _CHUNK):
        for label, process in enumerate(PROCESSES.values()):
            rows = first + np.flatnonzero(labels[first : first + _CHUNK] == label)
            if len(rows):
                field = process(len(rows), size, rng)
                low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
                images[rows] = eight_bit(painted((field - low) / (high - low + 1e-6), rng, contrast=0.3), rng)
    return Pictures(images, labels.astype(np.int64), CLASSES)


def spectral(n: int, size: int, rng: np.random.Generator, exponent: float, squash: float = 1.0) -> Tensor:
    """Gaussian noise whose amplitude falls as frequency ** -exponent.

    Args:
        n: how many fields.
        size: side of a field.
        rng: source of the noise.
        exponent: 0 is white, 1 natural images, 2 clouds.
        squash: > 1 damps the frequencies of one random direction more, which draws streaks along it.

    Shape: (n, size, size), mean zero, standard deviation one.
    """
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    turn = uniform(rng, 0, torch.pi, n, 1, 1)
    along, across = fx * turn.cos() + fy * turn.sin(), fy * turn.cos() - fx * turn.sin()
    frequency = torch.sqrt((squash * along) ** 2 + across**2)
    frequency[:, 0, 0] = torch.inf if exponent else 1.0  # no constant part
    shaped = torch.fft.rfft2(normal(rng, n, size, size)) * frequency**-exponent
    field = torch.fft.irfft2(shaped, s=(size, size))
    centred: Tensor = field - field.mean((1, 2), keepdim=True)
    return centred / centred.std((1, 2), keepdim=True)


def _blobs(n: int, size: int, rng: np.random.Generator) -> Tensor:
    return torch.sigmoid(12 * (spectral(n, size, rng, 2.0) + uniform(rng, -0.5, 0.5, n, 1, 1)))


def _ridges(n: int, size: int, rng: np.random.Generator) -> Tensor:
    return -spectral(n, size, rng, 1.8).abs()


def _marble(n: int, size: int, rng: np.random.Generator) -> Tensor:
    return torch.sin(uniform(rng, 4, 8, n, 1, 1) * spectral(n, size, rng, 2.2))


def _nearest(n: int, size: int, rng: np.random.Generator) -> Tensor:
    """Distances from every pixel to its two nearest seeds: (n, 2, size, size)."""
    seeds = uniform(rng, 0, 1, n, int(rng.integers(8, 40)), 2)
    side = (torch.arange(size) + 0.5) / size
    pixels = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(1, -1, 2).expand(n, -1, -1)
    distances = torch.cdist(pixels, seeds)
    first, which = distances.min(-1)
    second = distances.scatter_(-1, which[..., None], torch.inf).amin(-1)
    return torch.stack([first, second], 1).view(n, 2, size, size)


def _cells(n: int, size: int, rng: np.random.Generator) -> Tensor:
    return _nearest(n, size, rng)[:, 0]


def _cracks(n: int, size: int, rng: np.random.Generator) -> Tensor:
    near = _nearest(n, size, rng)
    return ((near[:, 1] - near[:, 0]) * 12).clamp(max=1)


def _leaves(n: int, size: int, rng: np.random.Generator, disc: bool) -> Tensor:
    """Sixty discs, or squares, of random size and shade, each covering those before."""
    side = (torch.arange(size) + 0.5) / size
    field = uniform(rng, 0, 1, n, 1, 1).repeat(1, size, size)
    for _ in range(60):
        centre = uniform(rng, -0.1, 1.1, 2, n, 1, 1)
        # areas follow a power law, as those of objects in photographs do
        radius = 0.05 * uniform(rng, 0.03, 1, n, 1, 1) ** -0.6
        dx, dy = side - centre[0], side[:, None] - centre[1]
        inside = dx**2 + dy**2 < radius**2 if disc else (dx.abs() < radius) & (dy.abs() < radius)
        field = torch.where(inside, uniform(rng, 0, 1, n, 1, 1), field)
    return field


PROCESSES: dict[str, Callable[[int, int, np.random.Generator], Tensor]] = {
    "white": lambda n, size, rng: spectral(n, size, rng, 0.3),
    "pink": lambda n, size, rng: spectral(n, size, rng, 1.0),
    "brown": lambda n, size, rng: spectral(n, size, rng, 1.6),
    "clouds": lambda n, size, rng: spectral(n, size, rng, 2.5),
    "streaks": lambda n, size, rng: spectral(n, size, rng, 1.2, squash=5.0),
    "blobs": _blobs,
    "ridges": _ridges,
    "marble": _marble,
    "cells": _cells,
    "cracks": _cracks,
    "leaves": lambda n, size, rng: _leaves(n, size, rng, True),
    "slates": lambda n, size, rng: _leaves(n, size, rng, False),
}
CLASSES = tuple(PROCESSES)
