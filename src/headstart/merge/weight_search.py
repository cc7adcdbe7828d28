"""The weights of the models that score best on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart.core.validate import require
from headstart.core.weights import Weights

from .fisher_merging import FisherMerging


@dataclass(frozen=True)
class Search:
    """What was tried: weights and score of each try, the best weights, and the model they give."""

    tries: tuple[tuple[tuple[float, ...], float], ...]
    weights: tuple[float, ...]
    merged: dict[str, Tensor]


def search_weights(
    rule: FisherMerging,
    models: Sequence[Weights],
    importance: Sequence[Weights],
    score: Callable[[dict[str, Tensor]], float],
    *,
    tries: int = 51,
    seed: int = 0,
) -> Search:
    """The weights λ of the models whose merge scores highest.

    Args:
        rule: whose weights are searched.
        models: two or more.
        importance: their Fishers.
        score: merged weights -> a number on validation data of the target task, higher is better.
        tries: of two models λ_0 runs from 1 to 0 in as many equal steps; of more, so many draws from Dirichlet(1, ...).
        seed: of the draws.

    Cost: `tries` merges and scores.

    Raises:
        Refused: fewer than two models or tries, a score that is not finite, and what the rule refuses.
    """
    require(len(models) >= 2 <= tries, "A search needs two models and two tries", (len(models), tries), "Pass more.")
    if len(models) == 2:
        drawn = torch.linspace(1, 0, tries, dtype=torch.float64)
        choices = torch.stack([drawn, 1 - drawn], 1)
    else:
        lots = torch.rand(tries, len(models), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        choices = -(1 - lots).log()  # exponential numbers over their sum are Dirichlet(1, ...)
        choices /= choices.sum(1, keepdim=True)
    measured = rule.survey(models, importance=importance)
    best, table = None, []
    for weights in map(tuple, choices.tolist()):
        merged = replace(measured, weights=weights).merge(models)
        table.append((weights, float(score(merged))))
        require(math.isfinite(table[-1][1]), "A search needs finite scores", table[-1][1], "Repair the score.")
        if best is None or table[-1][1] > best[1]:
            best = weights, table[-1][1], merged
    assert best is not None
    return Search(tuple(table), best[0], best[2])
