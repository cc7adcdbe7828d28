"""Score a model by how sure a linear discriminant is of the labels, once its easy examples were made hard."""

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
    title="Not All Models Are Equal: Predicting Model Transferability in a Self-challenging Fisher Space",
    authors="Shao et al.",
    year=2022,
    arxiv="2207.03036",
    code="https://github.com/TencentARC/SFDA",
    departs="Solves for the discriminant by one triangular factor in place of a generalised eigenproblem, which gives "
    "the same function, and leaves the features as they are, where the code mixes them in place.",
)


@dataclass(frozen=True, kw_only=True)
class SFDA:
    """How probable a discriminant on frozen features holds the right classes, after challenging itself; at most 1.

    A regularised linear discriminant gives class probabilities q. Each example is then drawn towards the mean of the
    other classes, the more the less sure its own is, the discriminant is fitted again, and the score is the mean
    probability of the right class. Within-class covariance is shrunk by l = exp(-strength * its largest eigenvalue)
    towards its mean variance: the more the closer the examples of a class lie together.

    Args:
        strength: how fast the shrinkage falls with the within-class spread, > 0; the paper has 5.
        exact: take the largest eigenvalue itself, where the paper's code has six power iterations from the row sums
            (never more than the eigenvalue, and other after a rotation).

    Shape: features (n, d), labels (n,); between 0 and 1.

    Use it when: ranking models for one target whose classes are few, with features on one scale.
    Not when: features differ in scale between models (the shrinkage does), or models are all nearly perfect.

    Cost: O(n d min(n, d)), no eigenvectors; memory that of the features, once more.

    Notes: shifting the features changes nothing; nor does turning them with `exact`. With many classes even sure
    examples move far: at ten, to 23 % of themselves. Row sums of zero give no start; the eigenvalue is taken then.
    Constant features score the sum of squared class shares.

    Raises:
        Refused: fewer than two classes, no labels, NaN, strength <= 0.

    Reference: Shao et al. 2022, sections 4.1 (regularised FDA) and 4.2 (ConfMix).

    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> good, bad = (Evidence(features=features, labels=torch.tensor(y)) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    >>> SFDA().score(good) > 0.99 > 0.6 > SFDA().score(bad)
    True
    """

    strength: float = 5.0
    exact: bool = False

    def __post_init__(self) -> None:
        require(0 < self.strength < math.inf, "SFDA needs strength > 0", self.strength, "Pass a number such as 5.")

    def score(self, evidence: Evidence) -> float:
        """The mean probability of the right class after both stages."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        x = features.double()
        x = x - x[0]  # constant columns become exactly 0
        x = x - x.mean(0)
        d, start = x.shape[1], x.new_ones(x.shape[1])
        if len(x) < d:  # the rows span n dimensions at most, and all that follows stays inside
            axes, x = torch.linalg.qr(x.T)
            x, start = x.T, axes.sum(0)
        share = torch.bincount(labels).double() / len(x)
        spread = _spread(x, labels, share)
        shrink = max(math.exp(-self.strength * _largest(spread[2], start, self.exact)), 1e-10)
        sure = _discriminant(x, *spread, share, shrink, d).softmax(1).gather(1, labels[:, None])  # softmax of softmax
        others = (spread[0].sum(0) - spread[0]) / (classes - 1)
        mixed = sure * x + (1 - sure) * others[labels]
        final = _discriminant(mixed, *_spread(mixed, labels, share), share, shrink, d)
        return float(final.gather(1, labels[:, None]).mean())


def _spread(x: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (c, d) of the classes, examples (n, d) about them, and the covariance (d, d) of those."""
    means = x.new_zeros(len(share), x.shape[1]).index_add(0, labels, x) / (len(x) * share[:, None])
    within = x - means[labels]
    return means, within, gram(within) / len(x)


def _largest(covariance: Tensor, start: Tensor, exact: bool) -> float:
    """The largest eigenvalue, or what three double power iterations from the row sums make of it."""
    trace = float(covariance.trace())
    if exact or float((covariance @ start).norm()) <= 1e-9 * trace * len(start) ** 0.5:
        return float(torch.linalg.eigvalsh(covariance)[-1].clamp(min=0))
    v = start
    for _ in range(6):
        v = torch.nn.functional.normalize(covariance @ v, dim=0, eps=0.0)
    return float((covariance @ v).norm())


def _discriminant(
    x: Tensor, means: Tensor, within: Tensor, covariance: Tensor, share: Tensor, shrink: float, d: int
) -> Tensor:
    """Class probabilities (n, c) from Gaussians of one covariance, shrunk; `d` counts the features it is of."""
    least = 1e-25 * float(x.square().mean())  # classes that are points: the limit of ever smaller spread
    ridge = shrink * (max(float(covariance.trace()) / d, least) or 1.0)
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor, failed = torch.linalg.cholesky_ex((1 - shrink) * covariance + ridge * eye, upper=True)
    sides = factor.diagonal()
    if bool(failed) or float(sides.min()) < 1e-3 * float(sides.max()):  # nearly singular: its square costs digits
        rows = torch.cat([within * ((1 - shrink) / len(x)) ** 0.5, ridge**0.5 * eye])
        factor = torch.linalg.qr(rows, mode="r").R
    white = torch.linalg.solve_triangular(factor, means, upper=True, left=False)
    coefficients = torch.linalg.solve_triangular(factor.T, white, upper=False, left=False)
    logits: Tensor = x @ coefficients.T - white.square().sum(1) / 2 + share.log()
    return logits.softmax(1)
