"""Score a model by how much its features still vary inside each target class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

PAPER = Paper(
    title="Fast and Accurate Transferability Measurement by Evaluating Intra-class Feature Variance",
    authors="Xu and Kang",
    year=2023,
    arxiv="2308.05986",
    code="https://github.com/snudatalab/TMI",
    departs="Leaves the factor 2 out of the Euclidean form, where the code counts it twice; ignores empty classes, "
    "which the code counts; refuses one class, for which the entropy is defined.",
)

BLOCK = 1024  # rows of a class whose distances are held at once: some 30 MB


@dataclass(frozen=True)
class TMIReport:
    """What a score of `TMI` rests on.

    Attributes:
        score: in nats, higher is better.
        floored: share of the distances that lay below the floor. Above a half the score says more about the floor and
            the number of features than about the model.
        floor: the floor itself.
        dropped: classes of 2 to k examples, which have no k-th neighbour.
        single: classes of one example, which count as 0.
    """

    score: float
    floored: float
    floor: float
    dropped: tuple[int, ...]
    single: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TMI:
    """How much features still vary inside the classes, as a conditional entropy H(features | labels); higher is better.

    The entropy of each class comes from the distances e of its examples to their k-th nearest others, as
    psi(n) - psi(k) + log V + d mean(log e), with V the volume of the unit ball, and is weighted by the class's share.

    Args:
        k: which neighbour, >= 1; the paper's code has 3.
        norm: "max", the largest difference of a feature (the paper's code), or "euclidean".
        min_dist: smallest distance that counts, >= 0, in units of the features; the paper's code has 1. Zero stands
            for 1e-12, so that duplicates stay finite.
        relative: count `min_dist` in medians of the distances, which every scale of features shares.
        unit_spread: divide centred features by their root mean squared norm first. This removes what models of one
            architecture are mostly told apart by, and is there for those of different ones.
        aggregate: "mean" of the weighted entropies over classes (the paper's code) or their "sum" (its definition).

    Shape: features (n, d), labels (n,); not bounded, in nats.

    Use it when: models, or layers, have features of one width and scale, and a probe on few labels is what follows.
    Not when: widths or scales differ (d log(scale) decides then), or alone: noise varies most of all. Read it beside
        a score of separation such as `LogME`.

    Cost: O(sum of n_c² d) for classes of n_c examples; memory one class and 1024² distances.

    Notes: `score` is silent; `report` tells how many distances lay below the floor and which classes were left out.
    Classes of 2 to k examples have no k-th neighbour and are dropped; classes of one count as 0.

    Raises:
        Refused: fewer than two classes, none with more than k examples, no labels, NaN, k < 1, min_dist < 0.

    Reference: Xu and Kang 2023, section 3 (TMI); Kozachenko and Leonenko 1987 for the entropy.

    >>> rows = torch.arange(8.0)[:, None]
    >>> wide, narrow = (Evidence(features=s * rows, labels=torch.arange(8) % 2) for s in (10, 2))
    >>> round(TMI().score(wide) - TMI().score(narrow), 3)  # log(5), halved by the mean over two classes
    0.805
    >>> TMI(min_dist=20).report(narrow).floored
    1.0
    """

    k: int = 3
    norm: Literal["max", "euclidean"] = "max"
    min_dist: float = 1.0
    relative: bool = False
    unit_spread: bool = False
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        require(self.k >= 1, "TMI needs k >= 1", self.k, "Pass a number such as 3.")
        require(0 <= self.min_dist < math.inf, "TMI needs min_dist >= 0", self.min_dist, "Pass a number such as 1.")
        one_of("norm", self.norm, ["max", "euclidean"])
        one_of("aggregate", self.aggregate, ["mean", "sum"])

    def score(self, evidence: Evidence) -> float:
        """The conditional entropy of the features, in nats."""
        return self.report(evidence).score

    def report(self, evidence: Evidence) -> TMIReport:
        """The score with what it rests on."""
        x, given = evidence.need("features", "labels")
        labels, _ = classes_of(given)
        if self.unit_spread:
            x = x.double() - x.double().mean(0)
            x = x / (x.square().sum(1).mean().sqrt() or 1.0)
        rows = torch.split(labels.argsort(stable=True), torch.bincount(labels).tolist())
        many = [own for own in rows if len(own) > self.k]
        require(bool(many), f"TMI(k={self.k}) needs a class of more than {self.k} examples",
                f"{max(map(len, rows))} at most", "Label more examples, or lower k.")  # fmt: skip
        distances = [kth_distance(x[own], self.k, self.norm) for own in many]
        every = torch.cat(distances)
        floor = max(self.min_dist * (float(every.median()) if self.relative else 1.0), 1e-12)
        total = sum(len(e) * entropy(e.clamp(min=floor), x.shape[1], self.k, self.norm) for e in distances) / len(x)
        single = tuple(int(given[own[0]]) for own in rows if len(own) == 1)
        return TMIReport(
            score=total / (len(many) + len(single)) if self.aggregate == "mean" else total,
            floored=float((every < floor).double().mean()),
            floor=floor,
            dropped=tuple(int(given[own[0]]) for own in rows if 1 < len(own) <= self.k),
            single=single,
        )


def entropy(distances: Tensor, d: int, k: int, norm: str) -> float:
    """Kozachenko and Leonenko's entropy, in nats, of the sample whose k-th neighbours lie at `distances` (n,)."""
    # a ball of radius e: a cube of side 2 e, or pi^(d/2) e^d / Gamma(d/2 + 1)
    ball = d * math.log(2) if norm == "max" else d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    counts = torch.tensor([len(distances), k], dtype=torch.float64).digamma()
    return float(counts[0] - counts[1]) + ball + d * float(distances.log().mean())


def kth_distance(x: Tensor, k: int, norm: str) -> Tensor:
    """The distance of each row of x (n, d), n > k, to its k-th nearest other row: (n,) float64; each pair once."""
    p = torch.inf if norm == "max" else 2.0
    nearest = torch.full((len(x), k), torch.inf, dtype=torch.float64, device=x.device)
    blocks = torch.split(torch.arange(len(x), device=x.device), BLOCK)
    for first, rows in enumerate(blocks):
        own = x[rows].double()
        upper = torch.ones(len(own), len(own), dtype=torch.bool, device=x.device).triu(1)
        far = torch.full((len(own), len(own)), torch.inf, dtype=torch.float64, device=x.device)
        far = far.masked_scatter_(upper, torch.pdist(own, p))  # twice as fast as cdist, a pair for a pair
        nearest[rows] = _least(nearest[rows], torch.minimum(far, far.T))
        for columns in blocks[first + 1 :]:
            far = torch.cdist(own, x[columns].double(), p, compute_mode="donot_use_mm_for_euclid_dist")
            nearest[rows], nearest[columns] = _least(nearest[rows], far), _least(nearest[columns], far.T)
    return nearest.amax(1)


def _least(nearest: Tensor, far: Tensor) -> Tensor:
    """The k smallest of each row of both."""
    return torch.cat([nearest, far], 1).topk(nearest.shape[1], largest=False, sorted=False).values


def icv(evidence: Evidence) -> float:
    """The mean over classes of the trace of the within-class covariance: the plain variance that `TMI` tracks.

    >>> icv(Evidence(features=torch.tensor([[0.0], [2.0], [5.0], [5.0]]), labels=torch.tensor([0, 0, 1, 1])))
    0.5
    """
    features, labels = evidence.need("features", "labels")
    labels, classes = classes_of(labels)
    x, counts = features.double(), torch.bincount(labels).double()
    means = x.new_zeros(classes, x.shape[1]).index_add(0, labels, x) / counts[:, None]
    within = (x - means[labels]).square().sum(1)
    return float((x.new_zeros(classes).index_add(0, labels, within) / counts).mean())
