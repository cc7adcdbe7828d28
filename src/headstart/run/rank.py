"""Which source to start from: scores first, then probes, then short fine-tunes of the last few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headstart.core.validate import require
from headstart.zoo import Skipped

from .cache import Cache, Progress
from .choice import Choice
from .measure import Setting, sample
from .procedure import Procedure
from .remote import Workers, crew
from .scores import DEFAULT, scores_named
from .threads import threads_for

if TYPE_CHECKING:
    from headstart.core.evidence import Score
    from headstart.tasks import Task
    from headstart.zoo import Source


def choose(
    task: Task,
    sources: Sequence[Source],
    *,
    cache: Cache | None = None,
    budget: float = 0.1,
    seed: int = 0,
    rows: int = 1_000,
    workers: Workers = "here",
    scores: Mapping[str, Score] | None = None,
    skipped: Sequence[Skipped] = (),
    progress: Progress | None = None,
) -> Choice:
    """Rank pretrained models for a task, with predicted accuracies, and say how certain the first place is.

    Every source: transferability scores with intervals and an exact leave-one-out ridge. The better half: a logistic
    probe by repeated cross-validation. The last four: short fine-tunes on held-out folds by successive halving, as long
    as the budget allows. Only `task.train` is looked at.

    Args:
        task: what to learn.
        sources: candidates; those of another modality, and those that fail, are reported in `skipped`.
        cache: where features and results are kept; `Cache()` by default.
        budget: share of the cost of fine-tuning every source that may be spent, in (0, 1]; counted in floating point
            operations, so that the answer does not depend on the machine's speed.
        seed: of folds, resamples and fine-tunes.
        rows: labelled examples to use at most.
        workers: "here" or "ray"; the numbers are the same.
        scores: the scores to show, by name; those of `scores.DEFAULT` by default; they do not change the order.
        skipped: sources that were skipped before, to be carried along.
        progress: called with (what, done, of).

    Returns:
        A `Choice`; its `best` is None when no source fits the kind of data.

    Raises:
        Refused: a budget outside (0, 1], a task without labelled examples, a disk that is full.
    """
    require(0 < budget <= 1, "choose needs 0 < budget <= 1", budget, "Pass a share such as 0.1.")
    require(rows >= 10, "choose needs rows >= 10", rows, "Pass 100 or more.")
    unique = list({source.fingerprint + source.name: source for source in sources}.values())
    fitting = [source for source in unique if source.modality == task.modality]
    others = [Skipped(name=s.name, why=f"reads {s.modality} data, the task has {task.modality}")
              for s in unique if s.modality != task.modality]  # fmt: skip
    setting = Setting(
        cache=cache or Cache(),
        examples=sample(task.train, rows, seed),
        classes=len(task.classes),
        seed=seed,
        scores=scores_named(DEFAULT) if scores is None else scores,
    )
    run = Procedure(setting, crew(workers), workers == "here", budget, progress, [*skipped, *others])
    with threads_for(fitting):
        if fitting:
            run.measure(fitting)
        if run.forecasts:
            run.probe()
            run.race()
        return run.conclude(task)
