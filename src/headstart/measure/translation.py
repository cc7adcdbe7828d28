"""Measure whether a model keeps its answer when the camera moves by a few pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.ascent import logits
from headstart.core.validate import finite, require

Same: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Outputs of the view and of the moved view, (n, d) each -> (n,) whether they are the same answer."""


@dataclass(frozen=True, kw_only=True)
class TranslationReport:
    """What shifts of the camera do to a model's answers.

    Attributes:
        shifts: the s shifts (rows, columns), without (0, 0).
        kept: (s, n) whether the answer is that of the unmoved view.
        right: (n,) whether the class of the unmoved view is right; None without labels.
        same: (s, n) whether the same crop was chosen, bit for bit; None without `select`.
        places: (n, 2) row and column of the crop in the unmoved view; None without `select`.
        predicted: the rate of `same` if all positions were alike and independent; None where that says nothing.
        predicted_everywhere: the share of pictures with one crop under all shifts, likewise.
    """

    shifts: tuple[tuple[int, int], ...]
    kept: Tensor
    right: Tensor | None
    same: Tensor | None
    places: Tensor | None
    predicted: float | None
    predicted_everywhere: float | None

    @property
    def consistency(self) -> float:
        """How often a random shift of the set leaves the answer."""
        return self.kept.double().mean().item()

    @property
    def robustness(self) -> float:
        """The share of pictures whose answer no shift of the set changes; never more than `consistency`."""
        return self.kept.all(0).double().mean().item()

    @property
    def accuracy(self) -> float | None:
        """Of the unmoved views."""
        return None if self.right is None else self.right.double().mean().item()

    @property
    def same_crop(self) -> float | None:
        """How often a random shift leaves the crop: `consistency` of a model that sees it alone is never less."""
        return None if self.same is None else self.same.double().mean().item()

    @property
    def same_crop_everywhere(self) -> float | None:
        """The share of pictures with one crop under all shifts; `robustness` is never less."""
        return None if self.same is None else self.same.all(0).double().mean().item()


def translation_report(
    model: Callable[[Tensor], Tensor],
    scenes: Tensor,
    labels: Tensor | None = None,
    *,
    view: int,
    max_shift: int = 1,
    select: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    same: Same | None = None,
    circular: bool = False,
    batch_size: int = 64,
) -> TranslationReport:
    """How often moving the camera by up to k pixels changes a model's answer.

    Args:
        model: views (n, c, V, V) -> logits (n, classes), or features with `same`. Runs in eval mode, stays as it is.
        scenes: (n, c, H, W), H and W >= V + 2 k: the view slides over a larger picture, as pixels enter and leave it.
        labels: (n,) classes, for the accuracy.
        view: V.
        max_shift: k >= 1; all shifts of up to k rows and k columns (1: the eight neighbours).
        select: views -> crops and their positions, such as the `select` of `harden.RICS`, to see how often they agree.
        same: what counts as the same answer, by default the same class; see `cosine_above` and `same_neighbour`.
        circular: scenes are the views (H = W = V) and are rolled instead. k = V // 2 makes every circular shift.
        batch_size: scenes at once.

    Use it when: a stream of frames, or a model behind a moving camera, must not flicker.
    Not when: shifts are of fractions of a pixel (interpolate and compare by hand).

    Cost: (2 k + 1)² forward passes, and as many selections.

    Notes: the prediction is `same_crop_probability`; scores of neighbouring crops of real pictures go together, so the
    measured rate may lie on either side.

    Raises:
        Refused: scenes too small, labels that do not fit, NaN.

    Reference: Shifman and Weiss 2024 (arXiv 2404.07153): consistency and adversarial robustness under realistic shifts.

    >>> where = lambda views: views.flatten(1)  # whose class is the place of the brightest pixel
    >>> translation_report(where, torch.eye(1, 36).roll(14).view(1, 1, 6, 6), view=4).consistency
    0.0
    """
    k, (n, _, *sides) = max_shift, scenes.shape if scenes.ndim == 4 else (0, 0)
    require(n > 0, "translation_report needs scenes (n, c, H, W)", tuple(scenes.shape), "Pass a batch of pictures.")
    require(view >= 1 and k >= 1 and batch_size >= 1, "translation_report needs view, max_shift and batch_size >= 1",
            (view, k, batch_size), "Raise them.")  # fmt: skip
    large = sides == [view, view] and 2 * k <= view if circular else min(sides) >= view + 2 * k
    wanted = f"be {view}x{view}, with 2 k <= {view}" if circular else f"have {view + 2 * k} pixels a side"
    require(large, f"For shifts of up to {k} scenes must {wanted}", sides, "Pass larger pictures; padding moves none.")
    require(labels is None or labels.shape == (n,), f"Labels must be {n} class numbers",
            None if labels is None else tuple(labels.shape), "Pass y (n,).")  # fmt: skip
    finite("scenes", scenes)
    alike = same or (lambda a, b: a.argmax(1) == b.argmax(1))
    shifts = tuple((a, b) for a in range(-k, k + 1) for b in range(-k, k + 1) if (a, b) != (0, 0))
    top, left = ((side - view) // 2 for side in sides)

    def moved(some: Tensor, a: int, b: int) -> Tensor:
        if circular:
            return some.roll((-a, -b), (2, 3))
        return some[:, :, top + a : top + a + view, left + b : left + b + view]

    def answers(views: Tensor) -> Tensor:
        said = logits(model, views)
        finite("outputs", said, "Check the model.")
        return said

    kept, equal, classes, places, width = [], [], [], [], 0
    with torch.inference_mode():
        for some in torch.split(scenes, batch_size):
            before = answers(moved(some, 0, 0))
            classes.append(before.argmax(1))
            kept.append(torch.stack([alike(before, answers(moved(some, a, b))) for a, b in shifts]))
            if select is not None:
                crops, at = select(moved(some, 0, 0))
                others = [select(moved(some, a, b))[0] for a, b in shifts]
                equal.append(torch.stack([(crops == other).flatten(1).all(1) for other in others]))
                places.append(at)
                width = crops.shape[3]
    count = view - width + 1
    known = select is not None and not circular
    return TranslationReport(
        shifts=shifts,
        kept=torch.cat(kept, 1).cpu(),
        right=None if labels is None else torch.cat(classes).cpu() == labels.cpu(),
        same=torch.cat(equal, 1).cpu() if equal else None,
        places=torch.cat(places).cpu() if places else None,
        predicted=fmean(same_crop_probability(count, shift) for shift in shifts) if known else None,
        predicted_everywhere=same_crop_everywhere_probability(count, k) if known else None,
    )


def cosine_above(threshold: float) -> Same:
    """The same answer for features: their cosine is above the threshold."""
    return lambda a, b: F.cosine_similarity(a, b, -1) > threshold


def same_neighbour(gallery: Tensor) -> Same:
    """The same answer for features: the row of the gallery (m, d) nearest by cosine is the same."""
    towards = F.normalize(gallery, dim=-1).T
    return lambda a, b: (a @ towards).argmax(1) == (b @ towards).argmax(1)


def same_crop_probability(positions: int, shift: tuple[int, int]) -> float:
    """How likely two views choose the same crop, if the n² positions of each have independent scores of one law.

    The highest score of the union must lie in the overlap: (n-a)(n-b) / (2 n² - (n-a)(n-b)).

    Args:
        positions: n >= 1 on each axis, view - crop + 1.
        shift: rows and columns (a, b).

    >>> round(same_crop_probability(33, (1, 0)), 3), round(same_crop_probability(33, (1, 1)), 3)
    (0.941, 0.887)
    """
    require(positions >= 1, "A view needs positions >= 1", positions, "Pass view - crop + 1.")
    overlap = math.prod(max(positions - abs(step), 0) for step in shift)
    return overlap / (2 * positions**2 - overlap)


def same_crop_everywhere_probability(positions: int, max_shift: int) -> float:
    """The same for all shifts of up to k at once: ((n - 2 k) / (n + 2 k))².

    >>> round(same_crop_everywhere_probability(33, 1), 3)
    0.784
    """
    require(positions >= 1 and max_shift >= 0, "A view needs positions >= 1 and max_shift >= 0", (positions, max_shift),
            "Pass view - crop + 1.")  # fmt: skip
    return (max(positions - 2 * max_shift, 0) / (positions + 2 * max_shift)) ** 2


def positions_needed(probability: float, max_shift: int = 1) -> int:
    """The smallest n with which all shifts of up to k leave the crop with this probability, for independent scores.

    >>> positions_needed(0.95)  # views of 379 pixels for crops of 224
    156
    """
    require(0 < probability < 1 and max_shift >= 1, "positions_needed needs 0 < probability < 1 and max_shift >= 1",
            (probability, max_shift), "No finite view is certain.")  # fmt: skip
    root = math.sqrt(probability)
    count = max(1, math.floor(2 * max_shift * (1 + root) / (1 - root)) - 1)  # one less, against rounding
    while same_crop_everywhere_probability(count, max_shift) < probability:
        count += 1
    return count
