"""Scale-invariant attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, gradients_at
from headstart.core.paper import Paper
from headstart.core.validate import require

from .settings import check

PAPER = Paper(
    title="Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks",
    authors="Jiadong Lin and Chuanbiao Song and Kun He and Liwei Wang and John E. Hopcroft",
    year=2020,
    arxiv="1908.06281",
    code="https://github.com/JHL-HUST/SI-NI-FGSM",
)


@dataclass(frozen=True, kw_only=True)
class SIFGSM:
    """Inputs changed by at most `radius` so that other models err, by gradients averaged over darker copies.

    As `MIFGSM` with ∇ = mean over i of ∇ₐ goal(a / 2ⁱ), i = 0 ... scales - 1: what a model says should hardly depend on
    brightness, so copies act like several surrogates. With `look_ahead` it is SI-NI-FGSM.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1).
        norm: "linf" or "l2".
        scales: >= 1 (paper: 5); 1 is `MIFGSM`, or with `look_ahead` `NIFGSM`.
        look_ahead: take the copies of the point where the momentum leads, as in `NIFGSM` (paper).
        at_once: >= 1, how many copies share a pass; by default as many as make 128 examples, at least one.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: there is one surrogate for pictures, and five times the price of `MIFGSM` is no matter.
    Not when: 0 is not the colour of darkness, as in tables: the copies then mean something else.

    Cost: `steps · scales` forward and backward passes of every surrogate.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Lin et al. 2020, equation 8 and algorithm 1.

    >>> SIFGSM(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    scales: int = 5
    look_ahead: bool = False
    at_once: int | None = None

    def __post_init__(self) -> None:
        check(self, self.decay)
        require(1 <= self.scales <= 64, "SIFGSM needs 1 <= scales <= 64", self.scales, "The paper uses 5.")
        require(self.at_once is None or self.at_once >= 1, "SIFGSM needs at_once >= 1", self.at_once, "Leave it out.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        shares = [0.5**k for k in range(self.scales)]

        def gradient(a: Tensor, ahead: Tensor | None = None) -> Tensor:
            here = a if ahead is None else ahead
            found = gradients_at(goals, torch.stack([share * here for share in shares]), at_once=self.at_once)
            return torch.stack([share * g for share, g in zip(shares, found, strict=True)]).mean(0)

        return ascend(
            x,
            gradient,
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
            look_ahead=self.look_ahead,
        )
