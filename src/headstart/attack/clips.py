"""Clips (n, c, t, h, w) and their gradients: backgrounds, and agreement over time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.ascent import Goal
from headstart.core.validate import finite, require


def mixed(x: Tensor, frames: Tensor, gamma: float) -> Tensor:
    """γ · x + (1 - γ) · frame, a frame (n or 1, c, h, w) for each clip or picture."""
    return gamma * x + (1 - gamma) * (frames if x.ndim == 4 else frames[:, :, None])


def smoothed(gradient: Tensor) -> Tensor:
    """Each frame's mean with the one before and the one after it (n, c, t, h, w); the outermost count twice."""
    wide = torch.cat([gradient[:, :, :1], gradient, gradient[:, :, -1:]], 2)
    return (wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]) / 3


def inconsistency(gradient: Tensor) -> Tensor:
    """How much adjacent frames of a gradient (n, c, t, h, w) disagree: the sum of 1 - cosine (n,), from 0 to 2 (t - 1).

    >>> inconsistency(torch.tensor([1.0, -1.0, -3.0]).view(1, 1, 3, 1, 1))
    tensor([2.])
    """
    frames = gradient.transpose(1, 2).flatten(2)  # (n, t, c h w)
    largest = frames.detach().abs().amax(2, keepdim=True).clamp_min(torch.finfo(frames.dtype).tiny)  # a zero frame
    frames = frames / largest  # confident models have gradients of 1e-10, which the guard of the cosine would cut
    return (1 - F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=2)).sum(1)


def consistent_gradient(goals: Sequence[Goal], a: Tensor, strength: float) -> Tensor:
    """Gradient at `a` of the goals' mean minus `strength` times the `inconsistency` of that mean's own gradient."""
    with torch.enable_grad():
        point = a.detach().requires_grad_()
        total = torch.stack([goal(point).sum() for goal in goals]).mean()
        g = torch.autograd.grad(total, point, create_graph=True)[0]
        away = inconsistency(g).sum()
        if not away.requires_grad:  # a linear goal
            return g
        turn = torch.autograd.grad(away, point, allow_unused=True, materialize_grads=True)[0]
    return (g - strength * turn).detach()


def median_background(clips: Tensor) -> Tensor:
    """What stands still in each clip: the median over time, (n, c, t, h, w) -> (n, c, h, w)."""
    require(clips.ndim == 5 and clips.shape[2] > 0, "median_background needs clips (n, c, t, h, w)",
            tuple(clips.shape), "Give each clip an axis of time.")  # fmt: skip
    finite("clips", clips)
    ordered, t = clips.sort(2).values, clips.shape[2]
    return (ordered[:, :, (t - 1) // 2] + ordered[:, :, t // 2]) / 2
