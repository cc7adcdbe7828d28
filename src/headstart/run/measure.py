"""The first two stages for one source: scores with intervals, a closed-form probe, then a cross-validated one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from headstart import __version__

from .bootstrap import block_statistics, estimate, half_samples
from .cache import Halted
from .choice import Estimate
from .extraction import reason
from .keys import digest
from .probe import STRENGTHS, closed_form, cross_validated
from .scores import DECIDING, scores_named

if TYPE_CHECKING:
    from headstart.core.evidence import Score
    from headstart.tasks import Examples
    from headstart.zoo import Source

    from .cache import Cache

RESAMPLES = 24
FOLDS, REPEATS = 5, 3
ITERATIONS = 25  # of the logistic solver, typical; only for counting operations


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every job of one `choose` shares; `scores` by name."""

    cache: Cache
    examples: Examples
    classes: int
    seed: int
    scores: Mapping[str, Score]

    def key(self, stage: str, source: Source, **also: Any) -> dict[str, Any]:
        """Everything that decides the result of a stage for a source."""
        labels = [] if self.examples.labels is None else self.examples.labels.tolist()
        return {
            "stage": stage,
            "evidence": self.cache.key(self.examples, source),
            "labels": digest(labels),
            "seed": self.seed,
            "version": __version__,
            **also,
        }


def measure(setting: Setting, source: Source) -> dict[str, Any]:
    """Scores with intervals and the leave-one-out ridge of one source; {"why": reason} when it cannot be used.

    Cost: extraction where the cache misses, then `RESAMPLES` evaluations of each score on half of the rows.
    """
    try:
        evidence = setting.cache.evidence(setting.examples, source)
        operations = setting.cache.operations(setting.examples, source)
    except Halted:
        raise
    except Exception as error:
        return {"why": reason(error)}
    assert evidence.labels is not None
    halves = half_samples(evidence.labels, RESAMPLES, setting.seed)
    statistics = block_statistics(evidence, halves)
    found = {name: estimate(score, evidence, halves, statistics) for name, score in setting.scores.items()}
    accuracy, right = closed_form(evidence.features, evidence.labels)
    n, d = evidence.features.shape
    return {
        "scores": {name: asdict(value) for name, value in found.items() if value is not None},
        "deciding": {name: score.score(evidence) for name, score in scores_named(DECIDING).items()},
        "accuracy": accuracy,
        "right": right.int().tolist(),
        "operations": operations,
        "width": d,
        "counted": (len(found) * (1 + RESAMPLES // 2) + 2) * 2 * n * d * min(n, d),
    }


def probe(setting: Setting, source: Source) -> dict[str, Any]:
    """The cross-validated logistic probe of one source."""
    evidence = setting.cache.evidence(setting.examples, source)
    assert evidence.labels is not None
    repeats = repeats_for(len(evidence.labels))
    found = cross_validated(evidence.features, evidence.labels, folds=FOLDS, repeats=repeats, seed=setting.seed)
    n, d = evidence.features.shape
    fits = FOLDS * repeats * len(STRENGTHS) * ITERATIONS
    return {
        "accuracy": found.accuracy,
        "right": found.right.tolist(),
        "strength": found.strength,
        "counted": fits * 4 * n * min(n, d) * setting.classes + 2 * n * d * min(n, d),
    }


def repeats_for(n: int) -> int:
    """Repeats of the cross-validation: three below 300 examples, one above 900, where folds differ little.

    >>> repeats_for(100), repeats_for(1000)
    (3, 1)
    """
    return max(1, min(REPEATS, 900 // n))


def sample(examples: Examples, rows: int, seed: int) -> Examples:
    """At most `rows` examples, every class with its share and at least two where it has them; in their order.

    >>> from headstart.tasks import Examples, Texts
    >>> many = Examples(inputs=Texts("abcd"), names=tuple("abcd"), labels=torch.tensor([0, 0, 1, 1]))
    >>> len(sample(many, 100, seed=0)), len(sample(many, 2, seed=0))
    (4, 4)
    """
    if len(examples) <= rows:
        return examples
    labels = examples.labels
    assert labels is not None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: max(2, round(rows * len(members) / len(labels)))])
    return examples.take(torch.cat(chosen).sort().values)


def estimate_of(record: Mapping[str, float]) -> Estimate:
    """The estimate that a cached record holds."""
    return Estimate(value=record["value"], low=record["low"], high=record["high"])
