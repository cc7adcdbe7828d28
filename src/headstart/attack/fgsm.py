"""Fast gradient sign attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient
from headstart.core.paper import Paper

PAPER = Paper(
    title="Explaining and Harnessing Adversarial Examples",
    authors="Ian J. Goodfellow and Jonathon Shlens and Christian Szegedy",
    year=2015,
    arxiv="1412.6572",
)


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Inputs changed by `radius` in one step along the sign of the surrogates' gradient.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 0.25 for MNIST).
        norm: "linf" or "l2" (the step then has the gradient's direction).

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: a first look at robustness must be cheap, or the model is close to linear.
    Not when: robustness is to be stated: see `PGD`, which finds the worse points that one step misses.

    Cost: one forward and backward pass of every surrogate.

    Raises:
        Refused: a radius out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Goodfellow et al. 2015, section 4.

    >>> import torch
    >>> FGSM(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        Ball(self.radius, self.norm)

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        ball = Ball(self.radius, self.norm)
        return ascend(x, partial(goal_gradient, goals), ball=ball, steps=1, step_size=self.radius)
