"""Variance-tuned attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, gradients_at
from headstart.core.paper import Paper
from headstart.core.validate import require

from .draws import generators, noise
from .settings import check

PAPER = Paper(
    title="Enhancing the Transferability of Adversarial Attacks through Variance Tuning",
    authors="Xiaosen Wang and Kun He",
    year=2021,
    arxiv="2103.15571",
    code="https://github.com/JHL-HUST/VT",
    departs="Neighbours of each example follow from the seed and its number; in l2 they lie in a ball, not a cube.",
)


@dataclass(frozen=True, kw_only=True)
class VMIFGSM:
    """Inputs changed by at most `radius` so that other models err too, by gradients tuned by those of neighbours.

    As `MIFGSM` with ∇ + v in place of ∇, where v is by how much the mean gradient of random neighbours differed from
    the point's own one step before. With `look_ahead` it is VNI-FGSM.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1).
        norm: "linf" or "l2" (a neighbour then has a random direction and a uniform length).
        neighbours: >= 1 (paper: 20).
        beta: how far neighbours lie, in radii, >= 0 (paper: 1.5); 0 is `MIFGSM`.
        look_ahead: take the gradient where the momentum leads, as in `NIFGSM`; neighbours stay around the point.
        at_once: >= 1, how many points share a pass; by default as many as make 128 examples, at least one.
        seed: of the neighbours, which are a function of it, the step and the example's number alone.
        first: number of x's first example in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: there is one surrogate, and the price of twenty passes a step is no matter.
    Not when: passes are dear: `DIFGSM` carries over as well for one pass a step.

    Cost: `steps · (neighbours + 1)` forward and backward passes of every surrogate, less `neighbours` in the last step.

    Notes: neighbours may lie outside the ball and outside [0, 1], as published; the result never does.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Wang and He 2021, algorithm 1.

    >>> VMIFGSM(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    neighbours: int = 20
    beta: float = 1.5
    look_ahead: bool = False
    at_once: int | None = None
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self, self.decay)
        require(self.neighbours >= 1, "VMIFGSM needs neighbours >= 1", self.neighbours, "The paper uses 20.")
        require(0 <= self.beta < 1000, "VMIFGSM needs 0 <= beta < 1000", self.beta, "The paper uses 1.5.")
        require(self.at_once is None or self.at_once >= 1, "VMIFGSM needs at_once >= 1", self.at_once, "Leave it out.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        ball, draws, turn = Ball(self.radius, self.norm), generators(self.seed, self.first, len(x)), count(1)
        variance = torch.zeros_like(x)

        def gradient(a: Tensor, ahead: Tensor | None = None) -> Tensor:
            nonlocal variance
            points = (a if ahead is None else ahead)[None]
            if next(turn) < self.steps:  # the last step has no successor to tune
                away = noise(x, ball, draws, copies=self.neighbours, times=self.beta)
                points = torch.cat([points, a + away])
            found = gradients_at(goals, points, at_once=self.at_once)
            tuned: Tensor = found[0] + variance
            if len(found) > 1:
                variance = found[1:].mean(0) - found[0]
            return tuned

        return ascend(
            x,
            gradient,
            ball=ball,
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
            look_ahead=self.look_ahead,
        )
