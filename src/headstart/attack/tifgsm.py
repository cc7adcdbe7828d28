"""Translation-invariant attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient
from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .settings import check

PAPER = Paper(
    title="Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks",
    authors="Yinpeng Dong and Tianyu Pang and Hang Su and Jun Zhu",
    year=2019,
    arxiv="1904.02884",
    code="https://github.com/dongyp13/Translation-Invariant-Attacks",
)


@dataclass(frozen=True, kw_only=True)
class TIFGSM:
    """Pictures changed by at most `radius` so that models which look elsewhere err too, by smoothed gradients.

    As `MIFGSM` with ∇ ← W * ∇ for each channel before it is normalised: to first order, the mean gradient of the
    shifted pictures, at the price of one.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1 for TI-MI-FGSM); 0 is TI-FGSM.
        norm: "linf" or "l2".
        kernel: "gaussian" (paper: best), three standard deviations wide to each side; "linear" or "uniform".
        size: of the kernel in pixels, odd (paper: 15 for 299 pixels; 5 for 8); 1 is `MIFGSM`.

    Shape: x (n, c, h, w) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: the other models were trained to resist, and look at other regions than the surrogates.
    Not when: they were trained plainly: it then carries over less than `MIFGSM`, more so the larger the kernel.

    Cost: `steps` forward and backward passes of every surrogate; smoothing is 2 · size products a number.

    Notes: beyond the edge the gradient counts as zero.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Dong et al. 2019, equations 7 and 9.

    >>> TIFGSM(radius=0.1, size=3).perturb(torch.full((1, 1, 2, 2), 0.5), [lambda x: x[:, 0, 0, 0]]).unique()
    tensor([0.6000])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    kernel: Literal["gaussian", "linear", "uniform"] = "gaussian"
    size: int = 15

    def __post_init__(self) -> None:
        check(self, self.decay)
        one_of("kernel", self.kernel, ["gaussian", "linear", "uniform"])
        require(self.size >= 1 and self.size % 2 == 1, "TIFGSM needs an odd size >= 1", self.size, "Pass 5 or 15.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        require(x.ndim == 4, "TIFGSM needs pictures (n, c, h, w)", tuple(x.shape), "Give each channel an axis.")
        window = profile(self.kernel, self.size).to(x)
        return ascend(
            x,
            lambda a: smoothed(goal_gradient(goals, a), window),
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
        )


def profile(kernel: str, size: int) -> Tensor:
    """The window (size,), float64, of sum 1; the kernel is its outer product with itself."""
    at = torch.linspace(-1, 1, size, dtype=torch.float64) if size > 1 else torch.zeros(1, dtype=torch.float64)
    height = {
        "gaussian": (-((3 * at) ** 2) / 2).exp(),
        "linear": 1 - at.abs() * (size - 1) / (size + 1),
        "uniform": torch.ones_like(at),
    }[kernel]
    return height / math.fsum(height.tolist())


def smoothed(pictures: Tensor, window: Tensor) -> Tensor:
    """Every channel of (n, c, h, w) convolved with the window along both axes; zero beyond the edge."""
    planes, half = pictures.flatten(0, 1)[:, None], len(window) // 2
    planes = F.conv2d(planes, window.view(1, 1, -1, 1), padding=(half, 0))
    return F.conv2d(planes, window.view(1, 1, 1, -1), padding=(0, half)).view_as(pictures)
