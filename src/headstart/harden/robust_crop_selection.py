"""Choose the crop that a classifier sees by what the picture shows, so that a shifted camera finds the same crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.validate import finite, one_of, require

from .crop_scores import SCORES, WINDOW, rounding, score_map

PAPER = Paper(
    title="Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image Transformations",
    authors="Ofir Shifman and Yair Weiss",
    year=2024,
    arxiv="2404.07153",
    code="https://github.com/ofirshifman/RICS",
    departs="The scores and the tie rule are this library's own: the released repository announces its code for later.",
)
CropScore: TypeAlias = Callable[[Tensor], Tensor]
"""Views (n, c, H, W) in float64 -> one float64 for every crop that fits into them, (n, H - m + 1, W - m + 1)."""


def select_crop(
    views: Tensor, size: int, score: str | CropScore = "edges", *, seed: int = 0, cyclic: bool = False
) -> tuple[Tensor, Tensor]:
    """The crop with the highest score of each view; a view that moved by a few pixels mostly has the same crop.

    Args:
        views: (n, c, H, W) real numbers, H and W >= size, in the camera's own pixels: select before resizing,
            normalising or compressing.
        size: side m of the crop.
        score: "edges", one fixed random filter, as large as the crop, of the picture's second differences; "random",
            such a filter with zero mean of the picture itself; "small", the size of the response to a 5x5 filter in
            the middle of the crop (m >= 5), cheaper; or a `CropScore`. A score may depend on nothing but the pixels
            of its crop: no padding, no statistics of the picture, no term for the place.
        seed: of the filter.
        cyclic: let crops run over the edge to the other side. The choice then follows every circular shift exactly.

    Returns:
        crops (n, c, m, m), of the dtype of the views, through which gradients pass, and their row and column (n, 2).

    Cost: one correlation in float64 (by FFT for m > 11), four times as large when cyclic.

    Notes: crops that tie are told apart by filters of other seeds, so by content again; those that still tie (a flat
    picture) by their place, first row first. A `CropScore` is compared on five crops of the first view with what it
    gives for each of them alone.

    Raises:
        Refused: views smaller than the crop, an unknown score, NaN, or a score that depends on more than its crop.

    Reference: Shifman and Weiss 2024, abstract: the crop is selected by the content of the image.

    >>> camera = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    >>> (crop, at), (moved, then) = (select_crop(camera[..., k : k + 36], 24) for k in (0, 1))
    >>> bool((crop == moved).all()), (at - then).tolist()
    (True, [[0, 1]])
    """
    require(views.ndim == 4 and len(views) > 0 and not views.is_complex(), "Views must be (n, c, H, W), n > 0",
            f"{views.dtype} {tuple(views.shape)}", "Add an axis for the batch.")  # fmt: skip
    _known(score)
    least = SCORES[score] if isinstance(score, str) else 1
    require(least <= size <= min(views.shape[2:]), f"Views must be as large as the crop, and that {least} or more",
            f"crop {size} of {tuple(views.shape[2:])}", "Pass larger views or another size.")  # fmt: skip
    finite("views", views)
    if cyclic:
        rows, columns = (torch.arange(side + size - 1, device=views.device) % side for side in views.shape[2:])
        views = views[:, :, rows][..., columns]
    found = _positions(views, size, score, seed)
    return _cut(views, found, size), found


class RICS(nn.Module):
    """A classifier that a shift of the camera by a pixel rarely fools, from any classifier and without training.

    Each picture is cropped where its own content says (`select_crop`) and the model sees the crop. Two views that
    share the winning crop get one answer, bit for bit; `measure.same_crop_probability` says how often that is, and
    `measure.positions_needed` how much larger than the crop the view must be for a rate that is wanted.

    Args:
        model: crops (n, c, m, m) -> logits or features; held, not copied. Normalisation belongs into it.
        size: m (library default for 256x256 views: 224; 192 of 288x288 is more robust).
        score: see `select_crop`.
        seed: of the filter.
        cyclic: for circular shifts; m may then be the whole view, and the answer never changes.

    Shape: (n, c, H, W), H and W >= m -> what the model gives. H = W = m is the plain model.

    Use it when: views are larger than what the model takes, and an answer must not hang on where the frame happens to
    lie; it gains most on models that look at a grid of patches.
    Not when: the object fills the view (crops cut it), or shifts are of fractions of a pixel or come with a resize.

    Cost: one correlation more than the model alone.

    Notes: the model must be used to off-centre crops; training on random crops of size m makes it so. Accuracy can
    fall: look at it and at the positions in `measure.translation_report`.

    Raises:
        Refused: as `select_crop`.

    Reference: Shifman and Weiss 2024 (arXiv 2404.07153).

    >>> camera = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    >>> robust = RICS(nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 2)), 24)
    >>> bool((robust(camera[..., :36]) == robust(camera[..., 1:37])).all())
    True
    """

    def __init__(
        self, model: nn.Module, size: int, score: str | CropScore = "edges", *, seed: int = 0, cyclic: bool = False
    ) -> None:
        super().__init__()
        _known(score)
        self.model, self.size, self.score, self.seed, self.cyclic = model, size, score, seed, cyclic

    def select(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The crops that the model sees, and their positions."""
        return select_crop(views, self.size, self.score, seed=self.seed, cyclic=self.cyclic)

    def forward(self, views: Tensor) -> Tensor:
        return self.model(self.select(views)[0])  # type: ignore[no-any-return]


def _known(score: str | CropScore) -> None:
    if isinstance(score, str):
        one_of("score", score, SCORES)


@torch.no_grad()
def _positions(views: Tensor, size: int, score: str | CropScore, seed: int) -> Tensor:
    if isinstance(score, str):
        scores = score_map(views, size, score, seed=seed)
        slack = rounding(views, WINDOW if score == "small" else size)
    else:
        scores = score(views.double())
        _check(score, scores, views, size)
        slack = 1e-9 * scores.abs().amax((1, 2))
    best = scores >= (scores.amax((1, 2)) - slack)[:, None, None]
    for again in range(1, 4):
        tied = best.sum((1, 2)) > 1
        if not bool(tied.any()):
            break
        other = score_map(views[tied], size, "random", seed=seed + again).masked_fill(~best[tied], -torch.inf)
        best[tied] = other >= (other.amax((1, 2)) - rounding(views[tied], size))[:, None, None]
    first = best.flatten(1).int().argmax(1)
    return torch.stack([first // best.shape[2], first % best.shape[2]], 1)


def _cut(views: Tensor, found: Tensor, size: int) -> Tensor:
    each, along = torch.arange(len(views), device=views.device), torch.arange(size, device=views.device)
    rows, columns = (found[:, axis, None] + along for axis in (0, 1))  # (n, m)
    return views[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _check(score: CropScore, scores: Tensor, views: Tensor, size: int) -> None:
    """Refuse a map of another shape or precision, and scores that a crop alone does not get."""
    rows, columns = (side - size for side in views.shape[2:])
    shape = (len(views), rows + 1, columns + 1)
    require(scores.shape == shape and scores.dtype == torch.float64, f"A crop score must give float64 {shape}",
            f"{scores.dtype} {tuple(scores.shape)}", "Score every crop, and no padded one.")  # fmt: skip
    finite("crop scores", scores, "Repair the score.")
    for r, c in {(0, 0), (0, columns), (rows, 0), (rows, columns), (rows // 2, columns // 2)}:
        alone = float(score(views[:1, :, r : r + size, c : c + size].double()))
        inside, slack = float(scores[0, r, c]), 1e-9 * float(scores[0].abs().amax())
        require(abs(alone - inside) <= slack, "A crop score must depend on the pixels of its crop alone",
                f"{inside:.6g} at {(r, c)}, {alone:.6g} for that crop by itself",
                "Leave out padding, statistics of the whole picture and terms for the place.")  # fmt: skip
