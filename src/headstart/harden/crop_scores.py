"""Scores of every crop of a picture that depend on nothing but the crop: fixed random filters, without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = {"edges": 3, "random": 2, "small": 5}
"""Name -> side of the smallest crop that it can score."""

WINDOW = SCORES["small"]
"""Side of the small filter."""

_DIRECT = 11  # longer filters are faster by FFT
_TIE = 1e-11  # of a score's largest possible size: above what FFT rounding moves, below what pictures differ by


def score_map(views: Tensor, size: int, score: str, *, seed: int = 0) -> Tensor:
    """The score of every crop in float64: views (n, c, H, W) -> (n, H - m + 1, W - m + 1).

    Args:
        views: real numbers; the filters see the mean of the channels.
        size: side m of the crops.
        score: one of `SCORES`, see `select_crop`.
        seed: of the filter.

    Cost: O(H W log(H W)) a view by FFT; 25 H W for the small filter.

    >>> score_map(torch.ones(2, 3, 8, 8), 6, "edges").shape
    torch.Size([2, 3, 3])
    """
    grey = views.double().mean(1)
    if score != "small":
        return _correlate(grey, _filter(size, seed, grey, edges=score == "edges"))
    edge = (size - WINDOW) // 2
    rows, columns = (side - size + 1 for side in grey.shape[1:])
    response = _correlate(grey, _filter(WINDOW, seed, grey)).abs()
    return response[:, edge : edge + rows, edge : edge + columns]


def rounding(views: Tensor, side: int) -> Tensor:
    """What two equal scores of each view may differ by, (n,): a share of the largest a filter of that side can give.

    Its |k|₂ is 1, so that |k|₁ <= side and no score is above side times the brightest pixel.
    """
    return _TIE * side * views.double().mean(1).abs().amax((1, 2))


def _filter(side: int, seed: int, like: Tensor, edges: bool = False) -> Tensor:
    inner = side - 2 if edges else side
    kernel = torch.randn(inner, inner, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if edges:
        cross = kernel.new_tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])
        kernel = F.conv2d(kernel[None, None], cross[None, None], padding=2)[0, 0]  # (side, side); its sum is 0
    else:
        kernel -= kernel.mean()
    unit: Tensor = kernel / kernel.norm()
    return unit.to(like)


def _correlate(grey: Tensor, kernel: Tensor) -> Tensor:
    """Valid cross-correlation: (n, H, W) with (k, k) -> (n, H - k + 1, W - k + 1)."""
    side = len(kernel)
    if side <= _DIRECT:
        return F.conv2d(grey[:, None], kernel[None, None])[:, 0]
    rows, columns = grey.shape[1:]  # circular, but what wraps round is cut off
    spectrum = torch.fft.rfft2(grey) * torch.fft.rfft2(kernel, s=(rows, columns)).conj()
    whole: Tensor = torch.fft.irfft2(spectrum, s=(rows, columns))
    return whole[:, : rows - side + 1, : columns - side + 1]
