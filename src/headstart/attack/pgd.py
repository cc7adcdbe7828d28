"""Projected gradient attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient
from headstart.core.paper import Paper

from .draws import generators, noise
from .settings import check

PAPER = Paper(
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    authors="Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu",
    year=2018,
    arxiv="1706.06083",
    code="https://github.com/MadryLab/mnist_challenge",
    departs="The start of each example follows from the seed and its number, whatever batch it is in.",
)


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Inputs changed by at most `radius` to a point near the worst for the surrogates, from a random start.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 8 / 255 for CIFAR-10, 0.3 for MNIST).
        steps: >= 0 (paper: 7 to 40); 0 returns the start.
        step_size: in (0, 1]; by default 2.5 · radius / steps, which crosses the ball from any start (paper: 2 / 255).
        norm: "linf" or "l2".
        random_start: False starts at x: the iterative attack BIM (Kurakin et al. 2017, arXiv 1607.02533).
        seed: of the start.
        first: number of x's first example in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: asking what the worst is that small changes can do to a model whose gradient is known.
    Not when: errors should carry over to other models: it fits its surrogate too closely; see `MIFGSM`.

    Cost: `steps` forward and backward passes of every surrogate.

    Notes: the start is uniform in the linf ball; in l2 it has a random direction and a uniform length.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Madry et al. 2018, section 2.1.

    >>> import torch
    >>> PGD(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    random_start: bool = True
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self)

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        ball, start = Ball(self.radius, self.norm), None
        if self.random_start:
            start = x + noise(x, ball, generators(self.seed, self.first, len(x)), copies=1)[0]
        return ascend(
            x,
            partial(goal_gradient, goals),
            ball=ball,
            steps=self.steps,
            step_size=self.step_size or 2.5 * self.radius / max(self.steps, 1),
            start=start,
        )
