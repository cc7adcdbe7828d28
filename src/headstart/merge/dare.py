"""Merge fine-tuned models after dropping most of each change at random and enlarging the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import require
from headstart.core.weights import Weights, aligned, by_entry

from .elect import Election, Thinned, needs_base
from .sparsify import distinct, uniform

PAPER = Paper(
    title="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    authors="Yu et al.",
    year=2023,
    arxiv="2311.03099",
    code="https://github.com/yule-BUAA/MergeLM",
)


@dataclass(frozen=True, kw_only=True)
class Dare:
    """The start plus the changes of several models, each with most entries dropped by lot so that they collide less.

    What is kept is divided by the share that is kept, so each change stays what it was on average.

    Args:
        density: share of its entries that each change keeps, in (0, 1]; the paper drops 90 % (0.1) and more.
        scale: what the combined change is multiplied by, finite.
        weights: how much each model counts; None counts all alike.
        elect: None adds the changes up; "total" elects signs first, as `Ties`, and combines what agrees.
        normalise: a mean instead of a sum.
        rescale: divide what is kept by `density`.
        seed: of the lot; each model and tensor has its own, and copies of one tensor share it.

    Shape: state dicts of one architecture; integer tensors are copied from `base`.

    Use it when: large models were fine-tuned briefly from one start, so that changes are small and redundant.
    Not when: the models are small or moved far: at density 0.1 what is kept is ten times too large where it stands.

    Cost: one pass and one random number an entry; memory of one part of a model when streamed.

    Raises:
        Refused: no base, a density outside (0, 1], differing names or shapes, NaN.

    Reference: Yu et al. 2023, section 3.2.

    >>> import torch
    >>> base, model = {"w": torch.zeros(8)}, {"w": torch.ones(8)}
    >>> sorted(set(Dare(density=0.5).merge([model], base=base)["w"].tolist()))
    [0.0, 2.0]
    """

    density: float = 0.1
    scale: float = 1.0
    weights: tuple[float, ...] | None = None
    elect: Literal["total", "count"] | None = None
    normalise: bool = False
    rescale: bool = True
    seed: int = 0
    scope: ClassVar[Literal["tensor", "model"]] = "model"
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "Dare needs 0 < density <= 1", self.density, "Pass a fraction such as 0.1.")
        self._election()

    def _election(self) -> Election:
        return Election(
            elect=self.elect, combine="mean" if self.normalise else "sum", weights=self.weights, scale=self.scale
        )

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return by_entry(self, models, base, importance)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Thinned:
        """Finds the copies of tied weights."""
        base = needs_base("Dare", base, importance)
        same = distinct(aligned(models, base), models, base)

        def thin(name: str, k: int, change: Tensor, start: int) -> Tensor:
            kept = uniform(f"{self.seed} {k} {same[name]}", start, len(change)) < self.density
            return change * (kept.to(change.device, change.dtype) / (self.density if self.rescale else 1))

        return Thinned(self._election(), thin, len(models), [list(same)], same)
