"""How much models have in common at a point: whether their gradients agree, and how flat their loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient
from headstart.core.validate import finite, require


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether the gradients of k models point the same way.

    Attributes:
        cosines: (k, k) mean cosine of each pair where neither gradient is zero; 0 if that is at no example.
        silent: (k,) at how many examples a model's gradient is zero, so that it says nothing.
    """

    cosines: Tensor
    silent: Tensor

    @property
    def mean(self) -> float:
        """The mean over pairs of different models."""
        k = len(self.cosines)
        return float((self.cosines.sum() - self.cosines.diagonal().sum()) / (k * (k - 1)))


def agreement(goals: Sequence[Goal], x: Tensor) -> Agreement:
    """Cosines between the models' gradients with respect to the input, example by example.

    Args:
        goals: two or more, such as `[misclassify(model, y) for model in models]`.
        x: (n, ...) floats in [0, 1], changed or not.

    Cost: one forward and backward pass of every model.

    Notes: the mean leaves out each model's cosine with itself; the code of the common weakness attack averages it in,
    which makes 2 / 3 of two orthogonal gradients.

    Raises:
        Refused: fewer than two goals; x empty, not finite or outside [0, 1]; a gradient with NaN.

    Reference: Chen et al. 2024 (arXiv 2303.09105).

    >>> agreement([lambda x: x[:, 0], lambda x: x[:, 0] + x[:, 1]], torch.zeros(3, 2)).mean
    0.7071067...
    """
    require(len(goals) >= 2, "agreement needs two goals or more", len(goals), "Pass one for each model.")
    check_inputs(x)
    gradients = torch.stack([goal_gradient([goal], x) for goal in goals]).flatten(2).double()  # (k, n, d)
    finite("gradients", gradients, "Check the models for NaN.")
    lengths = gradients.norm(dim=2, keepdim=True)
    units = gradients / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    told = (lengths[..., 0] > 0).double()
    sums, pairs = torch.einsum("ind,jnd->ij", units, units), told @ told.T
    return Agreement(cosines=sums / pairs.clamp_min(1), silent=(told == 0).sum(1))


def sharpness(goals: Sequence[Goal], x: Tensor, *, radius: float, steps: int = 10) -> Tensor:
    """How much the mean of the goals can still rise near each example: small where the goals are flat.

    Args:
        goals: such as `[misclassify(model, y) for model in models]`.
        x: (n, ...) floats in [0, 1], changed or not.
        radius: of the neighbourhood, in the largest entry, in [0, 1] (a fifteenth of the perturbation's is usual).
        steps: >= 1, of the search.

    Returns:
        (n,) >= 0: a lower bound, which the search reached, and the exact value for linear goals.

    Cost: `steps` forward and backward passes and two forward passes of every model.

    Raises:
        Refused: no goals, steps or radius out of range; x empty, not finite or outside [0, 1].

    >>> sharpness([lambda x: x[:, 0] - 2 * x[:, 1]], torch.full((1, 2), 0.5), radius=0.1)
    tensor([0.3000])
    """
    require(steps >= 1, "sharpness needs steps >= 1", steps, "10 are usual.")
    moved = ascend(x, partial(goal_gradient, goals), ball=Ball(radius), steps=steps, step_size=2 * radius / steps)
    with torch.no_grad():
        before, after = (torch.stack([goal(at) for goal in goals]).mean(0) for at in (x, moved))
    return (after - before).clamp_min(0)
