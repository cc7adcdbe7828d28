"""Photographs that ship with scikit-image, cut into examples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import require

from .examples import Images, Picture, content_hash
from .found import Found


def pictures(
    pixels: Picture,
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    *,
    groups: list[str] | None = None,
    names: list[str] | None = None,
) -> Found:
    """`Found` from an array (n, H, W, 3)."""
    n, height, width, _ = pixels.shape
    return Found(
        modality="image",
        inputs=Images(pixels),
        names=tuple(names or (f"{i:05d}" for i in range(n))),
        labels=np.asarray(labels, dtype=np.int64),
        classes=classes,
        hashes=tuple(content_hash(picture) for picture in pixels),
        groups=tuple(groups or ()),
        sizes=((width, height),) * n,
    )


def shipped(name: str) -> Path:
    """A file inside the installed scikit-image wheel; never a download."""
    spec = importlib.util.find_spec("skimage")
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = [Path(place) / "data" / name for place in places]
    require(
        any(file.is_file() for file in files),
        f"this embedded task needs {name}, which ships with scikit-image",
        "no such file in the installation",
        "Install scikit-image.",
    )
    return next(file for file in files if file.is_file())


def photo(name: str) -> Picture:
    """A photograph (H, W, 3) that ships with scikit-image."""
    return np.asarray(Images([shipped(name)])[0], dtype=np.uint8)


def grey(pixels: Picture) -> Picture:
    """(n, H, W) to (n, H, W, 3)."""
    return np.repeat(pixels[..., None], 3, axis=-1)


def patches_of(photograph: NDArray[Any], side: int) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """Non-overlapping patches (n, side, side, c) and their upper left corners (y, x); what is left over is cut off."""
    down, across = (range(0, length - side + 1, side) for length in photograph.shape[:2])
    corners = [(y, x) for y in down for x in across]
    return np.stack([photograph[y : y + side, x : x + side] for y, x in corners]), corners


def luminance(photograph: Picture) -> NDArray[np.float64]:
    """(..., 3) to (...): how bright a pixel looks."""
    return np.asarray(photograph @ np.array([0.299, 0.587, 0.114]))


def levelled(patches: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Patches (n, H, W), each brought to one mean and spread, so that only its texture can be read."""
    centred = patches - patches.mean(axis=(1, 2), keepdims=True)
    scaled = centred / centred.std(axis=(1, 2), keepdims=True)
    return np.asarray(np.rint(np.clip(128 + 48 * scaled, 0, 255)), dtype=np.uint8)


def block_of(word: str, corner: tuple[int, int], block: int) -> str:
    """The name of the block of pixels that a patch lies in; the patches of a block stay on one side of a split."""
    return f"{word}/{corner[0] // block},{corner[1] // block}"
