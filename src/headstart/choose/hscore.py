"""Score a model by how far its features separate the class means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.statistics import ClassStatistics, gram
from headstart.core.validate import require

from .spectrum import Spectrum, checked

PAPER = Paper(
    title="Newer is not always better: Rethinking transferability metrics, their peculiarities, stability and "
    "performance",
    authors="Ibrahim et al.",
    year=2021,
    arxiv="2110.06893",
    code="https://github.com/thuml/Transfer-Learning-Library",
    departs="Divides both covariances by n, where the code divides one of them by n - 1.",
)


@dataclass(frozen=True, kw_only=True)
class HScore:
    """How much of the features' spread lies between the classes, from one pass; higher is better.

    H = (1 - a) tr(S⁻¹ B), with B the covariance of the class means and S = (1 - a) cov(F) + a tr(cov(F)) / d I, shrunk
    by Ledoit and Wolf's a so that it is well behaved for any n and d.

    Args:
        shrink: False gives the first form, a = 0 (Bao et al. 2019), for which every model is alike once its features
            have as many dimensions as there are examples.

    Shape: features (n, d), labels (n,); between 0 and min(c - 1, d).

    Use it when: ranking models for one target, also with more features than examples.
    Not when: comparing targets of different numbers of classes.

    Cost: O(n d min(n, d)); memory O(d² + c d) from statistics.

    Notes: shifting, turning and scaling all features together changes nothing; without shrinkage nor does any
    invertible linear map. Constant features score 0. The scatter is factored by Cholesky, which costs digits where
    features are nearly collinear; there the singular values of the features, or from statistics the eigenvalues of
    their scatter, are taken instead, without those below 1e-10 (1e-15) of the largest.

    Raises:
        Refused: fewer than two classes, no labels, NaN; without shrinkage, features of rank n - 1 or more.

    Reference: Ibrahim et al. 2021, equation 4; Ledoit and Wolf 2004 for a; Bao et al. 2019, definition 2.

    >>> import torch
    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> round(HScore().score(Evidence(features=features, labels=torch.tensor([0, 0, 1, 1]))), 3)
    0.99
    """

    shrink: bool = True

    def score(self, evidence: Evidence) -> float:
        """The H-score of evidence that is held in memory."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        x = features.double()
        mean, counts = x.mean(0), torch.bincount(labels).double()
        if len(x) > x.shape[1]:
            scatter = gram(x) - len(x) * torch.outer(mean, mean)  # a copy of the features less than centring them
            if not bool((len(x) * mean.square() <= 1e3 * scatter.diagonal()).all()):  # it would cost over three digits
                x, mean = x - mean, torch.zeros_like(mean)
                scatter = gram(x)
            sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) - counts[:, None] * mean
            lengths = torch.linalg.vecdot(x, x) - 2 * (x @ mean) + mean @ mean if self.shrink else mean
            found = self._factored(scatter, sums, counts, float(lengths.square().sum()))
            if found is not None:
                return found
        x = x - mean
        fourth = float(torch.linalg.vecdot(x, x).square().sum())
        return self._of(Spectrum.exact(x, labels, above=1e-10), fourth, x.shape[1])

    def score_from(self, statistics: ClassStatistics) -> float:
        """The same from streamed statistics, for more examples than fit into memory."""
        centred = checked(statistics).centred()
        found = self._factored(centred.gram, centred.sums, centred.counts, float(centred.fourth))
        if found is not None:
            return found
        return self._of(Spectrum.from_statistics(centred), float(centred.fourth), len(centred.gram))

    def _factored(self, scatter: Tensor, sums: Tensor, counts: Tensor, fourth: float) -> float | None:
        """By Cholesky, on features scaled to one variance; None where that would cost more than six digits."""
        n, d = float(counts.sum()), len(scatter)
        a, trace = 0.0, float(scatter.trace())
        if self.shrink:
            a = shrinkage(fourth, float(scatter.square().sum()) / n**2, trace / n / d, n, d)
            scatter = (1 - a) * scatter
            scatter.diagonal().add_(a * trace / d)
        scale = scatter.diagonal().sqrt()
        if not bool((scale > 0).all()):
            return None
        factor, failed = torch.linalg.cholesky_ex(scatter / scale[:, None] / scale)
        if int(failed) or float(factor.diagonal().amin()) < 1e-3 or (not self.shrink and n <= d + 1):
            return None
        means = sums / counts[:, None].sqrt() / scale
        solved = torch.linalg.solve_triangular(factor, means.T, upper=False)
        return float((1 - a) * solved.square().sum())

    def _of(self, spectrum: Spectrum, fourth: float, d: int) -> float:
        n = float(spectrum.counts.sum())
        require(self.shrink or len(spectrum.sigma) < n - 1, "HScore(shrink=False) needs features of rank below n - 1",
                f"rank {len(spectrum.sigma)} with {n:.0f} examples, where every model scores c - 1",
                "Use HScore(), or more examples.")  # fmt: skip
        variance = spectrum.sigma / n  # of the principal directions (k,)
        mean = float(variance.sum()) / d
        a = shrinkage(fourth, variance.square().sum().item(), mean, n, d) if self.shrink else 0.0
        between = (spectrum.labels.square() / spectrum.counts).sum(1)  # share of each direction between classes (k,)
        return float((1 - a) * (between * variance / ((1 - a) * variance + a * mean)).sum())


def shrinkage(fourth: float, squared: float, mean: float, n: float, d: int) -> float:
    """Ledoit and Wolf's weight of the mean variance, in [0, 1].

    Args:
        fourth: the sum over examples of |x|⁴, x centred.
        squared: the squared Frobenius norm of the covariance.
        mean: its mean eigenvalue.
        n, d: examples and features.
    """
    spread = squared - d * mean**2
    above_rounding = spread > 1e-14 * squared  # else the covariance is a multiple of the identity, which stays
    return min(1.0, max(0.0, (fourth / n - squared) / n / spread)) if above_rounding else 0.0
