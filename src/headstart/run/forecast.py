"""From stage results to a ranking with predicted accuracies, and whether the first place is certain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.tasks import wilson

from .bootstrap import Z90, Z95
from .choice import Estimate, Ranked
from .measure import estimate_of
from .race import Gain
from .scores import DECIDING


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One source: what the stages said of it.

    Attributes:
        gain: what a short fine-tune added, where one was run.
        expected: what fine-tuning is expected to add, from the gains of all that were raced.
    """

    name: str
    measured: Mapping[str, Any]
    probed: Mapping[str, Any] | None
    gain: Gain | None
    expected: Gain | None = None

    @property
    def right(self) -> np.ndarray:
        """(n,) how often each example was right while held out, by the probe or, without one, the closed form."""
        return np.asarray((self.probed or self.measured)["right"], dtype=float)

    @property
    def raised(self) -> float:
        """What fine-tuning adds, never below 0: the better route would be kept."""
        return max(0.0, self.expected.mean) if self.expected else 0.0

    @property
    def error(self) -> float:
        """Standard error of the gain; 0 where the prediction does not rest on it."""
        return self.expected.error if self.expected and self.expected.mean > 0 else 0.0

    @property
    def accuracy(self) -> float:
        """The predicted accuracy."""
        return min(1.0, float(self.right.mean()) + self.raised)


def around(accuracy: float, n: int, error: float, tested: int | None = None) -> Estimate:
    """A predicted accuracy with a 90 % interval: Wilson's for n held-out examples, widened by the error of the gain.

    Args:
        accuracy: the prediction.
        n: labelled examples it was measured on.
        error: standard error of what fine-tuning is expected to add.
        tested: examples of the test whose result is predicted; None for the accuracy on endless new data.

    >>> around(0.9, 100, 0.0)
    Estimate(value=0.9, low=0.8396..., high=0.9392...)
    >>> around(0.9, 100, 0.0, tested=100)
    Estimate(value=0.9, low=0.8084..., high=0.9504...)
    """
    seen = n if tested is None else n * tested / (n + tested)  # the variance of a difference of two shares
    low, high = wilson(accuracy * seen, seen, Z90)
    return Estimate(
        value=accuracy,
        low=max(0.0, accuracy - math.hypot(accuracy - low, Z90 * error)),
        high=min(1.0, accuracy + math.hypot(high - accuracy, Z90 * error)),
    )


def difference(one: Forecast, other: Forecast) -> tuple[float, float]:
    """How much better `one` is predicted to be, and the standard error of that, paired over the same examples."""
    pairs = one.right - other.right
    n = len(pairs)
    error = math.sqrt(max(float(pairs.var()), 1 / n) / n + one.error**2 + other.error**2)
    return one.accuracy - other.accuracy, error


def first_places(forecasts: Sequence[Forecast], seed: int, resamples: int = 2000) -> dict[str, float]:
    """How often each source has the highest predicted accuracy when examples and gains are drawn anew.

    Args:
        forecasts: in order; equal accuracies count for the earlier one.
        seed: of the draws.
        resamples: how many.

    Cost: one (sources x n) by (n x resamples) product.
    """
    generator = np.random.default_rng(seed)
    right = np.stack([f.right for f in forecasts])  # (s, n)
    n = right.shape[1]
    accuracy = right @ (generator.multinomial(n, np.full(n, 1 / n), size=resamples).T / n)  # (s, resamples)
    raised = np.array([f.raised for f in forecasts])[:, None]
    error = np.array([f.error for f in forecasts])[:, None]
    gained = np.maximum(0, raised + error * generator.standard_normal(accuracy.shape))
    firsts = np.bincount((accuracy + gained).round(9).argmax(0), minlength=len(forecasts)) / resamples
    return {f.name: float(share) for f, share in zip(forecasts, firsts, strict=True)}


def ordered(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Best first: by predicted accuracy, but those that cannot be told from the best at 95 % by all the evidence.

    On few labels the accuracies of good sources differ by less than their noise. Nearest neighbours and LogME look at
    the same features in other ways and err elsewhere, so the mean rank of the three is steadier than any of them
    (benchmarks/choose.py). Still equal: what their own race measured, then the name.
    """
    order = sorted(forecasts, key=lambda f: (-round(f.accuracy, 9), -(f.gain.mean if f.gain else 0.0), f.name))
    near = [f for f in order if is_close(order[0], f)]
    columns = [{f.name: round(f.accuracy, 9) for f in near}]
    columns += [{f.name: f.measured["deciding"][score] for f in near} for score in DECIDING]
    ranks = [ranks_of(column) for column in columns]
    behind = [f for f in order if not is_close(order[0], f)]
    return sorted(near, key=lambda f: sum(rank[f.name] for rank in ranks)) + behind


def ranks_of(column: Mapping[str, float]) -> dict[str, float]:
    """1 for the highest value; equal ones share their mean rank.

    >>> ranks_of({"a": 0.9, "b": 0.8, "c": 0.9})
    {'a': 1.5, 'b': 3.0, 'c': 1.5}
    """
    down = sorted(column.values(), reverse=True)
    return {name: down.index(value) + (down.count(value) + 1) / 2 for name, value in column.items()}


def is_close(one: Forecast, other: Forecast) -> bool:
    """Whether `other` cannot be told from `one` at 95 %."""
    mean, error = difference(one, other)
    return mean <= Z95 * error


def ranking(forecasts: Sequence[Forecast], seed: int = 0, tested: int | None = None) -> tuple[Ranked, ...]:
    """The sources, best first, with what is known of each; intervals are for a test of that many examples."""
    order = ordered(forecasts)
    firsts = first_places(order, seed) if order else {}
    rows = []
    for place, one in enumerate(order, 1):
        n, base = len(one.right), float(one.right.mean())
        tuned = around(min(1.0, max(0.0, base + one.gain.mean)), n, one.gain.error, tested) if one.gain else None
        rows.append(
            Ranked(
                place=place,
                name=one.name,
                sure=firsts[one.name],
                predicted=around(one.accuracy, n, one.error, tested),
                basis="fine-tune" if one.gain and one.raised else "probe" if one.probed else "closed form",
                scores={name: estimate_of(score) for name, score in one.measured["scores"].items()},
                probe=around(base, n, 0.0, tested) if one.probed else None,
                tuned=tuned,
                close=place > 1 and is_close(order[0], one),
            )
        )
    return tuple(rows)


def labels_to_decide(one: Forecast, other: Forecast) -> int | None:
    """Labelled examples at which a difference of this size would be certain; None when there is no difference."""
    mean, error = difference(one, other)
    return math.ceil(len(one.right) * (Z95 * error / mean) ** 2) if mean > 0 else None
