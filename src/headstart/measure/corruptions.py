"""Measure how a classifier bears noise, blur, weather and compression."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .distortions import CORRUPTIONS

PAPER = Paper(
    title="Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    authors="Dan Hendrycks and Thomas Dietterich",
    year=2019,
    arxiv="1903.12261",
    departs="Pictures of any size, lengths in proportion; frost, fog and snow are made by code; glass looks pixels up "
    "instead of swapping them. Numbers cannot be compared with those on ImageNet-C.",
)
SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class CorruptionAccuracy:
    """Accuracy on clean pictures and on every corruption, one number a severity.

    `clean` is without corruption; `corrupted` has for each corruption the accuracy at each of `severities`, which
    rise; `count` says how many examples there were.
    """

    clean: float
    corrupted: Mapping[str, tuple[float, ...]]
    severities: tuple[int, ...]
    count: int

    @property
    def mean(self) -> float:
        """Accuracy over all corruptions and severities."""
        return fmean(fmean(row) for row in self.corrupted.values())


@dataclass(frozen=True, kw_only=True)
class CorruptionError:
    """Errors in units of a reference model's: 1 is as bad as the reference, 0 perfect.

    `by_corruption` has the ratio of errors, both summed over severities, of each corruption; `mean` is over them.
    """

    mean: float
    by_corruption: Mapping[str, float]


def corrupt(images: np.ndarray, name: str, severity: int, *, seed: int = 0, first: int = 0) -> np.ndarray:
    """Pictures as a bad camera, bad weather or a bad file would give them.

    Args:
        images: uint8 (n, H, W, 3), H and W >= 8.
        name: one of `CORRUPTIONS`.
        severity: 1 (slight) to 5.
        seed: of every random choice.
        first: index of the first picture in its data set. Picture i depends on (seed, first + i, name) alone, so
            the batches do not matter.

    Returns:
        A new array like `images`.

    Use it when: asking what a classifier does on worse pictures than those it was tested on.
    Not when: training on these corruptions, if they are also to be the test: train on others.

    Cost: 0.2 to 5 ms a picture of 32x32, 4 to 160 ms of 224x224, one at a time.

    Notes: in the mean over pictures a severity changes more than the one before.

    Raises:
        Refused: other dtypes or shapes, an unknown name, a severity outside 1..5.

    Reference: Hendrycks and Dietterich 2019, section 3.

    >>> grey = np.full((1, 8, 8, 3), 100, np.uint8)
    >>> corrupt(grey, "brightness", 2)[0, 0, 0]
    array([151, 151, 151], dtype=uint8)
    """
    _pictures(images)
    one_of("corruption", name, CORRUPTIONS)
    require(severity in SEVERITIES, "corrupt needs a severity of 1 to 5", severity, "Pass an integer from 1 to 5.")
    require(seed >= 0 and first >= 0, "corrupt needs seed >= 0 and first >= 0", (seed, first), "Pass such numbers.")
    moved, kind = np.empty_like(images), zlib.crc32(name.encode())
    for i, picture in enumerate(images):
        rng = np.random.default_rng([seed, first + i, kind])
        changed = CORRUPTIONS[name](picture / 255, severity, rng)
        moved[i] = np.rint(changed.clip(0, 1) * 255)
    return moved


def accuracy_by_corruption(
    predict: Callable[[np.ndarray], Sequence[int] | np.ndarray],
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 256,
) -> CorruptionAccuracy:
    """How accurate a classifier stays as its pictures get worse.

    Args:
        predict: pictures uint8 (n, H, W, 3) -> n class indices; resizing and normalisation are its own.
        images: uint8 (n, H, W, 3), H and W >= 8.
        labels: (n,) class indices.
        corruptions: names; all by default.
        severities: some of 1..5, rising.
        seed: of the corruptions.
        batch_size: pictures a call of `predict`; changes nothing but memory, which is one batch.

    Cost: (1 + corruptions x severities) predictions of each picture.

    Raises:
        Refused: bad pictures or names, labels or predictions of another length, nothing to measure.

    >>> images = np.zeros((4, 8, 8, 3), np.uint8)
    >>> accuracy_by_corruption(lambda x: x.mean((1, 2, 3)) > 64, images, [0] * 4, corruptions=["brightness"]).corrupted
    {'brightness': (1.0, 1.0, 0.0, 0.0, 0.0)}
    """
    _pictures(images)
    truth, names = np.asarray(labels), tuple(CORRUPTIONS if corruptions is None else corruptions)
    require(truth.shape == (len(images),), f"accuracy_by_corruption needs one label for each of {len(images)} pictures",
            truth.shape, "Align the two.")  # fmt: skip
    for name in names:
        one_of("corruption", name, CORRUPTIONS)
    rising = bool(severities) and set(severities) <= set(SEVERITIES) and sorted(set(severities)) == list(severities)
    require(bool(names) and rising, "accuracy_by_corruption needs corruptions, and severities that rise within 1..5",
            (names, tuple(severities)), "Leave both out for all.")  # fmt: skip
    require(batch_size >= 1, "accuracy_by_corruption needs batch_size >= 1", batch_size, "Pass a positive number.")

    def accuracy(change: Callable[[np.ndarray, int], np.ndarray]) -> float:
        right = 0
        for at in range(0, len(images), batch_size):
            found = np.asarray(predict(change(images[at : at + batch_size], at)))
            wanted = truth[at : at + batch_size]
            require(found.shape == wanted.shape, f"predict must give {len(wanted)} class indices", found.shape,
                    "Take the argmax over classes.")  # fmt: skip
            right += int((found == wanted).sum())
        return right / len(images)

    def under(name: str, severity: int) -> float:
        return accuracy(lambda batch, at: corrupt(batch, name, severity, seed=seed, first=at))

    return CorruptionAccuracy(
        clean=accuracy(lambda batch, _at: batch.copy()),
        corrupted={name: tuple(under(name, severity) for severity in severities) for name in names},
        severities=tuple(severities),
        count=len(images),
    )


def corruption_error(
    model: CorruptionAccuracy, reference: CorruptionAccuracy, *, relative: bool = False
) -> CorruptionError:
    """The mean corruption error: a model's errors in units of a reference model's (the paper's is AlexNet).

    Args:
        model: measured by `accuracy_by_corruption`.
        reference: another model, measured on the same corruptions and severities.
        relative: count only what each model loses against its own clean accuracy (the paper's relative mCE).

    Raises:
        Refused: other corruptions or severities, or a reference that makes no error (loses nothing) on one of them.

    Reference: Hendrycks and Dietterich 2019, section 4.

    >>> one, two = (CorruptionAccuracy(clean=1, corrupted={"fog": (a,)}, severities=(1,), count=9) for a in (0.9, 0.8))
    >>> round(corruption_error(one, two).mean, 6)
    0.5
    """
    same = list(model.corrupted) == list(reference.corrupted) and model.severities == reference.severities
    require(same, "corruption_error needs both models measured on the same corruptions and severities",
            (list(model.corrupted), list(reference.corrupted)), "Measure both alike.")  # fmt: skip

    def errors(of: CorruptionAccuracy, name: str) -> float:
        return sum((of.clean if relative else 1) - accuracy for accuracy in of.corrupted[name])

    spotless = [name for name in reference.corrupted if errors(reference, name) <= 0]
    require(not spotless, "corruption_error divides by the reference's errors", f"none under {', '.join(spotless)}",
            "Take a weaker reference or leave those corruptions out.")  # fmt: skip
    ratios = {name: errors(model, name) / errors(reference, name) for name in reference.corrupted}
    return CorruptionError(mean=fmean(ratios.values()), by_corruption=ratios)


def _pictures(images: np.ndarray) -> None:
    good = images.dtype == np.uint8 and images.ndim == 4 and len(images) and images.shape[3] == 3
    require(bool(good) and min(images.shape[1:3]) >= 8, "Corruptions need uint8 pictures (n, H, W, 3) of 8x8 or more",
            f"{images.dtype} {images.shape}", "Repeat a grey channel three times; scale floats to 0..255.")  # fmt: skip
