"""Try the routes on labelled examples held out in turn, and train the one that did best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.validate import Refused
from headstart.tasks import wilson

from .directory import RunDirectory, saving
from .prepared import Prepared, logits_of
from .probe import folds_of
from .routes import Route, Start, Way

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What selection saw of one route.

    Attributes:
        route: its name.
        accuracy: on held-out labelled examples; None when there was nothing to hold out or the route failed.
        low: lower end of the 95 % Wilson interval.
        high: upper end.
        folds: accuracy of each fold.
        how: in words, what was held out.
        seconds: what trying it cost.
        steps: optimizer steps of one training.
        trainable: how many weights it changes.
        parameters: how many the model has.
        why_skipped: why it could not be tried, "" when it was.
    """

    route: str
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    folds: tuple[float, ...] = ()
    how: str = ""
    seconds: float = 0.0
    steps: int | None = None
    trainable: int | None = None
    parameters: int | None = None
    why_skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished model, the way it came and what that cost."""

    model: nn.Module
    way: Way
    seconds: float
    steps: int
    trainable: int
    parameters: int
    history: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """What the routes are compared on: a validation part, or else folds of the labelled examples.

    Args:
        fold: (n,) the fold of each labelled example, or None.
        validation: prepared validation examples, or None.
        labels: theirs.
    """

    fold: Tensor | None = None
    validation: Prepared | None = None
    labels: Tensor | None = None

    @property
    def says(self) -> str:
        """In words."""
        if self.validation is not None:
            return f"{len(self.validation)} validation examples"
        return f"{self.count}-fold cross-validation" if self.fold is not None else "nothing to hold out"

    @property
    def count(self) -> int:
        """How many trainings a comparison takes."""
        return int(self.fold.max()) + 1 if self.fold is not None else int(self.validation is not None)


def holdout_of(start: Start, folds: int, validation: Prepared | None, labels: Tensor | None) -> Holdout:
    """The validation part if there is one, else as many folds as the rarest class allows, up to `folds`."""
    if validation is not None and len(validation):
        return Holdout(validation=validation, labels=labels)
    fewest = int(start.labels.bincount(minlength=start.classes).min())
    return Holdout(fold=folds_of(start.labels, min(folds, fewest), start.seed)) if fewest >= 2 else Holdout()


def train(way: Way, directory: RunDirectory, name: str, *, seed: int, device: str, told: Told | None = None) -> Trained:
    """Do what is left of a way; a run that was killed here goes on from its last checkpoint."""
    began = time.perf_counter()
    parameters = sum(p.numel() for p in way.plain.parameters())
    if way.plan is None:
        trainable = sum(p.numel() for p in way.plain.parameters() if p.requires_grad)
        return Trained(model=way.plain.eval(), way=way, seconds=way.seconds, steps=0, trainable=trainable,
                       parameters=parameters, history=())  # fmt: skip
    trainable = sum(p.numel() for p in way.plan.trainable())
    with saving(directory.path):
        fitted = fit(
            way.plan,
            device=device,
            seed=seed,
            checkpoint=directory.checkpoint(name),
            resume=True,
            progress=None if told is None else partial(told, name),
        )
    return Trained(model=fitted.model, way=way, seconds=way.seconds + time.perf_counter() - began, steps=way.plan.steps,
                   trainable=trainable, parameters=parameters, history=tuple(fitted.history["task"]))  # fmt: skip


def attempt(
    route: str, make: Route, start: Start, held: Holdout, directory: RunDirectory,
    *, device: str, told: Told | None = None,
) -> Tried:  # fmt: skip
    """Compare a route by what it gets right on examples it did not see; every fold is remembered.

    A route that this source cannot take (no layer that LoRA fits, say) is left out with the reason.
    """
    label = f"{route} {start.source.name}"

    def whole() -> Any:
        one = partial(_fold, route, make, start, held, directory, device=device, told=told)
        parts = [directory.recall(f"held out {label} {k}", partial(one, k=k)) for k in range(held.count)]
        right = [one for part in parts for one in part["right"]]
        low, high = wilson(sum(right), len(right))
        return asdict(Tried(
            route=route, accuracy=sum(right) / len(right), low=low, high=high, how=held.says,
            folds=tuple(sum(part["right"]) / len(part["right"]) for part in parts),
            seconds=sum(part["seconds"] for part in parts),
            **{name: parts[0][name] for name in ("steps", "trainable", "parameters")},
        ))  # fmt: skip

    try:
        if not held.count:
            make(start, torch.arange(len(start.labels)))  # whether it fits the source at all
            return Tried(route=route, how=held.says)
        made = directory.recall(f"tried {label}", whole)
    except (Refused, ImportError) as problem:
        return Tried(route=route, how=held.says, why_skipped=str(problem))
    return Tried(**{**made, "folds": tuple(made["folds"])})


def _fold(
    route: str, make: Route, start: Start, held: Holdout, directory: RunDirectory, *, k: int, device: str,
    told: Told | None,
) -> dict[str, Any]:  # fmt: skip
    """Train on all folds but one (or on everything, where there is a validation part) and look at what was left out."""
    began = time.perf_counter()
    everything = torch.arange(len(start.labels))
    if held.fold is None:
        assert held.validation is not None
        assert held.labels is not None
        trained = train(make(start, everything), directory, route, seed=start.seed, device=device, told=told)
        right = logits_of(trained.model, held.validation).argmax(1) == held.labels
    else:
        name, left = f"{route} fold {k + 1} of {held.count}", everything[held.fold == k]
        way = make(start, everything[held.fold != k])
        trained = train(way, directory, name, seed=start.seed, device=device, told=told)
        right = logits_of(trained.model, start.train, left).argmax(1) == start.labels[left]
        directory.checkpoint(name).unlink(missing_ok=True)
    return {"right": right.tolist(), "seconds": time.perf_counter() - began, "steps": trained.steps,
            "trainable": trained.trainable, "parameters": trained.parameters}  # fmt: skip


def best_of(tried: list[Tried], *, prefer: str = "") -> Tried:
    """The highest held-out accuracy; a tie goes to `prefer` (which learnt from unlabelled examples too), then to the
    route named first, which is the cheaper one.

    Without anything held out, LP-FT is taken where it was asked for: it is the safest with few labels.

    Raises:
        Refused: no route could be tried.
    """
    possible = [one for one in tried if not one.why_skipped]
    if not possible:
        raise Refused(
            "A run needs a route that works on its source; got "
            + "; ".join(f"{one.route}: {one.why_skipped}" for one in tried)
            + ". Name other --routes or another --zoo."
        )
    if all(one.accuracy is None for one in possible):
        return next((one for one in possible if one.route == "lpft"), possible[0])
    return max(possible, key=lambda one: (-1.0 if one.accuracy is None else one.accuracy, one.route == prefer))
