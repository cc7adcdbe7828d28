"""Patches cut from ten photographs that ship inside scikit-learn and scikit-image.

None of them is used by an embedded task: brick, grass, gravel, ihc and lfw_subset stay out.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.validate import one_of, require

from .pictures import Pictures, asked, coarse, eight_bit, uniform

PHOTOGRAPHS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "hubble": ("skimage", "data/hubble_deep_field.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
CLASSES = tuple(PHOTOGRAPHS)
_TRAIN_SHARE = 0.75  # the left three quarters of each photograph; the rest is held out


def render(
    count: int, seed: int, *, size: int = 32, part: Literal["train", "held-out"] = "train", grey: float = 0.5
) -> Pictures:
    """Square patches at random places and scales of ten photographs; the label is the photograph.

    Args:
        count: how many patches; the photographs are drawn evenly.
        seed: of every random choice; the same seed gives the same bytes.
        size: side of the square pictures, in pixels.
        part: "train" cuts from the left three quarters of each photograph, "held-out" from the rest.
        grey: share of patches without colour.

    Returns:
        images uint8 (count, size, size, 3), labels int64 (count,), the names of the photographs.

    Cost: about 0.5 ms a patch of 32x32.

    Raises:
        Refused: count < 1, size outside 8..256, unknown part, or a photograph that is not installed.

    >>> images, labels, names = render(2, 0)
    >>> images.shape, [names[label] for label in labels]
    ((2, 32, 32, 3), ['china', 'flower'])
    """
    asked(count, size)
    one_of("part", part, ["train", "held-out"])
    rng = np.random.default_rng([seed, 5])
    labels = np.arange(count) % len(CLASSES)
    images = torch.stack([_cut(_photograph(CLASSES[label]), rng, size, part) for label in labels])
    colourless = images.mean(1, keepdim=True).expand_as(images)
    images = torch.where(uniform(rng, 0, 1, count, 1, 1, 1) < grey, colourless, images)
    images = (images - 0.5) * uniform(rng, 0.7, 1.3, count, 1, 1, 1) + 0.5 + uniform(rng, -0.15, 0.15, count, 1, 1, 1)
    return Pictures(eight_bit(coarse(images, rng, (12, 16, 20), 0.3), rng), labels.astype(np.int64), CLASSES)


def _cut(photograph: Tensor, rng: np.random.Generator, size: int, part: str) -> Tensor:
    height, width = photograph.shape[1:]
    edge = round(width * _TRAIN_SHARE)
    left, right = (0, edge) if part == "train" else (edge, width)
    for _ in range(4):  # a few more tries where there is nothing to see, as in a night sky
        side = min(int(rng.integers(32, 129)), right - left, height)
        y, x = rng.integers(0, height - side + 1), rng.integers(left, right - side + 1)
        patch = photograph[:, y : y + side, x : x + side]
        if patch[1, ::4, ::4].std() > 0.06:
            break
    patch = patch.flip(-1) if rng.random() < 0.5 else patch
    return F.interpolate(patch[None], (size, size), mode="bilinear", antialias=True)[0]


@cache
def _photograph(name: str) -> Tensor:
    """Values in [0, 1], (3, H, W), no side above 600."""
    from PIL import Image

    package, inside = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None
    require(
        path is not None and path.is_file(), f"The photograph {name!r} must be installed", path,
        "Install scikit-learn and scikit-image from their wheels.",
    )  # fmt: skip
    assert path is not None
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((600, 600), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).contiguous().float() / 255
