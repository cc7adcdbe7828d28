"""Score a model by whether the examples it takes to be alike have the same label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import require

from .linear_probe import standardised

PAPER = Paper(
    title="Scalable Diverse Model Selection for Accessible Transfer Learning",
    authors="Bolya et al.",
    year=2021,
    arxiv="2111.06977",
    code="https://github.com/dbolya/parc",
    departs="Ranks the distances once, in a closed form that treats ties exactly; draws examples once, not five times.",
)


@dataclass(frozen=True, kw_only=True)
class PARC:
    """How well distances between examples follow their labels, as 100 times a rank correlation; higher is better.

    Two examples are as far apart as their features are uncorrelated. The score is Spearman's correlation, over all
    pairs, of that distance with whether the labels differ.

    Args:
        dimensions: principal components that wider features are reduced to, >= 2; the paper has 32. None keeps all.
        examples: at most this many are compared, >= 3; the paper has 500. Up to that number all are. Of more, a random
            example of each class is drawn in turn until there are enough, so classes are as equal as they can be.
        seed: of the draw.

    Shape: features (n, d), labels (n,); between -100 and 100. With p the share of pairs of one label no model can
        pass 100 sqrt(3 p (1 - p)) while no two distances are the same: 87 for two equal classes, 50 for ten.

    Use it when: examples are few and classes are some tens at most.
    Not when: features have fewer than three dimensions, or classes are in several clumps.

    Cost: O(m² d + m² log m) with m examples compared; memory m² floats.

    Notes: shifting features and scaling each of them changes nothing while components are not taken, nor do constant
    ones. A component has no sign of its own, yet correlation across components depends on theirs: each is turned so
    that its largest example is positive. An example whose features all lie equally far from their means correlates
    with nothing: distance 1. Distances up to 1e-12 apart are the same. If all are, the score is 0. Features, and
    components, with less than 1e-7 of the largest spread are left out.

    Raises:
        Refused: fewer than two classes, no two compared examples of one class, no labels, NaN, dimensions < 2,
            examples < 3.

    Reference: Bolya et al. 2021, section 3.2 and equation 4.

    >>> features = torch.tensor([[1.0, 0, 0], [2.0, 0, 1], [0, 5.0, 9], [0, 6.0, 7]])
    >>> good, bad = (Evidence(features=features, labels=torch.tensor(y)) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    >>> PARC().score(good) > 80 > 0 > PARC().score(bad)
    True
    """

    dimensions: int | None = 32
    examples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.dimensions is None or self.dimensions >= 2, "PARC needs dimensions >= 2", self.dimensions,
                "Pass a number such as 32, or None to keep all.")  # fmt: skip
        require(self.examples >= 3, "PARC needs examples >= 3", self.examples, "Pass a number such as 500.")

    def score(self, evidence: Evidence) -> float:
        """100 times Spearman's correlation of distances in features and in labels."""
        features, labels = evidence.need("features", "labels")
        labels, _ = classes_of(labels)
        rows = balanced(labels, self.examples, self.seed)
        distance, labels = distances(features[rows], self.dimensions), labels[rows]
        upper = torch.triu_indices(len(rows), len(rows), 1, device=labels.device)
        differ = labels[upper[0]] != labels[upper[1]]
        require(not bool(differ.all()), "PARC needs two examples of one class", f"{len(rows)} examples, all different",
                "Label more examples, or raise examples=.")  # fmt: skip
        return 100 * binary_spearman(distance[upper[0], upper[1]], differ)


def balanced(labels: Tensor, examples: int, seed: int) -> Tensor:
    """Indices of at most `examples` rows; of more, one of each class in turn, at random.

    >>> labels = torch.tensor([0] * 90 + [1] * 10)
    >>> labels[balanced(labels, 30, seed=0)].bincount().tolist()
    [20, 10]
    """
    if len(labels) <= examples:
        return torch.arange(len(labels), device=labels.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    onehot = torch.nn.functional.one_hot(labels[order])
    turn = onehot.cumsum(0).gather(1, labels[order, None])[:, 0]  # first, second ... of its class
    return order[torch.sort(turn, stable=True).indices[:examples]]


def distances(features: Tensor, dimensions: int | None = None) -> Tensor:
    """(n, n) one minus the correlation of each two examples, over standardised features or principal components."""
    x = features.double()
    if dimensions is not None and x.shape[1] > dimensions:
        u, size, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        peak = u.gather(0, u.abs().argmax(0, keepdim=True))
        x = (u * size * peak.sign())[:, :dimensions]  # the correlation depends on the signs, which are arbitrary
    x, _, _ = standardised(x)
    x = x[:, (x != 0).any(0)]  # without constant ones
    if x.shape[1] == 0:
        return x.new_ones(len(x), len(x))
    size = x.norm(dim=1, keepdim=True)
    x = x - x.mean(1, keepdim=True)
    length = x.norm(dim=1, keepdim=True)
    x = torch.where(length > 1e-12 * size, x / length, 0.0)
    return 1 - x @ x.T


def binary_spearman(values: Tensor, mark: Tensor) -> float:
    """Spearman's correlation of numbers (m,) with a mark that is on or off (m,), from one sort.

    With AUC the chance that a marked value is the larger, a tie counting half, and t values in each tie, it is
    sqrt(3 p (1 - p)) (2 AUC - 1) m / sqrt(m² - 1 - sum (t³ - t) / m): the mean rank of marked values over the spread
    of average ranks. 0 where all values are the same.

    >>> round(binary_spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([False, False, True, True])), 9)
    0.707106781
    """
    ordered, order = values.double().sort()
    new = ordered.diff(prepend=ordered[:1]) > 1e-12
    tie = new.cumsum(0)
    size = torch.bincount(tie).double()
    rank = (size.cumsum(0) - (size - 1) / 2)[tie]  # average ranks
    m, on = float(len(values)), mark[order].double()
    marked = float(on.sum())
    spread = m * m - 1 - float((size**3 - size).sum()) / m
    if not bool(new.any()) or marked in (0, m):
        return 0.0
    share = marked / m
    advantage = (2 * float(rank @ on) / marked - (m + 1)) / (m - marked)  # 2 AUC - 1
    return math.sqrt(3 * share * (1 - share)) * advantage * m / math.sqrt(spread)
