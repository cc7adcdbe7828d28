"""A task: examples to learn from, and test labels that only `judge` sees, each look counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.core.validate import finite, require

from . import split
from .examples import Examples
from .found import Modality


def wilson(right: float, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval (95 % by default) of a share of `right` in `n`; unlike p ± z·se it stays in [0, 1].

    >>> [round(end, 3) for end in wilson(9, 10)]
    [0.596, 0.982]
    """
    share, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (1 - share) + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What one look at the sealed test labels said.

    Args:
        accuracy: share of right predictions.
        interval: its 95 % Wilson interval.
        n: number of test examples.
        look: how many times the test labels have now been looked at; 1 is the honest number.
        confusion: counts (c, c), rows = true class, columns = predicted.
        labels: the true labels (n,), unsealed by this look.
    """

    accuracy: float
    interval: tuple[float, float]
    n: int
    look: int
    confusion: Tensor
    labels: Tensor


class Seal:
    """Holds test labels and counts looks. A pickled or deep copy carries no labels, so none can be used uncounted."""

    def __init__(self, labels: Tensor | None) -> None:
        self.__labels = labels
        self.looks = 0

    def open(self) -> Tensor:
        """The labels; one look more."""
        labels = self.__labels
        require(
            labels is not None,
            "only the task that was loaded can judge",
            "a copy, which carries no test labels",
            "Send the predictions to the process that called load_task.",
        )
        assert labels is not None
        self.looks += 1
        return labels.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return Seal, (None,)

    def __repr__(self) -> str:
        return f"Seal(looks={self.looks})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What the user has, split and sealed; made by `load_task`.

    Args:
        name: a short word for folders and headings.
        modality: "image", "text" or "numeric".
        classes: the class names; labels index them.
        train: labelled examples.
        validation: labelled examples for selection; empty when only some labels a class were kept.
        test: examples without labels; `judge` has them.
        unlabelled: examples without labels that may be trained on.
        seed: of the split.
        target: what was loaded.
        manifest: sha256 over content, labels and split.
        notes: what loading noticed, such as skipped files.
        seal: the test labels.
    """

    name: str
    modality: Modality
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    unlabelled: Examples
    seed: int
    target: str
    manifest: str
    notes: tuple[str, ...] = ()
    seal: Seal = field(repr=False)

    @property
    def looks(self) -> int:
        """How many times the test labels have been looked at."""
        return self.seal.looks

    def judge(self, predictions: Tensor | Sequence[int]) -> Judged:
        """Compare predictions with the sealed test labels; counts as one look.

        Args:
            predictions: class indices (n_test,) or logits (n_test, c), in the order of `test`.

        Raises:
            Refused: when the shape, type or range is wrong; that is not counted as a look.
        """
        given, n, c = torch.as_tensor(predictions).detach().cpu(), len(self.test), len(self.classes)
        indices = given.ndim == 1 and not given.is_floating_point() and not given.is_complex()
        require(
            (indices and len(given) == n) or (given.ndim == 2 and tuple(given.shape) == (n, c)),
            f"judge needs class indices ({n},) or logits ({n}, {c})",
            f"{tuple(given.shape)} {given.dtype}",
            "Predict every test example once, in the order of task.test.",
        )
        if given.ndim == 2:
            finite("the logits to judge", given, "Look for a diverged model.")
            given = given.argmax(1)
        given = given.long()
        outside = int(((given < 0) | (given >= c)).sum())
        require(outside == 0, f"class indices must lie in 0..{c - 1}", f"{outside} outside", "Index task.classes.")
        labels = self.seal.open()
        right = int((given == labels).sum())
        return Judged(
            accuracy=right / n,
            interval=wilson(right, n),
            n=n,
            look=self.looks,
            confusion=torch.bincount(labels * c + given, minlength=c * c).reshape(c, c),
            labels=labels,
        )

    def save_split(self, path: str | Path) -> None:
        """Write the split and the class order as JSON, to be given to `load_task(..., split=path)`."""
        names = {part: getattr(self, part).names for part in split.PARTS}
        split.save(Path(path), names, target=self.target, seed=self.seed, classes=self.classes, manifest=self.manifest)
