"""Score a model by whether an example's nearest neighbour has its label."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper

PAPER = Paper(
    title="Scalable Diverse Model Selection for Accessible Transfer Learning",
    authors="Bolya et al.",
    year=2021,
    arxiv="2111.06977",
    code="https://github.com/dbolya/parc",
)


@dataclass(frozen=True, kw_only=True)
class KNN:
    """How often the nearest other example has the same label, as a share of 1; higher is better.

    Shape: features (n, d), labels (n,); between 0 and 1.

    Use it when: classes may be curved or in several clumps, and n is some thousands at most.
    Not when: features have very different scales (standardise them) or n is large.

    Cost: O(n² d); memory 1024 n floats.

    Notes: leave-one-out: an example is left out by its index, so a duplicate of it counts. Neighbours at the same
    distance up to rounding (1e-12 of the mean squared norm) share one vote, so the order of examples changes nothing.

    Raises:
        Refused: fewer than two classes, no labels, NaN.

    Reference: Bolya et al. 2021, section 4 (the 1-NN baseline).

    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> KNN().score(Evidence(features=features, labels=torch.tensor([0, 0, 1, 0])))
    0.5
    """

    def score(self, evidence: Evidence) -> float:
        """Leave-one-out accuracy of the nearest neighbour, Euclidean."""
        features, labels = evidence.need("features", "labels")
        labels, _ = classes_of(labels)
        x = features.double()
        x = x - x.mean(0)  # a shift would only cost digits
        norms = x.square().sum(1)
        rounding = 1e-12 * float(norms.mean())
        hits = 0.0
        for rows in torch.split(torch.arange(len(x), device=x.device), 1024):
            distances = norms[rows, None] - 2 * x[rows] @ x.T + norms  # squared (rows, n)
            distances[torch.arange(len(rows), device=x.device), rows] = torch.inf
            nearest = distances <= distances.amin(1, keepdim=True) + rounding
            same = nearest & (labels[rows, None] == labels)
            hits += float((same.sum(1) / nearest.sum(1)).sum())
        return hits / len(x)
