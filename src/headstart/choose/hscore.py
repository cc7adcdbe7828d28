"""Score a model by how far its features separate the class means."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.core.evidence import Evidence
from headstart.core.paper import Paper

from .spectrum import Spectrum

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

    Shape: features (n, d), labels (n,); between 0 and min(c - 1, d).

    Use it when: ranking models for one target, also with more features than examples.
    Not when: comparing targets of different numbers of classes.

    Cost: O(n d min(n, d)).

    Notes: shifting, turning and scaling all features together changes nothing. Constant features score 0.

    Raises:
        Refused: fewer than two classes, no labels, NaN.

    Reference: Ibrahim et al. 2021, equation 4; Ledoit and Wolf 2004 for a; Bao et al. 2019 for the score without it.

    >>> import torch
    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> round(HScore().score(Evidence(features=features, labels=torch.tensor([0, 0, 1, 1]))), 3)
    0.99
    """

    def score(self, evidence: Evidence) -> float:
        """The regularised H-score."""
        features, labels = evidence.need("features", "labels")
        x = features.double()
        x = x - x.mean(0)
        n, d = x.shape
        spectrum = Spectrum.of(x, labels)
        variance = spectrum.sigma / n  # of the principal directions (k,)
        mean = float(variance.sum()) / d
        a = shrinkage(float(x.square().sum(1).square().sum()), variance.square().sum().item(), mean, n, d)
        between = (spectrum.labels.square() / spectrum.counts).sum(1)  # share of each direction between classes (k,)
        return float((1 - a) * (between * variance / ((1 - a) * variance + a * mean)).sum())


def shrinkage(fourth: float, squared: float, mean: float, n: int, d: int) -> float:
    """Ledoit and Wolf's weight of the mean variance, in [0, 1].

    Args:
        fourth: the sum over examples of |x|⁴, x centred.
        squared: the squared Frobenius norm of the covariance.
        mean: its mean eigenvalue.
        n, d: examples and features.
    """
    spread = squared - d * mean**2
    return min(1.0, max(0.0, (fourth / n - squared) / n / spread)) if spread > 0 else 0.0
