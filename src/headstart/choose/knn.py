"""Score a model by whether an example's nearest neighbours have its label."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import require

PAPER = Paper(
    title="Scalable Diverse Model Selection for Accessible Transfer Learning",
    authors="Bolya et al.",
    year=2021,
    arxiv="2111.06977",
    code="https://github.com/dbolya/parc",
)


@dataclass(frozen=True, kw_only=True)
class KNN:
    """How often the nearest other examples vote for an example's own label, as a share of 1; higher is better.

    Args:
        k: neighbours that vote, 1 <= k < n; the paper has 1.

    Shape: features (n, d), labels (n,); between 0 and 1.

    Use it when: classes may be curved or in several clumps, and n is some thousands at most.
    Not when: features have very different scales (standardise them) or n is large.

    Cost: O(n² d); memory 1024 n floats.

    Notes: leave-one-out: an example is left out by its index, so a duplicate of it counts. Neighbours at the same
    distance up to rounding (1e-12 of the mean squared norm) share the places that are left. The label with most votes
    wins; of several, the one with the nearest neighbour; those still equal share. So order changes nothing.

    Raises:
        Refused: fewer than two classes, no labels, NaN, k < 1 or k >= n.

    Reference: Bolya et al. 2021, section 4 (the 1-NN baseline).

    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> KNN().score(Evidence(features=features, labels=torch.tensor([0, 0, 1, 0])))
    0.5
    """

    k: int = 1

    def __post_init__(self) -> None:
        require(self.k >= 1, "KNN needs k >= 1", self.k, "Pass a number such as 1.")

    def score(self, evidence: Evidence) -> float:
        """Leave-one-out accuracy of the vote of the nearest neighbours, Euclidean."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels)
        require(self.k < len(labels), "KNN needs k < n", f"k = {self.k} with {len(labels)} examples", "Lower k.")
        x = features.double()
        x = x - x.mean(0)  # a shift would only cost digits
        norms = x.square().sum(1)
        rounding = 1e-12 * float(norms.mean())
        onehot = torch.nn.functional.one_hot(labels, classes).double()
        hits = 0.0
        for rows in torch.split(torch.arange(len(x), device=x.device), 1024):
            distances = norms[rows, None] - 2 * x[rows] @ x.T + norms  # squared (rows, n)
            distances[torch.arange(len(rows), device=x.device), rows] = torch.inf
            last = distances.topk(self.k, largest=False).values[:, -1:]
            nearer, level = distances < last - rounding, (distances - last).abs() <= rounding
            places = (self.k - nearer.sum(1, keepdim=True)).double() / level.sum(1, keepdim=True)
            votes = (nearer + level * places) @ onehot  # (rows, c)
            first = torch.full_like(votes, torch.inf).scatter_reduce(1, labels.expand(len(rows), -1), distances, "amin")
            first = first.masked_fill(votes < votes.amax(1, keepdim=True) - 1e-9, torch.inf)  # of the labels that lead
            winners = first <= first.amin(1, keepdim=True) + rounding
            hits += float(((winners * onehot[rows]).sum(1) / winners.sum(1)).sum())
        return hits / len(x)
