"""Nesterov iterative attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient
from headstart.core.paper import Paper

from .settings import check

PAPER = Paper(
    title="Nesterov Accelerated Gradient and Scale Invariance for Adversarial Attacks",
    authors="Jiadong Lin and Chuanbiao Song and Kun He and Liwei Wang and John E. Hopcroft",
    year=2020,
    arxiv="1908.06281",
    code="https://github.com/JHL-HUST/SI-NI-FGSM",
)


@dataclass(frozen=True, kw_only=True)
class NIFGSM:
    """Inputs changed by at most `radius` so that models other than the surrogates err too, steps that look ahead.

    As `MIFGSM`, but the gradient is taken where the momentum alone would lead, a + step_size · decay · g, so that a
    step corrects the momentum before it overshoots.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1); 0 is the iterative attack without momentum.
        norm: "linf" or "l2"; in l2 the look-ahead has g / √d in place of g, about as long as a step.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: `MIFGSM` would be used; it often carries over a little better for the same price.
    Not when: steps are few: with one step it is `FGSM`.

    Cost: `steps` forward and backward passes of every surrogate.

    Notes: the point ahead may lie outside the ball and outside [0, 1], as published; the result never does.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Lin et al. 2020, algorithm 1 without its scales; with them see `SIFGSM`.

    >>> import torch
    >>> NIFGSM(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        check(self, self.decay)

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        return ascend(
            x,
            lambda _, ahead: goal_gradient(goals, ahead),
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
            look_ahead=True,
        )
