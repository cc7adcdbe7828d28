"""Generated weights judged: the best of several, and whether they are more than copies of the zoo's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.validate import require
from headstart.core.weights import Weights

from .weight_generator import WeightGenerator


def best_of(candidates: Sequence[Weights], score: Callable[[Weights], float]) -> tuple[Weights, float]:
    """The candidate that scores highest, and its score; judge on validation data, never on the test set, and report n.

    >>> best_of([{"w": torch.tensor(k)} for k in (1, 3, 2)], lambda weights: float(weights["w"]))
    ({'w': tensor(3)}, 3.0)
    """
    require(len(candidates) > 0, "best_of needs a candidate", 0, "Generate some.")
    scores = [score(weights) for weights in candidates]
    first = max(range(len(scores)), key=scores.__getitem__)
    return candidates[first], scores[first]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good generated weights are, over tasks; `nearest` far below `spacing` says they are copies of the zoo's.

    Attributes:
        trained: score of the weights trained for the tasks; None where none were given.
        reconstructed: score of those through the autoencoder.
        generated: mean score of samples.
        best: score of the best of n by the same score; an upper bound when this is not validation data.
        nearest: median distance of a sample to the nearest zoo model.
        spacing: median distance of a zoo model to its nearest neighbour.
    """

    trained: float | None
    reconstructed: float | None
    generated: float
    best: float
    nearest: float
    spacing: float


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A data set to generate for: labelled examples, a score of weights, and weights trained on it if there are any."""

    features: Tensor
    labels: Tensor
    score: Callable[[Weights], float]
    trained: Weights | None = None


def quality(
    made_by: WeightGenerator, tasks: Sequence[Judged], n: int = 5, *, generator: torch.Generator | None = None,
    extractor: str = "",
) -> Quality:  # fmt: skip
    """What to look at before samples are used: once for tasks of the zoo, once for unseen ones.

    Cost: `generate` of n for each task, and n + 2 scores.
    """
    require(len(tasks) > 0, "quality needs a task", 0, "Pass some.")
    generator = generator or torch.Generator().manual_seed(0)
    own, again, scores, distances = [], [], [], []
    for task in tasks:
        samples = made_by.generate(task.features, task.labels, n, generator=generator, extractor=extractor)
        scores.append([task.score(weights) for weights in samples])
        distances += [made_by.nearest(weights) for weights in samples]
        if task.trained is not None:
            own.append(task.score(task.trained))
            again.append(task.score(made_by.reconstruct(task.trained)))
    return Quality(
        trained=sum(own) / len(own) if own else None,
        reconstructed=sum(again) / len(again) if again else None,
        generated=float(torch.tensor(scores).mean()),
        best=float(torch.tensor(scores).amax(1).mean()),
        nearest=float(torch.tensor(distances).median()),
        spacing=made_by.spacing(),
    )
