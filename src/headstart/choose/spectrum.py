"""Labelled features in the coordinates where linear-Gaussian scores are sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import classes_of
from headstart.core.statistics import ClassStatistics, gram
from headstart.core.validate import finite, require


@dataclass(frozen=True)
class Spectrum:
    """F = U sqrt(sigma) Vᵀ and one-hot labels T, as far as scores need them; float64.

    Attributes:
        sigma: (k,) the eigenvalues of FᵀF above rounding, k <= min(n, d).
        labels: (k, c) UᵀT, the labels in the span of the features.
        counts: (c,) examples in each class.
        rest: (c,) the squared length of each class's labels outside that span; 0 where rounding hides it.
    """

    sigma: Tensor
    labels: Tensor
    counts: Tensor
    rest: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Spectrum:
        """From features (n, d) and labels (n,). Cost: O(n d min(n, d)), one eigendecomposition of the smaller side."""
        labels, classes = classes_of(labels)
        if len(features) >= features.shape[1]:
            return cls.from_statistics(ClassStatistics.of(features, labels, classes))
        x = features.double()
        sigma, u = torch.linalg.eigh(gram(x.T))
        kept = sigma > _rounding(sigma)
        onehot = torch.nn.functional.one_hot(labels, classes).double()
        return cls._of(sigma[kept], u.T[kept] @ onehot, onehot.sum(0))

    @classmethod
    def exact(cls, features: Tensor, labels: Tensor, *, above: float = 1e-15) -> Spectrum:
        """From singular values, which keep the digits that a Gram matrix squares away; several times the cost of `of`.

        Args:
            features: (n, d).
            labels: (n,).
            above: singular values up to this share of the largest are dropped.
        """
        labels, classes = classes_of(labels)
        u, s, _ = torch.linalg.svd(features.double(), full_matrices=False)
        kept = s > above * s[0]
        u = u[:, kept]
        onehot = torch.nn.functional.one_hot(labels, classes).double()
        inside = u.T @ onehot
        rest = (onehot - u @ inside).square().sum(0)
        return cls(s[kept].square(), inside, onehot.sum(0), torch.where(rest > 1e-26 * len(onehot), rest, 0.0))

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics) -> Spectrum:
        """From one pass over examples that were never held together; classes without examples are left out."""
        statistics = checked(statistics)
        sigma, v = torch.linalg.eigh(statistics.gram)
        kept = sigma > _rounding(sigma)
        return cls._of(sigma[kept], v.T[kept] @ statistics.sums.T / sigma[kept, None].sqrt(), statistics.counts)

    @classmethod
    def _of(cls, sigma: Tensor, labels: Tensor, counts: Tensor) -> Spectrum:
        rest = counts - labels.square().sum(0)
        return cls(sigma, labels, counts, torch.where(rest > 1e-12 * counts.sum(), rest, 0.0))


def checked(statistics: ClassStatistics) -> ClassStatistics:
    """The statistics without empty classes; refuses NaN and fewer than two classes."""
    finite("statistics", statistics.gram)
    present = statistics.present()
    require(len(present.counts) >= 2, "A score needs at least two classes", len(present.counts),
            "Label examples of another class.")  # fmt: skip
    return present


def _rounding(sigma: Tensor) -> float:
    """Eigenvalues up to here are what rounding makes of zero."""
    return float(sigma[-1].clamp(min=0)) * len(sigma) * torch.finfo(sigma.dtype).eps
