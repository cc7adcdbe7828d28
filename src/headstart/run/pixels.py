"""Pictures that several models see in common, and each model's own preprocessing as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.validate import require
from headstart.measure import Prepared
from headstart.zoo import Preprocess

from .predict import Predictor

SMALLEST, LARGEST = 8, 256  # sides at which pictures keep their own size
EXAMPLES, FEWEST = 500, 100
CLOSE = 1 / 255  # mean distance of a preprocessing from its restatement, in units of pixels in [0, 1]
_RESIZES: tuple[dict[str, Any], ...] = (
    {"mode": "bilinear", "antialias": True},
    {"mode": "bicubic", "antialias": True},
    {"mode": "nearest-exact"},
)
_CROPPED = (
    1.0,
    0.875,
    0.9,
    0.95,
    224 / 248,
    224 / 235,
)  # side that is kept, as a share of what the picture is resized to


def common_size(shapes: Sequence[tuple[int, ...]], sides: Sequence[int]) -> tuple[int, int]:
    """Height and width at which pictures are perturbed: their own where they agree and are neither tiny nor huge.

    Args:
        shapes: (H, W, ...) of each picture.
        sides: what the models take, of which the largest is chosen otherwise.

    >>> common_size([(28, 28, 3)] * 2, [32]), common_size([(28, 28, 3), (30, 20, 3)], [32, 64])
    ((28, 28), (64, 64))
    """
    own = {tuple(shape[:2]) for shape in shapes}
    if len(own) == 1:
        height, width = next(iter(own))
        if min(height, width) >= SMALLEST and max(height, width) <= max(LARGEST, *sides):
            return height, width
    side = max(SMALLEST, *sides)
    return side, side


def how_many(available: int, size: tuple[int, int], asked: int | None = None) -> int:
    """Examples to measure on: what is asked, else 500, of pictures above 64x64 fewer, in proportion, down to 100.

    >>> how_many(900, (32, 32)), how_many(900, (224, 224)), how_many(60, (32, 32)), how_many(900, (32, 32), 700)
    (500, 100, 60, 700)
    """
    usual = max(FEWEST, min(EXAMPLES, EXAMPLES * 64 * 64 // (size[0] * size[1])))
    return min(available, usual if asked is None else asked)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Pictures of one size, drawn from a task's test part.

    Attributes:
        rows: of the test part.
        pictures: uint8 (n, H, W, 3).
        of: how many there were to draw from.
        resized: whether some had another size.
    """

    rows: tuple[int, ...]
    pictures: np.ndarray = field(repr=False)
    of: int
    resized: bool

    @property
    def notes(self) -> list[str]:
        """What a reader must know."""
        height, width = self.pictures.shape[1:3]
        sizes = f"pictures were brought to {height}x{width}: they differ in size, or are tiny or huge"
        return ([f"{len(self.rows)} of {self.of} test pictures, drawn by lot"] if len(self.rows) < self.of else []) + (
            [sizes] if self.resized else []
        )


def sampled(inputs: Sequence[Any], sides: Sequence[int], *, asked: int | None = None, seed: int = 0) -> Sample:
    """Pictures by a seeded lot, in the order of the test part; only those are kept in memory.

    Args:
        inputs: uint8 (H, W, 3) each, decoded on access.
        sides: what the models take.
        asked: how many; by default see `how_many`.
        seed: of the lot.
    """
    lot = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).tolist()
    size = common_size([inputs[k].shape for k in lot[:FEWEST]], sides)
    rows = sorted(lot[: how_many(len(inputs), size, asked)])
    shapes, made = set(), []
    for k in rows:
        picture = inputs[k]
        shapes.add(picture.shape[:2])
        made.append(picture if picture.shape[:2] == size else _resized(picture, size))
    return Sample(rows=tuple(rows), pictures=np.stack(made), of=len(inputs), resized=shapes != {size})


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    return scaled.round().clamp(0, 255).to(torch.uint8).numpy()


def as_input(pictures: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) as x (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 255


def side_of(preprocess: Preprocess) -> int:
    """The larger side of what a preprocessing of pictures gives."""
    made = preprocess([np.zeros((SMALLEST, SMALLEST, 3), np.uint8)])
    return max(made.shape[2:]) if isinstance(made, Tensor) else SMALLEST


class Columns(nn.Module):
    """Some logits, in another order."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = list(order)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c) -> (n, len(order))."""
        return x[:, self.order]


def seen_by(name: str, model: Predictor, classes: Sequence[str], pictures: np.ndarray) -> Prepared:
    """The model as a function of x (n, 3, H, W) in [0, 1] to logits in the order of `classes`.

    Args:
        name: for refusals.
        model: with its preprocessing.
        classes: the task's.
        pictures: uint8 (n, H, W, 3), on which the preprocessing is followed.

    Raises:
        Refused: it reads no pictures, its classes are others, or its preprocessing cannot be followed.
    """
    require(model.modality == "image", "Models to perturb must read pictures", f"{name}, which reads {model.modality}",
            "Name an image model.")  # fmt: skip
    lacks, more = sorted(set(classes) - set(model.classes)), sorted(set(model.classes) - set(classes))
    told = "; ".join(f"{word} {', '.join(some[:5])}" for word, some in (("lacks", lacks), ("has also", more)) if some)
    require(not told, "Models must know the target's classes, by name", f"{name}, which {told}",
            "Name models that were fitted on these classes.")  # fmt: skip
    order = [model.classes.index(one) for one in classes]
    ordered = model.model if order == sorted(order) else nn.Sequential(model.model, Columns(order))
    return Prepared(ordered, followed(name, model.preprocess, pictures))


def followed(name: str, preprocess: Preprocess, pictures: np.ndarray) -> Callable[[Tensor], Tensor]:
    """A preprocessing restated so that gradients go through it: resized, cropped in the middle, normalised.

    The means and scales are read off a black and a white picture; the way of resizing and the crop are those that come
    nearest to what the preprocessing does to some of the pictures and to coloured noise: nothing has to be believed.

    Raises:
        Refused: nothing comes within a grey level of it, on average.
    """
    height, width = pictures.shape[1:3]
    blank = np.zeros((height, width, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    compared = np.concatenate([pictures[:12], noise])
    ends, wanted = preprocess([blank, blank + 255]), preprocess(list(compared))
    fits = isinstance(ends, Tensor) and ends.ndim == 4 and ends.shape[1] == 3
    require(fits, "A preprocessing must give (n, 3, H, W) to be followed", f"another form, of {name}", "Name another.")
    assert isinstance(ends, Tensor)
    assert isinstance(wanted, Tensor)
    offset = ends[0].mean((1, 2))[:, None, None]
    scale = ends[1].mean((1, 2))[:, None, None] - offset
    x, side = as_input(compared), (wanted.shape[2], wanted.shape[3])
    ways = [
        _Way(offset=offset, scale=scale, target=target, corner=corner, side=side, resize=resize)
        for target in _targets((height, width), side)
        for corner in _corners(target, side)
        for resize in _RESIZES
    ]
    far = [float(((way(x) - wanted) / scale).abs().mean()) for way in ways]
    best = min(range(len(ways)), key=far.__getitem__)
    require(far[best] <= CLOSE, "A preprocessing must resize, crop in the middle and normalise to be followed",
            f"{name}, {255 * far[best]:.1f} grey levels from the nearest such", "Name another model.")  # fmt: skip
    return ways[best]


def _targets(size: tuple[int, int], side: tuple[int, int]) -> list[tuple[int, int]]:
    """What a picture may be resized to before the middle is cut out: the output itself, or its own aspect."""
    short, found = min(size), [side]
    for share in _CROPPED:
        new = round(max(side) / share)
        found.append((int(new * size[0] / short), int(new * size[1] / short)))
    return list(dict.fromkeys(one for one in found if one[0] >= side[0] and one[1] >= side[1]))


def _corners(target: tuple[int, int], side: tuple[int, int]) -> list[tuple[int, int]]:
    """Where the cut may begin: libraries round the half differently."""
    spare = target[0] - side[0], target[1] - side[1]
    return list(dict.fromkeys([(spare[0] // 2, spare[1] // 2), (round(spare[0] / 2), round(spare[1] / 2))]))


@dataclass(frozen=True, kw_only=True)
class _Way:
    offset: Tensor
    scale: Tensor
    target: tuple[int, int]
    corner: tuple[int, int]
    side: tuple[int, int]
    resize: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.target:
            x = F.interpolate(x, self.target, **self.resize).clamp(0, 1)
        (top, left), (height, width) = self.corner, self.side
        return x[:, :, top : top + height, left : left + width] * self.scale.to(x) + self.offset.to(x)
