"""The beginning of a run: the ranking, the chosen source made ready, the audit before training, the baselines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headstart.core.device import accelerator_for
from headstart.core.surgery import with_head
from headstart.core.validate import Refused, require
from headstart.tasks import Task
from headstart.zoo import Skipped, Source
from headstart.zoo.audit import Audit, audit_before

from . import routes
from .cache import Cache, Progress
from .choice import Choice
from .directory import RunDirectory
from .prepared import prepare
from .rank import choose
from .scores import scores_named
from .settings import Tuning
from .trial import Trained, train

SPARE = 2_000  # unlabelled examples that are learnt from at most


def chosen(
    task: Task,
    sources: Sequence[Source],
    skipped: Sequence[Skipped],
    tuning: Tuning,
    cache: Cache,
    progress: Progress | None,
) -> tuple[dict[str, Source], Choice]:
    """The sources by name, and the ranking. Refuses when no source fits."""
    choice = choose(task, sources, cache=cache, budget=tuning.budget, seed=tuning.seed, workers=tuning.workers,
                    scores=scores_named(tuning.scores), skipped=skipped, progress=progress)  # fmt: skip
    if choice.best is None:
        raise Refused(f"A run needs a source that fits the task; got none in {tuning.zoo}. {choice.reason} "
                      "Name another zoo, such as dir:PATH.")  # fmt: skip
    return {source.name: source for source in sources}, choice


def start_of(task: Task, source: Source, tuning: Tuning, cache: Cache) -> routes.Start:
    """The chosen source, loaded, with the task's examples prepared for it."""
    labels = task.train.labels
    assert labels is not None
    some = range(min(SPARE, len(task.unlabelled)))
    spare = task.unlabelled.take(np.random.default_rng(tuning.seed).permutation(len(task.unlabelled))[some])
    return routes.Start(
        source=source,
        model=source.load().to(accelerator_for(tuning.device, "fp32").device),
        classes=len(task.classes),
        train=prepare(task.train.inputs, source.preprocess),
        labels=labels,
        features=cache.evidence(task.train, source).features,
        spare=prepare(spare.inputs, source.preprocess) if some else None,
        spare_features=cache.evidence(spare, source).features if some else None,
        steps=tuning.steps(len(labels)),
        batch_size=tuning.batch_size,
        augment=tuning.augment and task.modality == "image",
        seed=tuning.seed,
    )


def audited_before(start: routes.Start, task: Task, tuning: Tuning) -> Audit:
    """The audit before anything is trained; a failure that is not allowed ends the run here."""
    plain = with_head(start.model, start.classes, start.source.head).requires_grad_(True)
    audit = audit_before(start.source, plain, task, allow=tuning.allow)
    names = " ".join(one.name for one in audit.failures)
    require(audit.passed, "The audit before training must pass",
            "; ".join(f"{one.name}: {one.detail}" for one in audit.failures),
            f"Repair the source, or allow it by name: --allow {names}")  # fmt: skip
    return audit


def baselines(
    start: routes.Start, best: str, directory: RunDirectory, tuning: Tuning, progress: Progress | None
) -> dict[str, Trained]:
    """What the same network does without its pretraining: trained as long, frozen, and trained ten times as long."""
    rows = torch.arange(len(start.labels))
    made = {
        "scratch": routes.scratch(start, rows),
        "random": routes.random_features(start, rows, like=best),
        "patient": routes.patient_scratch(start, rows),
    }
    return {
        name: train(way, directory, f"baseline {name}", seed=tuning.seed, device=tuning.device, told=progress)
        for name, way in made.items()
    }
