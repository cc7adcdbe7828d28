"""The main job: from a task and a zoo to a model, a report, and the proof that something was transferred."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.device import accelerator_for
from ..core.surgery import with_head
from ..core.validate import Refused, require
from ..tasks import Task
from ..zoo import Skipped, Source
from . import routes as ways
from .cache import Cache, Progress
from .choice import Choice
from .directory import RunDirectory, refuse_or_resume
from .finish import Finished, finish
from .predict import Predictor
from .prepared import prepare
from .settings import ROUTES, Reading, Tuning, digest_of
from .trial import Trained, attempt, best_of, holdout_of, train

if TYPE_CHECKING:
    from collections.abc import Mapping

PATIENCE = 10  # how many times the steps the patient baseline gets


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run found.

    Attributes:
        good: whether the transferred model beat the baselines and the audit passed.
        accuracy: on the sealed test labels.
        interval: its 95 % interval.
        source: where the model comes from.
        route: how it was moved.
        model: predicts the class of raw inputs.
        directory: where everything was written; None when nothing was asked to be kept.
        results: the content of results.json.
    """

    good: bool
    accuracy: float
    interval: tuple[float, float]
    source: str
    route: str
    model: Predictor = field(repr=False)
    directory: Path | None
    results: Mapping[str, Any] = field(repr=False)


def fit_task(
    task: Task,
    zoo: str | Sequence[str | Source] = "mini",
    *,
    out: str | Path | None = None,
    routes: Sequence[str] = ROUTES,
    seed: int = 0,
    budget: float = 0.15,
    epochs: int = 10,
    batch_size: int = 32,
    folds: int = 3,
    augment: bool = True,
    workers: str = "here",
    device: str = "auto",
    allow: Sequence[str] = (),
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Result:
    """Choose a source, move what it knows to the task, and prove on sealed labels whether that was worth it.

    Args:
        task: from `load_task`.
        zoo: where to start from; names joined by commas, or sources.
        out: a new directory for the model, the report and the records; None keeps nothing but the returned result.
        routes: what to try: "probe", "bayes", "lpft", "lora", "full".
        seed: of everything random here (the split has its own).
        budget: what choosing may cost, as a share of fine-tuning every source.
        epochs: passes over the labelled examples; at least 30 and at most 400 steps. The baselines get as many.
        batch_size: examples a step.
        folds: of cross-validation, where the task has no validation part.
        augment: shift, turn and scale pictures a little while tuning.
        workers: "here", or "ray" to rank the sources on a cluster.
        device: "auto", "cpu" or "cuda".
        allow: audit findings that may fail, by name.
        cache: where features are kept.
        progress: called with (what, done, in all).

    Returns:
        the result; `good` is False when the run says no.

    Raises:
        Refused: bad input; `out` holds something else; no source fits; the audit before training failed.

    Cost: a ranking within `budget`, then for each route (folds + 1) short trainings, and three baselines.
    """
    names = zoo if isinstance(zoo, str) else ",".join(one if isinstance(one, str) else one.name for one in zoo)
    tuning = Tuning(
        zoo=names, routes=tuple(routes), seed=seed, budget=budget, epochs=epochs, batch_size=batch_size, folds=folds,
        augment=augment, workers=workers, device=device, allow=tuple(allow),
    )  # fmt: skip
    return run(task, zoo, tuning, Reading(), out=out, cache=cache, progress=progress)


def run(
    task: Task, zoo: str | Sequence[str | Source], tuning: Tuning, reading: Reading, *, out: str | Path | None,
    cache: Cache | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """`fit_task` from settings that are already one object; `reading` is only written down."""
    require(len(task.test) > 0, "A run needs test examples to judge on", 0, "Load the task with test_share > 0.")
    settings = {"target": task.target, "reading": asdict(reading), "tuning": asdict(tuning)}
    digest, clock = digest_of(tuning, task), Clock()
    with ExitStack() as stack:
        path = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        refuse_or_resume(path, digest, settings)
        kept = cache or Cache(device=tuning.device)
        sources, choice = chosen(task, zoo, tuning, kept, progress)
        clock.lap("choose")
        directory = RunDirectory(path, digest, settings)
        started = directory.recall("started", lambda: now())
        start = start_of(task, sources[str(choice.best)], tuning, kept)
        before = audited_before(start, task, tuning)
        clock.lap("audit")
        validation = prepare(task.validation.inputs, start.source.preprocess) if len(task.validation) else None
        held = holdout_of(start, tuning.folds, validation, task.validation.labels)
        common = {"device": tuning.device, "told": progress}
        tried = [attempt(name, ways.ALL[name], start, held, directory, **common) for name in tuning.routes]
        best = best_of(tried)
        rows = torch.arange(len(start.labels))
        final = train(ways.ALL[best.route](start, rows), directory, best.route, seed=tuning.seed, **common)
        clock.lap("tune")
        compared = baselines(start, directory, tuning, progress)
        clock.lap("baselines")
        done = finish(Finished(
            task=task, choice=choice, start=start, tuning=tuning, reading=reading, tried=tried, best=best,
            trained=final, baselines=compared, before=before, directory=directory, seconds=clock, started=started,
            out=None if out is None else str(out), settings=settings, digest=digest,
            facts={name: {"licence": one.licence, "kind": one.kind, "facts": dict(one.facts)}
                   for name, one in sources.items()},
        ))  # fmt: skip
        answer = done.results["answer"]
        return Result(
            good=answer["verdict"] == "yes", accuracy=answer["accuracy"], interval=tuple(answer["interval"]),
            source=answer["source"], route=answer["route"], model=done.model,
            directory=None if out is None else path, results=done.results,
        )  # fmt: skip


class Clock(dict[str, float]):
    """Seconds by stage; `lap` ends one."""

    def __init__(self) -> None:
        super().__init__()
        self.began = self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage: what passed since the last lap goes on its account."""
        at = time.perf_counter()
        self[stage] = self.get(stage, 0.0) + at - self.last
        self.last = at
        self["total"] = at - self.began


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def chosen(
    task: Task, zoo: str | Sequence[str | Source], tuning: Tuning, cache: Cache, progress: Progress | None
) -> tuple[dict[str, Source], Choice]:
    """The zoo by name, and the ranking. Refuses when no source fits."""
    from ..zoo.resolve import resolve
    from .rank import choose

    sources, skipped = resolve(zoo)
    choice = choose(task, sources, cache=cache, budget=tuning.budget, seed=tuning.seed, workers=tuning.workers,
                    skipped=skipped, progress=progress)  # fmt: skip
    if choice.best is None:
        raise Refused(f"A run needs a source that fits the task; got none in {tuning.zoo}: {choice.reason} "
                      f"{_why(choice.skipped)}Name another zoo.")  # fmt: skip
    return {source.name: source for source in sources}, choice


def _why(skipped: Sequence[Skipped]) -> str:
    return "".join(f"{one.name}: {one.why} " for one in skipped[:3])


def start_of(task: Task, source: Source, tuning: Tuning, cache: Cache) -> ways.Start:
    """The chosen source, loaded, with the task's labelled examples prepared for it."""
    labels = task.train.labels
    assert labels is not None
    model = source.load().to(accelerator_for(tuning.device, "fp32").device)
    return ways.Start(
        source=source, model=model, classes=len(task.classes), train=prepare(task.train.inputs, source.preprocess),
        labels=labels, features=cache.evidence(task.train, source).features, steps=tuning.steps(len(labels)),
        batch_size=tuning.batch_size, augment=tuning.augment and task.modality == "image", seed=tuning.seed,
    )  # fmt: skip


def audited_before(start: ways.Start, task: Task, tuning: Tuning) -> Any:
    """The audit before anything is trained; a failure that is not allowed ends the run here."""
    from ..zoo.audit import audit_before

    plain = with_head(start.model, start.classes, start.source.head).requires_grad_(True)
    audit = audit_before(start.source, plain, task, allow=tuning.allow)
    require(audit.passed, "The audit before training must pass",
            "; ".join(f"{one.name}: {one.detail}" for one in audit.failures),
            f"Repair the source, or allow it by name: --allow {' '.join(one.name for one in audit.failures)}")  # fmt: skip
    return audit


def baselines(
    start: ways.Start, directory: RunDirectory, tuning: Tuning, progress: Progress | None
) -> dict[str, Trained]:
    """What the same network does without its pretraining: trained as long, trained ten times as long, and frozen."""
    rows = torch.arange(len(start.labels))
    made = {
        "scratch": ways.scratch(start, rows),
        "random": ways.random_features(start, rows),
        "patient": ways.scratch(start, rows, times=PATIENCE),
    }
    return {name: train(way, directory, name, seed=tuning.seed, device=tuning.device, told=progress)
            for name, way in made.items()}  # fmt: skip
