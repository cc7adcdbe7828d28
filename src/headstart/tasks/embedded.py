"""Small real tasks inside scikit-learn and scikit-image, and generated glyphs: no download, no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.core.validate import one_of, require

from .examples import Images, Picture, Rows, content_hash
from .found import Found


def read_embedded(name: str) -> Found:
    """The embedded data set of that name; see `EMBEDDED`."""
    one_of("an embedded task", name, EMBEDDED)
    return EMBEDDED[name]()


def digits() -> Found:
    """UCI handwritten digits (scikit-learn): 1,797 pictures of 8x8, 10 classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return pictures(_grey(pixels), labels, tuple("0123456789"))


def faces() -> Found:
    """A hundred faces and a hundred background cuts of Labelled Faces in the Wild (scikit-image): 25x25."""
    pixels = np.load(_shipped("lfw_subset.npy"), allow_pickle=False)  # the first hundred are faces
    labels = np.repeat([1, 0], 100)
    return pictures(_grey(np.rint(pixels * 255).astype(np.uint8)), labels, ("background", "face"))


def textures(side: int = 64, block: int = 128) -> Found:
    """Photographs of brick, grass and gravel (scikit-image) cut into 192 patches that share no pixel, 64x64.

    The patches of one block of 128x128 pixels stay on one side of a split.
    """
    classes = ("brick", "grass", "gravel")
    cut = [_patches(_photo(f"{word}.png"), side) for word in classes]
    return pictures(
        np.concatenate([patches for patches, _ in cut]),
        np.repeat(np.arange(3), [len(patches) for patches, _ in cut]),
        classes,
        groups=[_block(word, corner, block) for word, (_, at) in zip(classes, cut, strict=True) for corner in at],
        names=[f"{word}@{y},{x}" for word, (_, at) in zip(classes, cut, strict=True) for y, x in at],
    )


def tissue(side: int = 32, block: int = 64) -> Found:
    """Gland or connective tissue in a stained section of colon (scikit-image `ihc`), patches of 32x32 in grey.

    The label is the share of pixels with brown (DAB) stain, which marks gland epithelium: half or more is gland, less
    than a tenth is connective tissue; between is left out, and so is bare background. Nobody labelled the patches by
    hand. The pictures are grey and each has the same mean and spread, so that texture has to be read and not the
    stain that defines the label. One slide of one person, so nothing is said of others.
    """
    from skimage.color import rgb2hed

    photo = _photo("ihc.png")
    stained = (rgb2hed(photo)[..., 2] > 0.05).astype(np.float64)[..., None]
    cells = (photo.mean(axis=2) < 215).astype(np.float64)[..., None]
    luminance = photo @ np.array([0.299, 0.587, 0.114])
    grey, at = _patches(luminance[..., None], side)
    grey = (grey - grey.mean(axis=(1, 2, 3), keepdims=True)) / grey.std(axis=(1, 2, 3), keepdims=True)
    pixels = np.rint(np.clip(128 + 48 * grey[..., 0], 0, 255)).astype(np.uint8)
    brown = _patches(stained, side)[0].mean(axis=(1, 2, 3))
    filled = _patches(cells, side)[0].mean(axis=(1, 2, 3))
    keep = np.flatnonzero((filled > 0.2) & ((brown >= 0.5) | (brown < 0.1)))
    return pictures(
        _grey(pixels[keep]),
        (brown[keep] >= 0.5).astype(np.int64),
        ("connective", "gland"),
        groups=[_block("ihc", at[i], block) for i in keep],
        names=["ihc@{},{}".format(*at[i]) for i in keep],
    )


def glyphs() -> Found:
    """Generated capital letters, 40 of each, in fonts that the embedded zoo was not pretrained on: 32x32.

    The embedded models have seen such letters in other fonts, so this shows the machinery, not a hard transfer.
    """
    from headstart.worlds.glyphs import render

    made = render(1040, 2024, classes="upper", fonts="held-out")
    return pictures(made.images, made.labels, made.classes)


def breast_cancer() -> Found:
    """Wisconsin diagnostic breast cancer (scikit-learn): 569 rows of 30 numbers, malignant or benign."""
    from sklearn.datasets import load_breast_cancer

    return _numeric(load_breast_cancer())


def wine() -> Found:
    """Wine recognition (scikit-learn): 178 rows of 13 numbers, 3 growers."""
    from sklearn.datasets import load_wine

    return _numeric(load_wine())


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


def _numeric(bunch: object) -> Found:
    values = np.asarray(getattr(bunch, "data"), dtype=np.float32)  # noqa: B009 - a Bunch has no static attributes
    labels = np.asarray(getattr(bunch, "target"), dtype=np.int64)  # noqa: B009
    return Found(
        modality="numeric",
        inputs=Rows(values, [str(word) for word in getattr(bunch, "feature_names")]),  # noqa: B009
        names=tuple(f"row {i}" for i in range(len(values))),
        labels=labels,
        classes=tuple(str(word) for word in getattr(bunch, "target_names")),  # noqa: B009
        hashes=tuple(content_hash(row) for row in values),
    )


def _shipped(name: str) -> Path:
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


def _photo(name: str) -> Picture:
    return np.asarray(Images([_shipped(name)])[0], dtype=np.uint8)


def _grey(pixels: Picture) -> Picture:
    """(n, H, W) to (n, H, W, 3)."""
    return np.repeat(pixels[..., None], 3, axis=-1)


def _patches(photo: NDArray[Any], side: int) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """Non-overlapping patches (n, side, side, c) and their upper left corners (y, x)."""
    corners = [(y, x) for y in range(0, photo.shape[0], side) for x in range(0, photo.shape[1], side)]
    return np.stack([photo[y : y + side, x : x + side] for y, x in corners]), corners


def _block(word: str, corner: tuple[int, int], block: int) -> str:
    return f"{word}/{corner[0] // block},{corner[1] // block}"


EMBEDDED: dict[str, Callable[[], Found]] = {
    "breast-cancer": breast_cancer,
    "digits": digits,
    "faces": faces,
    "glyphs": glyphs,
    "textures": textures,
    "tissue": tissue,
    "wine": wine,
}
