"""Score a model by how little its classes overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import require

PAPER = Paper(
    title="Transferability Estimation using Bhattacharyya Class Separability",
    authors="Pándy et al.",
    year=2022,
    arxiv="2111.12780",
    code="https://github.com/google-research/google-research/tree/master/stable_transfer",
    departs="Counts the variance term of a spherical Gaussian once for each dimension; the code counts it once.",
)


@dataclass(frozen=True, kw_only=True)
class GBC:
    """Minus the overlap of the classes, each taken as a round Gaussian; 0 is the best.

    -sum over ordered pairs of classes of exp(-B), with B the Bhattacharyya distance of their Gaussians.

    Args:
        floor: smallest variance of a class, > 0, in squared units of the features; the paper's code has 1e-4.

    Shape: features (n, d), labels (n,); between -c (c - 1) and 0.

    Use it when: choosing among models, or target tasks, of features on one scale.
    Not when: features differ in scale between models in the range of `floor`, or classes are stretched or in clumps.

    Cost: O(n d + c² d).

    Notes: shifting and turning the features changes nothing. The paper first projects to 64 dimensions.

    Raises:
        Refused: fewer than two classes, no labels, NaN, floor <= 0.

    Reference: Pándy et al. 2022, equations 3 and 5 (spherical covariance).

    >>> same = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    >>> GBC().score(Evidence(features=same, labels=torch.tensor([0, 0, 1, 1])))
    -2.0
    """

    floor: float = 1e-4

    def __post_init__(self) -> None:
        require(self.floor > 0, "GBC needs floor > 0", self.floor, "Pass a small variance such as 1e-4.")

    def score(self, evidence: Evidence) -> float:
        """The negative sum of pairwise overlaps."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        x = features.double()
        x = x - x.mean(0)
        counts = torch.bincount(labels).double()
        means = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
        spread = (x - means[labels]).square().mean(1)
        variance = (x.new_zeros(classes).index_add_(0, labels, spread) / counts).clamp(min=self.floor)  # (c,)
        both = (variance[:, None] + variance) / 2
        apart = torch.cdist(means, means).square() / both / 8
        unlike = x.shape[1] / 2 * (both.log() - (variance.log()[:, None] + variance.log()) / 2)
        return float(classes - torch.exp(-apart - unlike).sum())  # the c pairs of a class with itself overlap by 1
