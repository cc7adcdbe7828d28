"""`hs.choose`: the ranking for people who have a task and a zoo's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .scores import DEFAULT, scores_named

if TYPE_CHECKING:
    from headstart.tasks import Task
    from headstart.zoo import Source

    from .cache import Cache, Progress
    from .choice import Choice


def choose(
    task: Task,
    zoo: str | Sequence[str | Source] = "mini",
    *,
    scores: str = ",".join(DEFAULT),
    budget: float = 0.1,
    seed: int = 0,
    workers: Literal["here", "ray"] = "here",
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Which source to start from: ranked, with predicted accuracies and how far the first place can be trusted.

    Args:
        task: from `load_task`; only its labelled training examples are looked at.
        zoo: names joined by commas ("mini", "timm:resnet18", "hf:ORG/NAME", "dir:PATH"), or sources.
        scores: transferability scores to show, names joined by commas, or "all"; they do not change the order.
        budget: what it may cost, as a share of fine-tuning every source.
        seed: of folds, resamples and fine-tunes.
        workers: "here", or "ray" for a cluster.
        cache: where features are kept.
        progress: called with (what, done, in all).

    Raises:
        Refused: an unknown zoo (with the nearest known one), or a task without labels.
    """
    from headstart.zoo.resolve import resolve

    from .rank import choose as rank

    sources, skipped = resolve(zoo)
    return rank(task, sources, cache=cache, budget=budget, seed=seed, workers=workers,
                scores=scores_named(scores), skipped=skipped, progress=progress)  # fmt: skip
