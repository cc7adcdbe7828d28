"""What a run was asked to do: plain data that becomes flags, is written to run.json, and can be read back."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from headstart.core.validate import Refused, one_of, require

from .scores import DEFAULT, scores_named

if TYPE_CHECKING:
    from headstart.tasks import Task

ROUTES = ("probe", "bayes", "lpft", "lora", "full")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read the target: what `load_task` takes besides the target itself."""

    labels_per_class: int | None = None
    """Keep this many labels of each class and treat the rest as unlabelled; by default every label is used."""
    test_share: float = 0.25
    """Share of each class to test on, where the target brings no test part."""
    validation_share: float = 0.15
    """Share of each class to validate on, where the target brings no validation part."""
    image_column: str | None = None
    """Column with picture files, relative to the table."""
    text_column: str | None = None
    """Column with texts."""
    feature_columns: tuple[str, ...] = ()
    """Numeric columns; by default all of them but the label."""
    label_column: str | None = None
    """Column with the class; by default the one called label, class, target or y."""
    split_column: str | None = None
    """Column that says train, validation or test."""
    missing_labels: Literal["refuse", "unlabelled"] = "refuse"
    """Whether rows without a label are refused, or taken as unlabelled examples."""
    label_type: Literal["auto", "text"] = "auto"
    """Take text for a label column that mixes numbers and words."""
    max_unreadable: float = 0.1
    """Skip unreadable pictures (each is named) up to this share."""
    split: str | None = None
    """A split.json of an earlier run; the shares and labels per class are then not used."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `load_task`."""
        return asdict(self) | {"feature_columns": self.feature_columns or None}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How to choose and tune; the same settings give the same model on the same machine."""

    zoo: str = "mini"
    """Where to start from: mini, mini:NAME, timm:NAME, hf:ORG/NAME, dir:PATH; commas join."""
    routes: tuple[str, ...] = ROUTES
    """Ways to move the knowledge across that are tried: probe bayes lpft lora full."""
    seed: int = 0
    """Of the split and of everything random."""
    scores: str = ",".join(DEFAULT)
    """Transferability scores to show: commas join names, all shows every one. They do not change the order."""
    budget: float = 0.1
    """What choosing may cost, as a share of fine-tuning every source."""
    epochs: int = 10
    """Passes over the labelled examples when tuning; the baselines get the same number of steps."""
    batch_size: int = 32
    """Examples a step."""
    folds: int = 5
    """Cross-validation folds, where there is no validation part."""
    augment: bool = False
    """Shift, turn and scale pictures a little while tuning; pays from about a hundred steps on."""
    workers: Literal["here", "ray"] = "here"
    """Where sources are ranked: here, or ray (a Ray cluster)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    allow: tuple[str, ...] = ()
    """Audit findings that may fail, by name."""
    robustness: bool = False
    """Also measure, of pictures, accuracy under common corruptions and under small changes made to mislead."""
    radius: str = "8/255"
    """With robustness: how far such a change may move a pixel, with pixels in 0..1."""

    def checked(self) -> Tuning:
        """These settings, if they make sense.

        Raises:
            Refused: an unknown word (with the nearest known one), or a number out of range.
        """
        require(bool(self.routes), "A run needs at least one route", "none", f"Choose from: {', '.join(ROUTES)}.")
        for route in self.routes:
            one_of("A route", route, ROUTES)
        scores_named(self.scores)
        one_of("workers", self.workers, ["here", "ray"])
        one_of("device", self.device, ["auto", "cpu", "cuda"])
        require(0 < self.budget <= 1, "budget must be a share above 0 and up to 1", self.budget, "Pass 0.1 or so.")
        for name, least in (("epochs", 1), ("batch_size", 2), ("folds", 2), ("seed", 0)):
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}", value, "Raise it.")
        from headstart.zoo.audit import ALLOWED

        from .attacks import radius_of

        radius_of(self.radius)

        for name in self.allow:
            one_of("allow", name, ALLOWED)
        return self

    def steps(self, examples: int) -> int:
        """Optimizer steps for that many labelled examples: the asked epochs, but at least 16 and at most 400 steps.

        >>> Tuning().steps(100), Tuning().steps(10), Tuning().steps(10**6)
        (32, 16, 400)
        """
        return min(400, max(16, math.ceil(self.epochs * examples / self.batch_size)))


def digest_of(tuning: Tuning, task: Task) -> str:
    """What tells two runs apart: the settings and the content and split of the task."""
    content = json.dumps({"tuning": asdict(tuning), "task": task.manifest}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def filled(kind: type, values: Mapping[str, Any]) -> Any:
    """A settings dataclass from JSON values; lists become tuples, unknown names and wrong types are refused."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    ready = {}
    for name, value in values.items():
        one_of("A setting", name, known)
        ready[name] = tuple(value) if isinstance(value, list) else value
        require(_fits(ready[name], hints[name]), f"{name} must be {hints[name]}", repr(value), "Correct the file.")
    return kind(**ready)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def command(target: str, reading: Reading, tuning: Tuning, out: str) -> str:
    """The command line that asks for this run; only what differs from the defaults.

    >>> command("digits", Reading(labels_per_class=10), Tuning(augment=True), "runs/digits")
    'headstart fit digits --labels-per-class 10 --augment --out runs/digits'
    """
    words = ["headstart", "fit", target]
    for settings in (reading, tuning):
        for f in fields(settings):
            value, default = getattr(settings, f.name), f.default
            if value == default or default is MISSING:
                continue
            flag = "--" + f.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join([*words, "--out", out])


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run.json, given the file or its directory.

    Raises:
        Refused: there is none, or it is not one.
    """
    file = path / "run.json" if path.is_dir() else path
    require(file.is_file(), "--from needs the run.json of an earlier run", file, "Check the path.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["format"] == 1 and isinstance(content["settings"], dict)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise Refused(f"--from needs a run.json that headstart wrote; got {file}. Point at DIR/run.json.")
    return dict(content)
