"""Whether two models are linearly connected: how much the loss rises on the straight line between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.validate import require
from headstart.core.weights import Weights, by_tensor


@dataclass(frozen=True)
class Connectivity:
    """The loss along the line from one model to another.

    Attributes:
        positions: share of the second model, from 0 to 1.
        losses: at each position.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def excess(self) -> tuple[float, ...]:
        """At each position, the loss above the line between the two ends."""
        first, last = self.losses[0], self.losses[-1]
        return tuple(loss - ((1 - a) * first + a * last) for a, loss in zip(self.positions, self.losses, strict=True))

    @property
    def barrier(self) -> float:
        """The largest excess, >= 0: near 0, the models can be averaged and their fine-tunings exchanged."""
        return max(0.0, *self.excess)


def connectivity(
    model_a: Weights, model_b: Weights, loss: Callable[[Weights], float], points: int = 11
) -> Connectivity:
    """The loss of `points` models evenly spaced on the line between two.

    Args:
        model_a, model_b: weights of one architecture. Integer tensors on the line are those of `model_a`.
        loss: weights -> mean loss (or anything else of which less is better, such as the error).
        points: >= 3, both ends included.

    Cost: `points` evaluations, and memory of one more model.

    Notes: running statistics are interpolated too; where a model has them, let `loss` estimate them anew.

    Raises:
        Refused: points < 3, differing names or shapes, NaN in a model or in the loss.

    Reference: Frankle et al. 2020 (arXiv 1912.05671), section 2.

    >>> ends = {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}
    >>> connectivity(*ends, lambda weights: float((weights["w"] ** 2 - 1) ** 2), points=3)
    Connectivity(positions=(0.0, 0.5, 1.0), losses=(0.0, 1.0, 0.0))
    """
    require(points >= 3, "connectivity needs points >= 3", points, "Pass a number such as 11.")
    positions = tuple(k / (points - 1) for k in range(points))
    losses = tuple(float(loss(_between(model_a, model_b, a))) for a in positions)
    bad = [a for a, value in zip(positions, losses, strict=True) if not math.isfinite(value)]
    require(not bad, "The loss must be finite between two models", f"NaN or infinity at {bad}",
            "Use a loss that is finite for confident errors.")  # fmt: skip
    return Connectivity(positions, losses)


def _between(model_a: Weights, model_b: Weights, a: float) -> dict[str, Tensor]:
    def mixed(_name: str, stacked: Tensor, _base: Tensor | None, _importance: Tensor | None) -> Tensor:
        return torch.lerp(stacked[0].double(), stacked[1].double(), a)

    return by_tensor(mixed, [model_a, model_b])
