"""Score a model by how many bits of its features the labels explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.statistics import gram
from headstart.core.validate import require

PAPER = Paper(
    title="Frustratingly Easy Transferability Estimation",
    authors="Huang et al.",
    year=2022,
    arxiv="2106.09362",
    code="https://github.com/Long-Kai/TransRate",
    departs="Brings features to one scale before coding them, where the code scales each example or changes the "
    "distortion from data set to data set; weighs classes by their share.",
)


@dataclass(frozen=True, kw_only=True)
class TransRate:
    """How much shorter the code of the features becomes once the labels are known, in nats; higher is better.

    R(F) - sum of p_c R(F_c), with R(A) = 1/2 log det(I + AᵀA / (n distortion)) the length of a code that keeps squared
    errors below the distortion, and F_c the examples of class c about the mean of all.

    Args:
        distortion: squared error of the code, > 0; the paper's code has 1e-4.
        scale: divide the centred features by the root of their mean squared length, so that models with large features
            do not win by that. False leaves them as they are.

    Shape: features (n, d), labels (n,); at least 0.

    Use it when: ranking models, or layers of one model, for one target, also with more features than examples.
    Not when: classes have very few examples, whose code is short for any model; or there are two classes on one line,
        which have one code.

    Cost: O(n d min(n, d)), and O(n_c d min(n_c, d)) for each class; memory one copy of the features in float64, and
        the square of the smaller side. Several times that where the mean squared length is above 1e6 distortions.

    Notes: shifting and turning changes nothing, nor do features that are all zero, nor, with `scale`, a common factor.
    Constant features score 0.

    Raises:
        Refused: fewer than two classes, no labels, NaN, distortion <= 0.

    Reference: Huang et al. 2022, equations 3 and 4; Ma et al. 2007 for R.

    >>> features = torch.tensor([[1.0, 0, 0], [0.9, 0, 0], [0, 1.0, 0], [0, 0.9, 0], [0, 0, 1.0], [0, 0, 0.9]])
    >>> good, bad = (Evidence(features=features, labels=torch.tensor(y)) for y in ([0, 0, 1, 1, 2, 2], [0, 1, 2] * 2))
    >>> TransRate().score(good) > TransRate().score(bad)
    True
    """

    distortion: float = 1e-4
    scale: bool = True

    def __post_init__(self) -> None:
        require(0 < self.distortion < math.inf, "TransRate needs distortion > 0", self.distortion, "Pass 1e-4.")

    def score(self, evidence: Evidence) -> float:
        """The difference of the two code lengths."""
        features, labels = evidence.need("features", "labels")
        labels, _ = classes_of(labels)
        x = features[labels.argsort(stable=True)].double()  # a copy, class after class
        x -= x.mean(0)
        size = float(torch.linalg.vector_norm(x).square()) / len(x)
        noise = self.distortion * (size if self.scale and size > 0 else 1.0)
        parts = torch.split(x, torch.bincount(labels).tolist())
        known = sum(len(part) / len(x) * _rate(part, noise) for part in parts)
        return max(0.0, _rate(x, noise) - known)  # the logarithm is concave; below is rounding


def _rate(x: Tensor, noise: float) -> float:
    """Length of the code of x (n, d); the determinant of the smaller side is the same (Sylvester)."""
    n, d = x.shape
    if float(torch.linalg.vector_norm(x)) ** 2 > 1e6 * n * noise:  # beside such a Gram matrix the 1 loses its digits
        return float((torch.linalg.svdvals(x).square() / (n * noise)).log1p().sum()) / 2
    small = gram(x if d < n else x.T) / (n * noise)
    small.diagonal().add_(1)
    return float(torch.linalg.cholesky(small).diagonal().log().sum())
