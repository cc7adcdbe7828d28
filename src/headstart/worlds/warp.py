"""Random geometry: each picture is seen through its own affine map and smooth distortion."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import normal, uniform


def warp(
    images: Tensor,
    rng: np.random.Generator,
    *,
    size: int,
    rotate: float = 0.0,
    shear: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    stretch: float = 0.0,
    shift: float = 0.0,
    elastic: float = 0.0,
) -> Tensor:
    """Every image under a random affine map followed by a smooth random displacement.

    Args:
        images: (n, channels, H, W).
        rng: source of the maps.
        size: side of the result.
        rotate: largest angle, in degrees.
        shear: largest horizontal shear.
        scale: range of the magnification; 1 keeps the frame, 0.5 halves the object.
        stretch: largest log2 of width over height.
        shift: largest shift, as a share of half the frame.
        elastic: standard deviation of the displacement of a 4x4 lattice, as a share of half the frame.

    Shape: (n, channels, H, W) -> (n, channels, size, size); outside the frame the border repeats.
    """
    n = len(images)
    angle = uniform(rng, -rotate, rotate, n) * (np.pi / 180)
    zoom = uniform(rng, *scale, n)
    aspect = torch.exp2(uniform(rng, -stretch, stretch, n) / 2)
    lean = uniform(rng, -shear, shear, n)
    offset = uniform(rng, -shift, shift, n, 2)
    cos, sin = angle.cos(), angle.sin()
    # from output coordinates to input coordinates, hence the inverse of zoom and aspect
    wide, high = 1 / (zoom * aspect), aspect / zoom
    first = torch.stack([wide * cos + lean * sin, -wide * sin + lean * cos, offset[:, 0]], -1)
    second = torch.stack([high * sin, high * cos, offset[:, 1]], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), [n, 1, size, size], align_corners=False)
    if elastic:
        lattice = elastic * normal(rng, n, 2, 4, 4)
        grid = grid + F.interpolate(lattice, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def signed_distance(ink: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the outline of a drawing, positive inside; float32, in pixels."""
    from scipy.ndimage import distance_transform_edt

    distance: np.ndarray = distance_transform_edt(ink) - distance_transform_edt(~ink)
    return distance.astype(np.float32)
