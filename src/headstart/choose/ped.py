"""Score a model as if fine-tuning had begun: let overlapping classes push each other apart, then ask another score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, Score, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import require

from .sfda import SFDA

PAPER = Paper(
    title="Exploring Model Transferability through the Lens of Potential Energy",
    authors="Li et al.",
    year=2023,
    arxiv="2308.15074",
    code="https://github.com/lixiaotong97/PED",
    departs="Rescales by the target's own features where the model's source features are not given; moves classes "
    "whose means coincide not at all, where the code divides by zero; moves the examples once, at the end.",
)

ROWS = 1024  # examples that are held in float64 at once
PAIRS = 4096  # close pairs of classes whose difference vectors are


@dataclass(frozen=True)
class Moved:
    """What pushing the classes apart did.

    Attributes:
        features: (n, d) float64, each class moved as a whole.
        steps: how many were accepted.
        displacement: summed over these, classes and features: |moved|, in standard deviations of the reference.
        relative: size of the examples' total movement as a share of their spread about the mean, both rescaled.
        potential: energy before each accepted step and after the last.
        dead: features that the reference hardly varies in, taken to vary by `eps`; what the target does in them is
            blown up.
        from_source: whether the reference was the model's source features, as published, or the target's own.
    """

    features: Tensor
    steps: int
    displacement: float
    relative: float
    potential: tuple[float, ...]
    dead: int
    from_source: bool


@dataclass(frozen=True, kw_only=True)
class PED:
    """What another score says once overlapping classes were pushed apart, as fine-tuning will; higher is better.

    Classes are balls of radius r, the root of their summed variances. Two whose centres are nearer than
    nsigma (r + r') repel each other like a spring, and each moves as a whole from rest for a short time.

    Args:
        base: the score asked afterwards; the paper has SFDA, LogME, N-LEEP and GBC.
        exit_ratio: a step is taken while it moves more than this share of what the first one moved, >= 0; the paper's
            code has 0.5. From 1 on nothing moves.
        tau: how long classes move in a step, >= 0; the paper's code has 0.1.
        kappa: stiffness of the springs, >= 0; the paper's code has 1.
        nsigma: how much of the radii counts as the class, >= 0; the paper's code has 0.6, and 0.3 as its alternative.
        steps: at most this many, >= 1; the paper's code has 6.
        eps: smallest standard deviation of a feature, > 0; the paper's code has 1e-3.

    Shape: features (n, d), labels (n,), as the base needs it; so is the number.

    Use it when: many classes overlap, as features that were learnt without labels let them.
    Not when: features are used for more than ranking: labels have moved them.

    Cost: that of the base, O(n d) twice and O(c² d) a step; memory the features once, c² + c d floats.

    Notes: the reference that features are rescaled by is `evidence.source`; without it the target's own features, an
    approximation. Between ten classes the defaults move features by some thousandths of their spread. `score` is
    silent: `move` tells what happened.

    Raises:
        Refused: fewer than two classes, no labels, NaN, settings out of range, a base that is no score.

    Reference: Li et al. 2023, section 3 (potential energy, force and displacement).

    >>> features = torch.tensor([[-1.0], [1.2], [-0.8], [1.4]])
    >>> evidence = Evidence(features=features, labels=torch.tensor([0, 0, 1, 1]))
    >>> moved = PED(tau=1).move(evidence)
    >>> moved.steps, moved.potential[0] > moved.potential[1], PED(tau=1).score(evidence) > SFDA().score(evidence)
    (1, True, True)
    """

    base: Score = field(default_factory=SFDA)
    exit_ratio: float = 0.5
    tau: float = 0.1
    kappa: float = 1.0
    nsigma: float = 0.6
    steps: int = 6
    eps: float = 1e-3

    def __post_init__(self) -> None:
        require(callable(getattr(self.base, "score", None)), "PED needs a base that scores evidence", repr(self.base),
                "Pass a score such as LogME().")  # fmt: skip
        for name in ("exit_ratio", "tau", "kappa", "nsigma"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"PED needs {name} >= 0", value, "Pass a number such as 0.5.")
        require(self.steps >= 1, "PED needs steps >= 1", self.steps, "Pass a number such as 6.")
        require(0 < self.eps < math.inf, "PED needs eps > 0", self.eps, "Pass a number such as 1e-3.")

    def score(self, evidence: Evidence) -> float:
        """The base's score of the moved features."""
        return self.base.score(replace(evidence, features=self.move(evidence).features))

    def move(self, evidence: Evidence) -> Moved:
        """The features after the classes have pushed each other apart, and what that took."""
        features, labels = evidence.need("features", "labels")
        labels, _ = classes_of(labels)
        counts = torch.bincount(labels).double()
        rows = torch.split(labels.argsort(stable=True), counts.long().tolist())
        inside = [_spread(features[own]) for own in rows]
        centres, within = torch.stack([m for m, _ in inside]), torch.stack([v for _, v in inside])  # (c, d)
        if evidence.source is None:  # of all, from those of the classes: a pass over the features less
            mean = counts @ centres / len(labels)
            variance = counts @ (within + (centres - mean).square()) / len(labels)
        else:
            mean, variance = _spread(evidence.source.features)
        scale = variance.sqrt().clamp(min=self.eps)
        start = (centres - mean) / scale
        squared = (within / scale.square()).sum(1)  # radii, which never change
        means, potential, accepted, displacement, first = start, [], 0, 0.0, 0.0
        while True:
            push, energy = self.push(means, squared.sqrt())
            potential.append(energy)
            change = float(push.abs().sum())
            first = first if accepted else change
            if accepted == self.steps or not change > self.exit_ratio * first:
                break
            means, accepted, displacement = means + push, accepted + 1, displacement + change
        moved = means - start
        out = torch.empty(features.shape, dtype=torch.float64, device=features.device)
        for own, shift in zip(rows, moved * scale, strict=True):
            out[own] = features[own].double() + shift
        centred = start - counts @ start / len(labels)
        spread = float(counts @ (squared + centred.square().sum(1)))
        went = float(counts @ moved.square().sum(1))
        return Moved(
            features=out,
            steps=accepted,
            displacement=displacement,
            relative=math.sqrt(went / spread) if went else 0.0,
            potential=tuple(potential),
            dead=int((variance.sqrt() < self.eps).sum()),
            from_source=evidence.source is not None,
        )

    def push(self, means: Tensor, radii: Tensor) -> tuple[Tensor, float]:
        """How far each class moves in one step (c, d), and the energy it moves from; means (c, d), radii (c,)."""
        m = means - means.mean(0)
        norms = m.square().sum(1)
        sums = norms + norms[:, None]
        gaps = sums - 2 * m @ m.T
        close = (gaps <= 1e-4 * sums).triu(1)  # pairs whose distance, and difference, lose digits in a Gram matrix
        pairs = [part.T for part in torch.split(close.nonzero(), PAIRS)]
        d = gaps.clamp(min=0).sqrt()
        for i, j in pairs:
            d[i, j] = d[j, i] = (m[i] - m[j]).norm(dim=1)
        overlap = (self.nsigma * (radii + radii[:, None]) - d).clamp(min=0).fill_diagonal_(0)
        # capped where a class alone would undo the whole overlap
        weight = torch.where(d > 0, min(0.5 * self.tau**2 * self.kappa, 1.0) * overlap / d, 0.0).fill_diagonal_(0)
        far = weight.masked_fill(close | close.T, 0)
        push = far.sum(1)[:, None] * m - far @ m
        for i, j in pairs:
            one = weight[i, j][:, None] * (m[i] - m[j])
            push.index_add_(0, i, one).index_add_(0, j, -one)
        return push, self.kappa / 4 * float(overlap.square().sum())  # each pair is there twice


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (d,) of rows (n, d), in float64."""
    mean = x.mean(0, dtype=torch.float64)
    squares = [(part - mean).square_().sum(0) for part in torch.split(x, ROWS)]  # float64, as the mean is
    return mean, torch.stack(squares).sum(0) / len(x)
