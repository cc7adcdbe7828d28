"""A random part of each picture, enlarged to the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def boxes(draws: Sequence[Generator], share: tuple[float, float], aspect: float = 4 / 3) -> Tensor:
    """One random box for each generator, as (left, top, width, height) in shares of a picture's sides, (n, 4) float64.

    Args:
        draws: one for each picture.
        share: the smallest and largest area, in (0, 1]; drawn uniformly.
        aspect: the largest ratio of relative width to height or back, >= 1, as far as the box fits into the picture.
    """
    found = []
    for generator in draws:
        size, form, left, top = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = share[0] + (share[1] - share[0]) * size
        log = (2 * form - 1) * min(math.log(aspect), -math.log(area))  # no side longer than the picture's
        width, height = math.sqrt(area * math.exp(log)), math.sqrt(area * math.exp(-log))
        found.append([left * (1 - width), top * (1 - height), width, height])
    return torch.tensor(found, dtype=torch.float64)


def cropped(x: Tensor, box: Tensor) -> Tensor:
    """Each picture's box (n, 4) of pictures (n, c, h, w) at the size of the whole, bilinear and differentiable."""
    left, top, width, height = box.unbind(1)
    zero = torch.zeros_like(left)
    across = torch.stack([width, zero, 2 * left + width - 1], 1)  # grids run from -1 to 1
    down = torch.stack([zero, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
