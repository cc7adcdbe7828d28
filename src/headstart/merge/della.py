"""Merge fine-tuned models after dropping their changes by lot, small ones more often than large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import require
from headstart.core.weights import Weights, aligned, by_tensor

from .elect import Election, needs_base
from .sparsify import distinct, uniform

PAPER = Paper(
    title="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    authors="Deep et al.",
    year=2024,
    arxiv="2406.11617",
    code="https://github.com/declare-lab/della",
    departs="Where votes cancel, the sign that won most places of the tensor decides.",
)


@dataclass(frozen=True, kw_only=True)
class Della:
    """The start plus the changes of several models, each thinned by lot with better chances for larger entries.

    Within each row of a weight, keep probabilities rise linearly with the rank of the magnitude, from density - spread
    to density + spread; what is kept is divided by its probability.

    Args:
        density: mean share that is kept, in (0, 1].
        spread: half the range of the probabilities, >= 0 (mergekit's epsilon is 0.15), and such that they stay in
            (0, 1]. 0 drops as `Dare` does.
        scale: what the combined change is multiplied by, finite.
        weights: how much each model counts; None counts all alike.
        elect: "total" elects signs as the paper does; None adds the changes up.
        normalise: a mean of what agrees, as the paper has it, or a sum.
        rescale: divide what is kept by its probability.
        seed: of the lot; each model and tensor has its own, and copies of one tensor share it.

    Shape: state dicts of one architecture; a row is everything but the first dimension, a vector is one row.

    Use it when: `Dare` loses too much because it drops the largest changes as readily as the smallest.
    Not when: one wants the same model again without keeping the seed.

    Cost: one sort of each tensor; memory of one tensor of each model when streamed.

    Raises:
        Refused: no base, probabilities outside (0, 1], differing names or shapes, NaN.

    Reference: Deep et al. 2024, section 3.

    >>> base, model = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -9.0])}
    >>> Della(density=0.75, spread=0.25).merge([model], base=base)["w"][1].item()
    -9.0
    """

    density: float = 0.5
    spread: float = 0.15
    scale: float = 1.0
    weights: tuple[float, ...] | None = None
    elect: Literal["total", "count"] | None = "total"
    normalise: bool = True
    rescale: bool = True
    seed: int = 0
    scope: ClassVar[Literal["tensor", "model"]] = "model"
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        good = self.spread >= 0 and self.density - self.spread > 0 and self.density + self.spread <= 1
        require(good or (self.density == 1 and self.spread == 0), "Della needs 0 < density - spread, density + spread "
                "<= 1 and spread >= 0", (self.density, self.spread), "Pass 0.5 and 0.15, for example.")  # fmt: skip
        self.election()

    def election(self) -> Election:
        """How the thinned changes are combined."""
        return Election(
            elect=self.elect, combine="mean" if self.normalise else "sum", weights=self.weights, scale=self.scale
        )

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return self.survey(models, base=base, importance=importance).merge(models, base=base)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Sampled:
        """Finds the copies of tied weights."""
        base = needs_base("Della", base, importance)
        return Sampled(self, distinct(aligned(models, base), models, base))

    def thin(self, change: Tensor, key: str) -> Tensor:
        """One tensor's change with entries dropped by the lot of `key`."""
        rows = change.reshape(1, -1) if change.ndim < 2 else change.flatten(1)
        ranks = rows.abs().argsort(stable=True, dim=1).argsort(stable=True, dim=1)
        share = ranks.double() / max(rows.shape[1] - 1, 1) if rows.shape[1] > 1 else torch.full_like(rows, 0.5).double()
        chance = self.density + self.spread * (2 * share - 1)
        drawn = uniform(f"{self.seed} {key}", 0, change.numel()).view_as(rows).to(change.device)
        kept = (drawn < chance).double() / (chance if self.rescale else 1)
        return (rows * kept.to(rows.dtype)).view_as(change)


@dataclass(frozen=True)
class Sampled:
    """`Della` when it knows which tensors are copies of which."""

    rule: Della
    same: Mapping[str, str]
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric: ClassVar[bool] = False

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights of the tensors given."""

        def combine(name: str, stacked: Tensor, base: Tensor | None, _importance: Tensor | None) -> Tensor:
            assert base is not None
            changes = (self.rule.thin(row - base, f"{k} {self.same[name]}") for k, row in enumerate(stacked))
            merged = self.rule.election().change(changes, len(stacked), lambda sign, _: float(sign.sum().sign()))
            assert merged is not None
            return base + merged

        return by_tensor(combine, models, base)
