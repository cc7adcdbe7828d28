"""Labelled features in the coordinates where linear-Gaussian scores are sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import classes_of
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import finite, require


@dataclass(frozen=True)
class Spectrum:
    """F = U sqrt(sigma) Vᵀ and one-hot labels T, as far as scores need them; float64.

    Attributes:
        sigma: (k,) the eigenvalues of FᵀF above rounding, k <= min(n, d).
        labels: (k, c) UᵀT, the labels in the span of the features.
        counts: (c,) examples in each class.
    """

    sigma: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Spectrum:
        """From features (n, d) and labels (n,). Cost: O(n d min(n, d)), one eigendecomposition of the smaller side."""
        labels, classes = classes_of(labels)
        if len(features) >= features.shape[1]:
            return cls.from_statistics(ClassStatistics.of(features, labels, classes))
        x = features.double()
        sigma, u = torch.linalg.eigh(x @ x.T)
        kept = sigma > _rounding(sigma)
        onehot = torch.nn.functional.one_hot(labels, classes).double()
        return cls(sigma[kept], u.T[kept] @ onehot, onehot.sum(0))

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics) -> Spectrum:
        """From one pass over examples that were never held together; classes without examples are left out."""
        finite("statistics", statistics.gram)
        present = statistics.counts > 0
        require(int(present.sum()) >= 2, "A score needs at least two classes", int(present.sum()),
                "Label examples of another class.")  # fmt: skip
        sigma, v = torch.linalg.eigh(statistics.gram)
        kept = sigma > _rounding(sigma)
        labels = v.T[kept] @ statistics.sums[present].T / sigma[kept, None].sqrt()
        return cls(sigma[kept], labels, statistics.counts[present])


def _rounding(sigma: Tensor) -> float:
    """Eigenvalues up to here are what rounding makes of zero."""
    return float(sigma[-1].clamp(min=0)) * len(sigma) * torch.finfo(sigma.dtype).eps
