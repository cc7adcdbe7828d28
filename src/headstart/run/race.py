"""Which of the last few sources gains most from fine-tuning: short ones, on held-out folds, by successive halving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .tune import FOLDS, Pull, full_steps, training_cost

if TYPE_CHECKING:
    from headstart.zoo import Source

LEAST = 12  # optimizer steps below which a fine-tune says nothing,
SHARE = 4  # and the share of a whole one, a quarter


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What fine-tuning added to the probe on the same held-out examples: mean and standard error, after `steps`."""

    mean: float
    error: float
    steps: int

    @classmethod
    def of(cls, results: Sequence[Mapping[str, list[int]]], steps: int) -> Gain:
        """The paired difference over the held-out examples of several pulls."""
        pairs = [(t, p) for result in results for t, p in zip(result["tuned"], result["probe"], strict=True)]
        difference = torch.tensor([tuned - probe for tuned, probe in pairs], dtype=torch.float64)
        # one wrong example in n is as fine as n examples can see, so equality is not certainty
        spread = max(float(difference.var(correction=0)), 1 / len(pairs))
        return cls(mean=float(difference.mean()), error=(spread / len(pairs)) ** 0.5, steps=steps)


def expected(gains: Mapping[str, Gain], names: Sequence[str]) -> dict[str, Gain]:
    """What fine-tuning will add to every source, raced or not: measured gains drawn together as their noise demands.

    A random-effects model (DerSimonian and Laird 1986): gains spread around a common mean by t², which is what their
    spread leaves over once the errors of measuring are taken off. A gain keeps the share t² / (t² + error²) of its
    distance from that mean, so that the luck of a short race does not decide; one that was not raced gets the mean.

    >>> found = expected({"a": Gain(mean=0.1, error=0.1, steps=9), "b": Gain(mean=-0.1, error=0.1, steps=9)}, "abc")
    >>> round(found["a"].mean, 3), round(found["c"].mean, 3)
    (0.05, 0.0)
    """
    if not gains:
        return {}
    weights = {name: gain.error**-2 for name, gain in gains.items()}
    total = sum(weights.values())
    mean = sum(weights[name] * gain.mean for name, gain in gains.items()) / total
    excess = sum(weights[name] * (gain.mean - mean) ** 2 for name, gain in gains.items()) - (len(gains) - 1)
    spread = max(0.0, excess / (total - sum(w * w for w in weights.values()) / total)) if len(gains) > 1 else 0.0
    found = {}
    for name in names:
        own, error = (gains[name].mean, gains[name].error) if name in gains else (mean, math.inf)
        kept = spread / (spread + error**2)
        found[name] = Gain(
            mean=mean + kept * (own - mean),
            error=math.sqrt((1 - kept) * spread + (1 - kept) ** 2 / total),
            steps=gains[name].steps if name in gains else 0,
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A source in the race, with its cross-validated probe and its cost."""

    source: Source
    accuracy: float
    strength: float
    operations: int


def race(
    finalists: Sequence[Finalist],
    run: Callable[[list[Pull]], Iterable[Mapping[str, list[int]]]],
    *,
    n: int,
    allowance: float,
) -> tuple[dict[str, Gain], float]:
    """Fine-tune the finalists for a few steps, keep the better half, give it more steps, until two are left.

    Every rung gets the same share of the allowance; where that buys nothing, there are fewer rungs, or no race at all.
    Each entrant is held out on every fold and runs for a quarter of a whole fine-tune or more: on one fold, or shorter,
    the luck of thirty examples chose worse than no race at all (benchmarks/choose.py). A source's standing is its
    cross-validated probe plus what fine-tuning added to the probe on the same held-out folds: the paired gain is far
    less noisy than the fine-tuned accuracy.

    Args:
        finalists: two or more sources; fewer are not worth a race.
        run: executes pulls and yields their results in order.
        n: labelled examples.
        allowance: floating point operations that may be spent.

    Returns:
        name -> gain at the longest length the source reached, and the operations spent.
    """
    gains: dict[str, Gain] = {}
    left, spent, trained = list(finalists), 0.0, n - n // FOLDS
    prices = {one.source.name: training_cost(one.operations, 1, trained) for one in left}
    rungs = max(1, (len(left) - 1).bit_length())
    while rungs > 1 and not affordable(list(prices.values()), allowance / rungs, full_steps(n))[0]:
        rungs -= 1
    for rung in range(rungs):
        asked = [prices[one.source.name] for one in left]
        entrants, steps = affordable(asked, (allowance - spent) / (rungs - rung), full_steps(n))
        if entrants < 2:
            break
        left = left[:entrants]
        jobs = [Pull(source=o.source, fold=k, steps=steps, strength=o.strength) for o in left for k in range(FOLDS)]
        results = list(run(jobs))
        for i, one in enumerate(left):
            gains[one.source.name] = Gain.of(results[i * FOLDS : (i + 1) * FOLDS], steps)
        spent += steps * FOLDS * sum(asked[:entrants])
        left.sort(key=lambda one: -(one.accuracy + gains[one.source.name].mean))
        left = left[: max(2, len(left) // 2)]
    return gains, spent


def affordable(prices: Sequence[float], share: float, longest: int) -> tuple[int, int]:
    """How many sources can enter a rung, on every fold, and for how many steps; (0, 0) when two cannot.

    Args:
        prices: of one step of each source, in the order in which they may enter.
        share: what the rung may cost.
        longest: steps of a whole fine-tune.

    >>> affordable([1, 1, 1, 1], 480, 120), affordable([1, 1, 1, 1], 200, 120), affordable([1, 1, 1, 1], 150, 120)
    ((4, 40), (2, 33), (0, 0))
    """
    for entrants in range(len(prices), 1, -1):
        steps = min(longest, int(share / (FOLDS * sum(prices[:entrants]))))
        if steps >= max(LEAST, longest / SHARE):
            return entrants, steps
    return 0, 0
