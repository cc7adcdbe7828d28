"""Score a model by the evidence that its features explain the labels linearly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from headstart.core.evidence import Evidence
from headstart.core.paper import Paper
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import require

from .spectrum import Spectrum

PAPER = Paper(
    title="LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
    authors="You et al.",
    year=2021,
    arxiv="2102.11005",
    code="https://github.com/thuml/LogME",
    departs="Adds no 1e-5 to denominators, starts at the features' own scale, reaches the same fixed point by secants, "
    "and is right for more features than examples, where the released fast version leaves out a term.",
)


@dataclass(frozen=True, kw_only=True)
class LogME:
    """How well a linear model on frozen features will do, from one pass and without training; higher is better.

    For each class t ~ N(F w, 1/beta) and w ~ N(0, 1/alpha), with the alpha and beta of the highest evidence p(t | F).
    The score is the mean over classes of log p(t | F) / n.

    Args:
        tolerance: relative change of alpha / beta at which the fixed point has been reached, > 0; the paper's code
            stops at 1e-3.
        iterations: at most this many, >= 1; the paper's code makes 11.

    Shape: features (n, d), labels (n,); the number is not bounded.

    Use it when: ranking many models for one target by what a linear probe on them will reach.
    Not when: comparing targets (it depends on their labels), or for what full fine-tuning will reach.

    Cost: O(n d min(n, d)) once and O(min(n, d) c) an iteration; memory O(d² + c d) from statistics.

    Notes: no intercept and no centring, as published. Turning, scaling and padding the features changes nothing.
    Features that say nothing, all zero for example, get the evidence of pure noise, which is the least there is.
    Labels that the features explain without any rest have no highest evidence; alpha / beta stops at 1e-12 of the
    largest eigenvalue, and the score is large. Below 1e-7 of it singular values take the place of the Gram matrix; from
    statistics they cannot, and digits are lost.

    Raises:
        Refused: fewer than two classes, no labels, NaN.

    Reference: You et al. 2021, equation 2 and algorithm 1; its fixed point as in You et al. 2022, algorithm 3.

    >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> good, bad = (Evidence(features=features, labels=torch.tensor(y)) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    >>> LogME().score(good) > LogME().score(bad)
    True
    """

    tolerance: float = 1e-6
    iterations: int = 100

    def __post_init__(self) -> None:
        require(self.tolerance > 0, "LogME needs tolerance > 0", self.tolerance, "Pass a number such as 1e-6.")
        require(self.iterations >= 1, "LogME needs iterations >= 1", self.iterations, "Pass a number such as 100.")

    def score(self, evidence: Evidence) -> float:
        """The mean log evidence of an example."""
        features, labels = evidence.need("features", "labels")
        score, ratio = self._of(Spectrum.of(features, labels))
        if ratio < 1e-7:  # almost no noise: what the Gram matrix squares away would show in the ninth digit
            score, _ = self._of(Spectrum.exact(features, labels))
        return score

    def score_from(self, statistics: ClassStatistics) -> float:
        """The same from streamed statistics, for more examples than fit into memory."""
        return self._of(Spectrum.from_statistics(statistics))[0]

    def _of(self, spectrum: Spectrum) -> tuple[float, float]:
        """The score, and the smallest alpha / beta of a class as a share of the largest eigenvalue."""
        sigma, x2, n = spectrum.sigma[:, None], spectrum.labels.square(), float(spectrum.counts.sum())
        rest = spectrum.rest  # of each class, what no w explains (c,)
        scale = float(spectrum.sigma.amax()) if len(sigma) else 1.0
        low, high = math.log(1e-12 * scale), math.log(1e12 * scale)
        v = torch.full_like(rest, math.log(scale))  # log(alpha / beta)
        last = last_step = torch.full_like(v, torch.nan)  # the first round has no secant
        for _ in range(self.iterations):
            u = v.exp()
            gamma = (sigma / (sigma + u)).sum(0)  # effective number of weights
            m2 = (sigma * x2 / (sigma + u).square()).sum(0)  # |m|²
            e2 = (x2 / (1 + sigma / u).square()).sum(0) + rest  # |F m - t|²
            step = (gamma * e2 / ((n - gamma) * m2)).log() - v
            slope = (step - last_step) / (v - last)  # the secant finds where the step is zero in far fewer rounds
            move = torch.where(slope < 0, -step / slope, step).clamp(-3, 3)
            last, last_step, v = v, step, (v + move).clamp(low, high)
            if bool(((v - last).abs() <= self.tolerance).all()):
                break
        u = v.exp()
        # at the best beta of this u, n / (e2 + u m2); the d - k directions without features cancel exactly
        noise = (rest + (x2 / (1 + sigma / u)).sum(0)) / n
        log_evidence = -0.5 * (n * (2 * math.pi * math.e * noise).log() + torch.log1p(sigma / u).sum(0))
        return float(log_evidence.mean()) / n, float(u.min()) / scale
