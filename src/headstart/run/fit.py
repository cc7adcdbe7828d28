"""The main job: from a task and a zoo to a model, a report, and the proof that something was transferred."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from headstart.core.validate import require
from headstart.tasks import Task
from headstart.zoo import Source
from headstart.zoo.resolve import resolve

from . import routes as ways
from .begin import audited_before, baselines, chosen, start_of
from .cache import Cache, Progress
from .clock import Clock, now
from .directory import RunDirectory, refuse_or_resume
from .finish import Finished, finish
from .predict import Predictor
from .prepared import prepare
from .robustness import check_followed, check_possible
from .scores import DEFAULT
from .settings import ROUTES, Reading, Tuning, digest_of
from .threads import threads_for
from .trial import Trained, Tried, attempt, best_of, holdout_of, train

if TYPE_CHECKING:
    from collections.abc import Mapping


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
    scores: str = ",".join(DEFAULT),
    budget: float = 0.1,
    epochs: int = 10,
    batch_size: int = 32,
    folds: int = 5,
    augment: bool = False,
    workers: Literal["here", "ray"] = "here",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    allow: Sequence[str] = (),
    robustness: bool = False,
    radius: str = "8/255",
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
        scores: transferability scores to show, names joined by commas; they do not change the order.
        budget: what choosing may cost, as a share of fine-tuning every source.
        epochs: passes over the labelled examples; at least 16 and at most 400 steps. The baselines get as many.
        batch_size: examples a step.
        folds: of cross-validation, where the task has no validation part.
        augment: shift, turn and scale pictures a little while tuning.
        workers: "here", or "ray" to rank the sources on a cluster.
        device: "auto", "cpu" or "cuda".
        allow: audit findings that may fail, by name.
        robustness: also measure accuracy under common corruptions and under small changes made to mislead, on at most
            500 test pictures, by lot.
        radius: how far such a change may move a pixel, with pixels in 0..1; a number or a fraction.
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
        zoo=names, routes=tuple(routes), seed=seed, scores=scores, budget=budget, epochs=epochs,
        batch_size=batch_size, folds=folds, augment=augment, workers=workers, device=device, allow=tuple(allow),
        robustness=robustness, radius=radius,
    )  # fmt: skip
    return run(task, zoo, tuning, Reading(), out=out, cache=cache, progress=progress)


def run(
    task: Task, zoo: str | Sequence[str | Source], tuning: Tuning, reading: Reading, *, out: str | Path | None,
    cache: Cache | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """`fit_task` from settings that are already one object; `reading` is only written down."""
    tuning.checked()
    require(len(task.test) > 0, "A run needs test examples to judge on", 0, "Load the task with test_share > 0.")
    check_possible(task, tuning)
    settings = {"target": task.target, "reading": asdict(reading), "tuning": asdict(tuning)}
    digest, clock = digest_of(tuning, task), Clock()
    with ExitStack() as stack:
        path = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        refuse_or_resume(path, digest, settings)
        kept = cache or Cache(device=tuning.device)
        listed, skipped = resolve(zoo)
        stack.enter_context(threads_for(listed))
        sources, choice = chosen(task, listed, skipped, tuning, kept, progress)
        clock.lap("choose")
        directory = RunDirectory(path, digest, settings)
        stack.callback(directory.close)
        started = directory.recall("started", lambda: now())
        start = start_of(task, sources[str(choice.best)], tuning, kept)
        check_followed(task, start, tuning)
        before = audited_before(start, task, tuning)
        clock.lap("audit")
        tried, best, final = tuned(task, start, tuning, directory, progress)
        clock.lap("tune")
        compared = baselines(start, best.route, directory, tuning, progress)
        clock.lap("baselines")
        done = finish(Finished(
            task=task, choice=choice, start=start, tuning=tuning, reading=reading, tried=tried, best=best,
            trained=final, baselines=compared, before=before, directory=directory, seconds=clock, started=started,
            out=None if out is None else str(out), settings=settings, digest=digest,
            progress=progress,
            facts={name: {"licence": one.licence, "kind": one.kind, "facts": dict(one.facts)}
                   for name, one in sources.items()},
        ))  # fmt: skip
        answer = done.results["answer"]
        return Result(
            good=answer["verdict"] == "yes", accuracy=answer["accuracy"], interval=tuple(answer["interval"]),
            source=answer["source"], route=answer["route"], model=done.model,
            directory=None if out is None else path, results=done.results,
        )  # fmt: skip


def tuned(
    task: Task, start: ways.Start, tuning: Tuning, directory: RunDirectory, progress: Progress | None
) -> tuple[list[Tried], Tried, Trained]:
    """Every route compared on held-out labels, the best of them, and the model it gives on all training labels."""
    validation = prepare(task.validation.inputs, start.source.preprocess) if len(task.validation) else None
    held = holdout_of(start, tuning.folds, validation, task.validation.labels)
    tried = [
        attempt(name, ways.ALL[name], start, held, directory, device=tuning.device, told=progress)
        for name in tuning.routes
    ]
    best = best_of(tried, prefer="bayes" if start.spare is not None else "")
    way = ways.ALL[best.route](start, torch.arange(len(start.labels)))
    return tried, best, train(way, directory, best.route, seed=tuning.seed, device=tuning.device, told=progress)
