"""Perturbations from surrogates that were sampled in one training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient
from headstart.core.paper import Paper
from headstart.core.validate import require

PAPER = Paper(
    title="Efficient and Transferable Adversarial Examples from Bayesian Neural Networks",
    authors="Martin Gubri and Maxime Cordy and Mike Papadakis and Yves Le Traon and Koushik Sen",
    year=2022,
    arxiv="2011.05074",
    code="https://github.com/Framartin/transferable-bnn-adv-ex",
    departs="Noise is set by a temperature, and samples without skill are dropped.",
)


@dataclass(frozen=True, kw_only=True)
class BNNSurrogate:
    """Inputs changed by at most `radius` so that other models err, at one model's price a step however many there are.

    Step t follows the gradient of the goals order[t · per_step], ..., the order one seeded shuffle that repeats.

    Args:
        radius: of the ball, in units of x in [0, 1] (paper: 4 / 255; in the l2 norm 0.5 on CIFAR-10, 3 on ImageNet).
        steps: >= 0 (paper: 50); fewer than there are goals leave some goals out.
        step_size: > 0; by default radius / 10 (paper).
        decay: momentum, >= 0 (paper: 0, or 0.9).
        norm: "linf" or "l2".
        per_step: >= 1, goals a step, their gradients averaged (paper, light: 1).
        seed: of the shuffle.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,).

    Use it when: there are many surrogates of one task, such as the samples of `CSGLD` or draws of `SWAG`.
    Not when: there are few: `MIFGSM` on `fused` ones sees all at each step (the paper's full variant) and carries over
        a little better.

    Cost: `steps · per_step` forward and backward passes of one surrogate.

    Notes: several architectures take turns together if goal t is `fused` from the t-th sample of each. A model that is
    judged with the result must not be among the surrogates.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Gubri et al. 2022, the light variant.

    >>> goals = [lambda x: x[:, 0], lambda x: x[:, 1]]
    >>> BNNSurrogate(radius=0.1, steps=20).perturb(torch.full((1, 2), 0.5), goals)
    tensor([[0.6000, 0.6000]])
    """

    radius: float = 4 / 255
    steps: int = 50
    step_size: float | None = None
    decay: float = 0.0
    norm: Literal["linf", "l2"] = "linf"
    per_step: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        Ball(self.radius, self.norm)
        require(self.steps >= 0, "BNNSurrogate needs steps >= 0", self.steps, "The paper uses 50.")
        require(self.step_size is None or 0 < self.step_size < math.inf, "BNNSurrogate needs a finite step_size > 0",
                self.step_size, "Leave it out for radius / 10.")  # fmt: skip
        require(0 <= self.decay < math.inf, "BNNSurrogate needs a finite decay >= 0", self.decay, "Leave it at 0.")
        require(self.per_step >= 1, "BNNSurrogate needs per_step >= 1", self.per_step, "The paper uses 1.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        require(bool(goals), "An attack needs at least one goal", "none", "Pass one goal for each surrogate model.")
        order = torch.randperm(len(goals), generator=torch.Generator().manual_seed(self.seed)).tolist()
        width, turn = min(self.per_step, len(goals)), count()

        def gradient(a: Tensor) -> Tensor:
            first = next(turn) * width
            return goal_gradient([goals[order[(first + k) % len(order)]] for k in range(width)], a)

        return ascend(
            x,
            gradient,
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.radius / 10 if self.step_size is None else self.step_size,
            decay=self.decay,
        )


def sound(models: Iterable[nn.Module], x: Tensor, y: Tensor, *, share: float = 0.8) -> list[nn.Module]:
    """The models whose accuracy is at least `share` of the best one's; the others would only dilute the gradient.

    A rate that is too high spoils samples of one cycle silently, and averages over all of them hide it.

    Args:
        models: samples, in eval mode.
        x: validation inputs (n, ...).
        y: their labels (n,).
        share: in [0, 1].

    Cost: one forward pass of each model.

    Raises:
        Refused: no models, no examples, or none better than always naming the most frequent class.

    >>> y = torch.tensor([0, 1])
    >>> right, wrong = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> _ = right.weight.data.copy_(torch.eye(2)), wrong.weight.data.copy_(-torch.eye(2))
    >>> len(sound([right, wrong], torch.eye(2), y))
    1
    """
    require(0 <= share <= 1, "sound needs 0 <= share <= 1", share, "The default is 0.8.")
    require(len(x) == len(y) > 0, "sound needs one label for each example", (len(x), len(y)), "Pass validation data.")
    kept = list(models)
    require(bool(kept), "sound needs at least one model", "none", "Pass the samples of a run.")
    with torch.no_grad():
        right = [int((model(x).argmax(1) == y).sum()) for model in kept]
    most, chance = max(right), int(y.bincount().max())
    require(most > chance or chance == len(y), "A sample must beat the most frequent class",
            f"{most} right answers against {chance}", "Lower the learning rate, or train longer.")  # fmt: skip
    return [model for model, r in zip(kept, right, strict=True) if r >= share * most]


def deep_ensemble_equivalent(success: float, ensembles: Mapping[int, float]) -> float:
    """How many independently trained models fool as often: T-DEE, between two sizes by a straight line.

    Args:
        success: rate of the surrogates that are judged, in [0, 1].
        ensembles: size of an ensemble -> its rate; sizes >= 1. No models have rate 0.

    Returns:
        the smallest number that reaches the rate; infinity where even the largest ensemble does not.

    Raises:
        Refused: no ensembles, or a number out of range.

    Reference: Gubri et al. 2022.

    >>> deep_ensemble_equivalent(0.9, {1: 0.6, 2: 0.8, 4: 1.0})
    3.0
    """
    require(bool(ensembles) and min(ensembles) >= 1, "T-DEE needs ensembles of one model or more", sorted(ensembles),
            "Pass {size: rate}.")  # fmt: skip
    rates = [success, *ensembles.values()]
    require(all(0 <= rate <= 1 for rate in rates), "Rates must lie in [0, 1]", rates, "Divide by 100.")
    size, rate = 0, 0.0
    for larger, higher in sorted(ensembles.items()):
        if success <= rate:
            return float(size)
        if success <= higher:
            return size + (larger - size) * (success - rate) / (higher - rate)
        size, rate = larger, higher
    return float(size) if success <= rate else math.inf
