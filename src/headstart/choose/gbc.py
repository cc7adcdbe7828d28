"""Score a model by how little its classes overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import one_of, require

from .spectrum import checked

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
        covariance: "spherical", one variance a class (the paper's default), or "diagonal", one a feature.
        floor: smallest variance of a class, > 0, in squared units of the features; the paper's code has 1e-4.

    Shape: features (n, d), labels (n,); between -c (c - 1) and 0.

    Use it when: choosing among models, or target tasks, of features on one scale.
    Not when: features differ in scale between models in the range of `floor`, or classes are stretched or in clumps.

    Cost: O(n d + c² d); from statistics O(c² d).

    Notes: shifting the features changes nothing, nor does turning them while the covariance is spherical. The paper
    first projects to 64 dimensions.

    Raises:
        Refused: fewer than two classes, no labels, NaN, floor <= 0.

    Reference: Pándy et al. 2022, equations 3 and 5 (spherical covariance).

    >>> same = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    >>> GBC().score(Evidence(features=same, labels=torch.tensor([0, 0, 1, 1])))
    -2.0
    """

    covariance: Literal["spherical", "diagonal"] = "spherical"
    floor: float = 1e-4

    def __post_init__(self) -> None:
        one_of("covariance", self.covariance, ["spherical", "diagonal"])
        require(self.floor > 0, "GBC needs floor > 0", self.floor, "Pass a small variance such as 1e-4.")

    def score(self, evidence: Evidence) -> float:
        """The negative sum of pairwise overlaps."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        x = features.double()
        x = x - x.mean(0)
        zeros, counts = x.new_zeros(classes, x.shape[1]), torch.bincount(labels).double()[:, None]
        means = zeros.index_add(0, labels, x) / counts
        return self._of(means, zeros.index_add(0, labels, (x - means[labels]).square()) / counts)

    def score_from(self, statistics: ClassStatistics) -> float:
        """The same from streamed statistics, for more examples than fit into memory."""
        centred = checked(statistics).centred()
        means = centred.sums / centred.counts[:, None]
        return self._of(means, (centred.squares / centred.counts[:, None] - means.square()).clamp(min=0))

    def _of(self, means: Tensor, variance: Tensor) -> float:
        classes, d = means.shape
        if self.covariance == "spherical":
            variance = variance.mean(1, keepdim=True).clamp(min=self.floor)  # (c, 1)
            both = (variance + variance.T) / 2
            apart = torch.cdist(means, means).square() / both / 8
            unlike = d / 2 * (both.log() - (variance.log() + variance.log().T) / 2)
            distance = apart + unlike
        else:
            variance = variance.clamp(min=self.floor)
            rows = []
            for mean, own in zip(means, variance, strict=True):  # one class against all: memory c d
                both = (own + variance) / 2
                unlike = both.log() - (own.log() + variance.log()) / 2
                rows.append(((mean - means).square() / both / 8 + unlike / 2).sum(1))
            distance = torch.stack(rows)
        return float(classes - torch.exp(-distance).sum())  # the c pairs of a class with itself overlap by 1
