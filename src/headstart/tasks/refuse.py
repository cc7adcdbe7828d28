"""What `load_task` refuses about classes, parts and its own numbers; `doctor` says the same without raising."""

from __future__ import annotations

from numbers import Integral

import numpy as np

from headstart.core.validate import require

from .found import Found, few
from .split import Parts


def classes_of(found: Found) -> None:
    """Refuse fewer than two classes, and a class with fewer than two examples."""
    counts = np.bincount(found.labels[found.labels >= 0], minlength=len(found.classes))
    present = [word for word, count in zip(found.classes, counts, strict=True) if count]
    require(
        len(present) >= 2,
        "a task needs at least two classes with readable examples",
        f"{len(present)} ({few(present)})",
        "Add examples of another class, or name another label column.",
    )
    short = [f"{word!r} has {count}" for word, count in zip(found.classes, counts, strict=True) if count < 2]
    continuous = len(short) > len(found.classes) / 2
    require(
        not short,
        "every class needs at least two examples, one to train and one to test on",
        few(short),
        "These labels look like numbers to predict, which headstart does not do; bin them into classes first."
        if continuous
        else "Add examples, or leave the class out.",
    )


def parts_of(found: Found, parts: Parts, labels_per_class: int | None) -> None:
    """Refuse an empty test, a class that only the test has, and more labels a class than there are."""
    test = found.labels[(parts == "test")]
    require(len(test) > 0, "the test part must hold labelled examples", 0, "Label them, or leave the test part out.")
    train = np.bincount(found.labels[parts == "train"], minlength=len(found.classes))
    require(
        bool((train > 0).all()),
        "every class needs a training example",
        f"none of {few(repr(word) for word, count in zip(found.classes, train, strict=True) if not count)}",
        "Add some, or leave the class out.",
    )
    if labels_per_class is not None:
        least = int(train.argmin())
        require(
            bool((train >= labels_per_class).all()),
            f"labels_per_class={labels_per_class} needs that many training examples of every class",
            f"{train[least]} of {found.classes[least]!r} after the test split",
            f"Pass at most {train[least]}.",
        )


def whole_labels(k: int | None) -> int | None:
    """Refuse anything but None or a whole number from 1."""
    require(k is None or (isinstance(k, Integral) and k >= 1), "labels_per_class must be >= 1", k, "Pass None for all.")
    return k


def shares(test: float, validation: float) -> None:
    """Refuse shares that leave nothing to test or to train on."""
    require(
        0 < test < 1 and 0 <= validation < 1 and test + validation < 1,
        "test_share must be above 0, validation_share at least 0, and something must be left to train on",
        f"test_share={test}, validation_share={validation}",
        "Pass shares such as 0.25 and 0.15.",
    )
