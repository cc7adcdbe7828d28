"""Merge fine-tuned models without the smallest and without the very largest of their changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, aligned, by_entry

from .elect import Election, Thinned, needs_base
from .sparsify import distinct, grouped, keep_largest

PAPER = Paper(
    title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    authors="Davari and Belilovsky",
    year=2023,
    arxiv="2312.06795",
    code="https://github.com/rezazzr/breadcrumbs",
    departs="Says which share is kept (density) where the paper says which share is masked.",
)


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs:
    """The start plus the changes of several models, of which each tensor keeps the middle of its magnitudes.

    The smallest changes are noise and the few largest overrule the other models: both are dropped.

    Args:
        density: share of its entries that each change keeps, in (0, 1].
        outliers: share that is dropped at the top, >= 0; density + outliers <= 1. mergekit's gamma is 0.01.
        scale: what the combined change is multiplied by, finite.
        weights: how much each model counts; None counts all alike.
        elect: None adds the changes up, as the paper does; "total" elects signs first, as `Ties`.
        normalise: a mean instead of a sum.
        trim: "tensor" ranks each tensor by itself, as the paper does; "model" all together.

    Shape: state dicts of one architecture; integer tensors are copied from `base`.

    Use it when: many models are merged and one scale must do for any number of them.
    Not when: there are two models: `Ties` or `TaskArithmetic` lose less.

    Cost: two or three passes, as `Ties`; memory of one part of a model when streamed.

    Notes: a tensor too small to have an outlier loses none, and keeps at least one entry.

    Raises:
        Refused: no base, shares that leave nothing or pass 1, differing names or shapes, NaN.

    Reference: Davari and Belilovsky 2023, section 3.

    >>> import torch
    >>> base, model = {"w": torch.zeros(5)}, {"w": torch.tensor([9.0, 0.1, -2.0, 0.2, 1.0])}
    >>> Breadcrumbs(density=0.4, outliers=0.2).merge([model], base=base)
    {'w': tensor([ 0.,  0., -2.,  0.,  1.])}
    """

    density: float = 0.1
    outliers: float = 0.01
    scale: float = 1.0
    weights: tuple[float, ...] | None = None
    elect: Literal["total", "count"] | None = None
    normalise: bool = False
    trim: Literal["tensor", "model"] = "tensor"
    scope: ClassVar[Literal["tensor", "model"]] = "model"

    def __post_init__(self) -> None:
        good = 0 < self.density <= 1 and self.outliers >= 0 and self.density + self.outliers <= 1
        require(good, "Breadcrumbs needs density > 0 and outliers >= 0, together at most 1",
                (self.density, self.outliers), "Pass fractions such as 0.1 and 0.01.")  # fmt: skip
        one_of("trim", self.trim, ["model", "tensor"])
        self._election()

    def _election(self) -> Election:
        return Election(
            elect=self.elect, combine="mean" if self.normalise else "sum", weights=self.weights, scale=self.scale
        )

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return self._election().symmetric

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return by_entry(self, models, base, importance)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Thinned:
        """What is kept and what is an outlier."""
        base = needs_base("Breadcrumbs", base, importance)
        same = distinct(aligned(models, base), models, base)
        groups = grouped(same, base, self.trim)

        def most(entries: int) -> int:
            return int(self.outliers * entries)

        def all_kept(entries: int) -> list[int]:
            return [most(entries) + max(1, int(self.density * entries))] * len(models)

        upper = keep_largest(groups, same, models, base, all_kept)
        outliers = keep_largest(groups, same, models, base, lambda entries: [most(entries)] * len(models))

        def thin(name: str, k: int, change: Tensor, start: int) -> Tensor:
            return upper(name, k, change, start) - outliers(name, k, change, start)

        return Thinned(self._election(), thin, len(models), groups, same)
