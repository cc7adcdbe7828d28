"""How sure a score is, and how far two scores agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headstart.core.evidence import Evidence, Score
from headstart.core.validate import Refused, require

from .choice import Estimate

Z = 1.959963984540054


def half_samples(labels: Tensor, resamples: int, seed: int) -> list[Tensor]:
    """Stratified halves of the rows, drawn without replacement: ceil(n_c / 2) rows of every class.

    A bootstrap draws rows twice, and a row's copy is its own nearest neighbour, which makes any score that looks at
    neighbours or within-class spread too high. Halves have no copies, and the spread of a statistic over halves
    estimates its standard error on all rows without a correction (the delete-half jackknife, Shao and Wu 1989).

    >>> [len(rows) for rows in half_samples(torch.tensor([0, 0, 0, 0, 1, 1]), 2, seed=0)]
    [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == label)[:, 0] for label in torch.unique(labels)]

    def half(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[: (len(rows) + 1) // 2]]

    return [torch.cat([half(rows) for rows in members]).sort().values for _ in range(resamples)]


def estimate(score: Score, evidence: Evidence, halves: Sequence[Tensor]) -> Estimate | None:
    """A score with its 95 % interval over examples; None where the score refuses this evidence.

    Cost: `len(halves)` evaluations of the score on half of the rows.
    """
    try:
        value = score.score(evidence)
        values = [score.score(evidence.take(rows)) for rows in halves]
    except Refused:
        return None
    spread = Z * float(np.std(values, ddof=1)) if np.isfinite(values).all() else math.inf
    return Estimate(value=value, low=value - spread, high=value + spread)


def weighted_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's rank correlation in which the top counts more (additive hyperbolic weights, Vigna 2015).

    The same number as `scipy.stats.weightedtau`, without its second of import. NaN when all of x or of y are equal.

    >>> weighted_tau([1, 2, 3], [1, 2, 3]), weighted_tau([1, 2, 3], [3, 2, 1])
    (1.0, -1.0)
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    require(a.shape == b.shape and a.ndim == 1, "weighted_tau needs two rankings of one length", (len(x), len(y)),
            "Pass one figure a source in each.")  # fmt: skip
    below = np.tril_indices(len(a), -1)
    signs = [np.sign(v[:, None] - v[None])[below] for v in (a, b)]
    taus = []
    for first, second in ((a, b), (b, a)):
        rank = np.empty(len(a))
        rank[np.lexsort((second, first))[::-1]] = np.arange(len(a))
        weight = (1 / (rank[:, None] + 1) + 1 / (rank[None] + 1))[below]
        norm = math.sqrt((signs[0] ** 2 @ weight) * (signs[1] ** 2 @ weight))
        taus.append((signs[0] * signs[1]) @ weight / norm if norm else math.nan)
    return float(np.mean(taus))


def agreement(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Weighted Kendall between every two scores, over the sources that have both; left out below three sources.

    Args:
        figures: score -> source -> value.
    """
    table: dict[str, dict[str, float]] = {}
    for one, first in figures.items():
        for other, second in figures.items():
            both = [name for name in first if name in second]
            tau = weighted_tau([first[n] for n in both], [second[n] for n in both]) if len(both) > 2 else math.nan
            if math.isfinite(tau):
                table.setdefault(one, {})[other] = round(tau, 6)
    return table
