"""Small real tasks inside scikit-learn and scikit-image, and generated characters: no download, no network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headstart.core.validate import one_of

from .characters import glyphs, greek, typefaces
from .examples import Rows, content_hash
from .found import Found
from .patches import block_of, grey, levelled, luminance, patches_of, photo, pictures, shipped
from .photographs import damage, scenes, vessels


def read_embedded(name: str) -> Found:
    """The embedded data set of that name; see `EMBEDDED`."""
    one_of("an embedded task", name, EMBEDDED)
    return EMBEDDED[name]()


def digits() -> Found:
    """UCI handwritten digits (scikit-learn): 1,797 pictures of 8x8, 10 classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return pictures(grey(pixels), labels, tuple("0123456789"))


def faces() -> Found:
    """A hundred faces and a hundred background cuts of Labelled Faces in the Wild (scikit-image): 25x25."""
    pixels = np.load(shipped("lfw_subset.npy"), allow_pickle=False)  # the first hundred are faces
    labels = np.repeat([1, 0], 100)
    return pictures(grey(np.rint(pixels * 255).astype(np.uint8)), labels, ("background", "face"))


def textures(side: int = 64, block: int = 128) -> Found:
    """Photographs of brick, grass and gravel (scikit-image) cut into 192 patches that share no pixel, 64x64.

    The patches of one block of 128x128 pixels stay on one side of a split.
    """
    classes = ("brick", "grass", "gravel")
    cut = [patches_of(photo(f"{word}.png"), side) for word in classes]
    return pictures(
        np.concatenate([patches for patches, _ in cut]),
        np.repeat(np.arange(3), [len(patches) for patches, _ in cut]),
        classes,
        groups=[block_of(word, corner, block) for word, (_, at) in zip(classes, cut, strict=True) for corner in at],
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

    slide = photo("ihc.png")
    stained = (rgb2hed(slide)[..., 2] > 0.05).astype(np.float64)[..., None]
    cells = (slide.mean(axis=2) < 215).astype(np.float64)[..., None]
    light, at = patches_of(luminance(slide), side)
    pixels = levelled(light)
    brown = patches_of(stained, side)[0].mean(axis=(1, 2, 3))
    filled = patches_of(cells, side)[0].mean(axis=(1, 2, 3))
    keep = np.flatnonzero((filled > 0.2) & ((brown >= 0.5) | (brown < 0.1)))
    return pictures(
        grey(pixels[keep]),
        (brown[keep] >= 0.5).astype(np.int64),
        ("connective", "gland"),
        groups=[block_of("ihc", at[i], block) for i in keep],
        names=["ihc@{},{}".format(*at[i]) for i in keep],
    )


def breast_cancer() -> Found:
    """Wisconsin diagnostic breast cancer (scikit-learn): 569 rows of 30 numbers, malignant or benign."""
    from sklearn.datasets import load_breast_cancer

    return _numeric(load_breast_cancer())


def wine() -> Found:
    """Wine recognition (scikit-learn): 178 rows of 13 numbers, 3 growers."""
    from sklearn.datasets import load_wine

    return _numeric(load_wine())


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


EMBEDDED: dict[str, Callable[[], Found]] = {
    "breast-cancer": breast_cancer,
    "damage": damage,
    "digits": digits,
    "faces": faces,
    "glyphs": glyphs,
    "greek": greek,
    "scenes": scenes,
    "textures": textures,
    "tissue": tissue,
    "typefaces": typefaces,
    "vessels": vessels,
    "wine": wine,
}
