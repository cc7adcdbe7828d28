"""Merge two models along the arc between them instead of the chord."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import require
from headstart.core.weights import Weights, by_tensor

PAPER = Paper(
    title="Animating rotation with quaternion curves",
    authors="Ken Shoemake",
    year=1985,
    departs="Tensors of a model take the place of unit quaternions; each is turned as one vector, its length carried "
    "along by the same coefficients.",
)


@dataclass(frozen=True, kw_only=True)
class Slerp:
    """One model between two, whose weights keep their size where an average would shrink them.

    Each tensor of the two, as a vector, is turned from the first towards the second by a share of the angle between.

    Args:
        towards: how far to go from the first model (0) to the second (1), in [0, 1].

    Shape: two state dicts of one architecture; integer tensors are copied from `base`, else from the first model.

    Use it when: two models are far apart, so that averaging them shrinks their weights.
    Not when: they are fine-tunes of one start: there the arc and the chord are the same.

    Cost: one pass; memory of one tensor of each model when streamed.

    Notes: tensors within 1.8 degrees of one line (a cosine beyond 0.9995), and those of zeros, are averaged.

    Raises:
        Refused: not two models, `towards` outside [0, 1], differing names or shapes, NaN.

    Reference: Shoemake 1985, section 3.3.

    >>> one, two = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    >>> Slerp().merge([one, two])
    {'w': tensor([0.7071, 0.7071])}
    """

    towards: float = 0.5
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"

    def __post_init__(self) -> None:
        require(0 <= self.towards <= 1, "Slerp needs 0 <= towards <= 1", self.towards, "Pass a share such as 0.5.")

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return self.towards == 0.5

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; tensor by tensor, so it streams."""
        require(len(models) == 2, "Slerp goes from one model to another", f"{len(models)} models", "Pass two.")
        require(importance is None, "Slerp weighs whole models", "importance=", "Leave it out.")

        def arc(_name: str, stacked: Tensor, _base: Tensor | None, _importance: Tensor | None) -> Tensor:
            one, two = stacked.double()
            lengths = one.norm() * two.norm()
            cosine = torch.where(lengths > 0, (one * two).sum() / lengths.clamp_min(torch.finfo(torch.float64).tiny), 1)
            if float(cosine.abs()) > 0.9995:
                return torch.lerp(one, two, self.towards)
            angle = cosine.acos()
            near, far = ((1 - self.towards) * angle).sin(), (self.towards * angle).sin()
            turned: Tensor = (near * one + far * two) / angle.sin()
            return turned

        return by_tensor(arc, models, base)
