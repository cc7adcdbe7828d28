"""Sufficient statistics in one streaming pass; memory does not grow with the number of examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .validate import require


@dataclass(frozen=True)
class ClassStatistics:
    """Everything that linear-Gaussian scores and heads need to know of labelled features.

    Attributes:
        gram: (d, d) float64, the sum of x xᵀ.
        sums: (c, d) float64, the sum of x in each class.
        squares: (c, d) float64, the sum of x² in each class.
        counts: (c,) float64, examples in each class.
        cubes: (d,) float64, the sum of |x|² x.
        fourth: () float64, the sum of |x|⁴.

    Memory: O(d² + c d), whatever n is. Shards add up: `a + b` is the statistics of both.

    Notes: sums are about the origin. Centring them costs as many digits as the mean is larger than the spread, squared;
    where that is more than a few, subtract one fixed vector from all features first.

    >>> x, y = torch.randn(10, 3), torch.arange(10) % 2
    >>> both = ClassStatistics.of(x[:4], y[:4], 2) + ClassStatistics.of(x[4:], y[4:], 2)
    >>> torch.allclose(both.gram, ClassStatistics.of(x, y, 2).gram)
    True
    """

    gram: Tensor
    sums: Tensor
    squares: Tensor
    counts: Tensor
    cubes: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassStatistics:
        """The statistics of one batch: features (n, d), labels (n,) in 0..classes-1. Cost: O(n d²)."""
        x = features.double()
        squared = x.square()
        norms = squared.sum(1)
        zeros = x.new_zeros(classes, x.shape[1])
        return cls(
            gram=gram(x),
            sums=zeros.index_add(0, labels, x),
            squares=zeros.index_add(0, labels, squared),
            counts=torch.bincount(labels, minlength=classes).double(),
            cubes=norms @ x,
            fourth=norms.square().sum(),
        )

    @classmethod
    def stream(cls, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> ClassStatistics:
        """The statistics of (features, labels) batches that are never held together, on their device.

        Raises:
            Refused: no batches, labels outside 0..classes-1.
        """
        total: ClassStatistics | None = None
        for features, labels in batches:
            require(len(features) == len(labels), "Each batch needs one label an example",
                    (len(features), len(labels)), "Align the two.")  # fmt: skip
            inside = len(labels) == 0 or 0 <= int(labels.min()) <= int(labels.max()) < classes
            require(inside, f"labels must lie in 0..{classes - 1}", torch.unique(labels).tolist()[:5],
                    "Renumber them, or pass classes=.")  # fmt: skip
            part = cls.of(features, labels, classes)
            total = part if total is None else total + part
        require(total is not None, "Statistics need at least one batch", "none", "Pass a non-empty stream.")
        assert total is not None
        return total

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        return ClassStatistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def n(self) -> float:
        """Number of examples."""
        return float(self.counts.sum())

    def present(self) -> ClassStatistics:
        """Without the classes that have no examples."""
        kept = self.counts > 0
        return replace(self, sums=self.sums[kept], squares=self.squares[kept], counts=self.counts[kept])

    def centred(self) -> ClassStatistics:
        """The statistics of x minus the mean of all examples: exact algebra, no second pass."""
        m = self.sums.sum(0) / self.n
        m2, total = m @ m, self.squares.sum()  # |m|², the sum of |x|²
        gm = self.gram @ m
        return replace(
            self,
            gram=self.gram - self.n * torch.outer(m, m),
            sums=self.sums - self.counts[:, None] * m,
            squares=self.squares - 2 * self.sums * m + self.counts[:, None] * m.square(),
            cubes=self.cubes - 2 * gm - total * m + 2 * self.n * m2 * m,
            fourth=self.fourth - 4 * m @ self.cubes + 2 * m2 * total + 4 * m @ gm - 3 * self.n * m2.square(),
        )


def gram(x: Tensor) -> Tensor:
    """xᵀx (d, d) of x (n, d), without gradient.

    Cost: O(n d²); on the CPU numpy sees that the product is symmetric and does half of it, which torch does not.

    >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    if x.device.type != "cpu":
        return x.T @ x
    rows = x.detach().numpy()
    return torch.from_numpy(rows.T @ rows)
