"""How sure a score is, and how far two scores agree."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from headstart.core.evidence import Evidence, Score, StatisticsScore, classes_of
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused, require

from .choice import Estimate
from .probe import folds_of

Z90, Z95 = 1.6448536269514722, 1.959963984540054
BLOCKS = 32


@dataclass(frozen=True)
class Halves:
    """Stratified halves of the examples, drawn without replacement.

    A bootstrap draws rows twice, and a row's copy is its own nearest neighbour, which makes any score that looks at
    neighbours or within-class spread too high. Halves have no copies, and the spread of a statistic over halves
    estimates its standard error on all rows without a correction (the delete-half jackknife, Shao and Wu 1989).

    Attributes:
        rows: the rows of each half, in order.
        block: (n,) the block of each example, where every class is large enough to be dealt evenly into `BLOCKS`
            blocks; a half is then half of the blocks, so that its statistics are the sum of theirs. Else None.
        taken: (halves, BLOCKS) which blocks each half has; None without blocks.
    """

    rows: tuple[Tensor, ...]
    block: Tensor | None = None
    taken: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)


def half_samples(labels: Tensor, resamples: int, seed: int) -> Halves:
    """Stratified halves of the rows, ceil(n_c / 2) rows of every class; of blocks where every class fills them.

    >>> [len(rows) for rows in half_samples(torch.tensor([0, 0, 0, 0, 1, 1]), 2, seed=0).rows]
    [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)

    def half(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[: (len(rows) + 1) // 2]]

    if int(torch.unique(labels, return_counts=True)[1].min()) < BLOCKS:
        members = [torch.nonzero(labels == label)[:, 0] for label in torch.unique(labels)]
        halves = [torch.cat([half(rows) for rows in members]).sort().values for _ in range(resamples)]
        return Halves(rows=tuple(halves))
    block = folds_of(labels, BLOCKS, seed)
    taken = torch.zeros(resamples, BLOCKS, dtype=torch.bool)
    for row in taken:
        row[half(torch.arange(BLOCKS))] = True
    return Halves(rows=tuple(torch.nonzero(row[block])[:, 0] for row in taken), block=block, taken=taken)


def block_statistics(evidence: Evidence, halves: Halves) -> list[ClassStatistics] | None:
    """The statistics of each half from those of its blocks: one pass for all; None where rows are cheaper.

    Cost: O(n d²) once, then O(len(halves) BLOCKS d²); memory BLOCKS d² floats.
    """
    features, labels = evidence.need("features", "labels")
    if halves.block is None or halves.taken is None or len(features) < BLOCKS * features.shape[1]:
        return None
    labels, classes = classes_of(labels)
    blocks = [ClassStatistics.of(features[halves.block == k], labels[halves.block == k], classes)
              for k in range(BLOCKS)]  # fmt: skip
    return [reduce(operator.add, compress(blocks, row.tolist())) for row in halves.taken]


def estimate(
    score: Score, evidence: Evidence, halves: Halves, statistics: Sequence[ClassStatistics] | None = None
) -> Estimate | None:
    """A score with its 90 % interval over examples; None where the score refuses this evidence.

    Args:
        score: any score.
        evidence: what it is computed on.
        halves: from `half_samples`.
        statistics: of each half, from `block_statistics`; a `StatisticsScore` is read off them.

    Cost: `len(halves)` evaluations of the score on half of the rows, or on statistics.
    """
    try:
        value = score.score(evidence)
        if statistics is not None and isinstance(score, StatisticsScore):
            values = [score.score_from(half) for half in statistics]
        else:
            values = [score.score(evidence.take(rows)) for rows in halves.rows]
    except Refused:
        return None
    spread = Z90 * float(np.std(values, ddof=1)) if np.isfinite(values).all() else math.inf
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
