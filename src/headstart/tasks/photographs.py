"""Tasks cut from photographs that the embedded zoo was not pretrained on: vessels, damage, scenes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .examples import Picture
from .found import Found
from .patches import block_of, grey, levelled, luminance, patches_of, photo, pictures

DAMAGE = ("none", "blurred", "noisy", "blocky", "faded")
SCENES = ("astronaut.png", "cell.png", "page.png", "retina.jpg", "text.png")


def vessels(side: int = 32, block: int = 64) -> Found:
    """Blood vessel or none in a photograph of the retina (scikit-image `retina`, halved), patches of 32x32 in grey.

    The label is the share of pixels on dark ridges of the green channel (Sato's filter; the strongest tenth inside the
    field of view): a tenth or more is a vessel, less than a fiftieth is none, between is left out. Nobody labelled the
    patches by hand. Each patch has the same mean and spread. One eye, so nothing is said of others.
    """
    from skimage.filters import sato

    eye = _halved(photo("retina.jpg"))
    inside = _field(eye)
    green = eye[..., 1].astype(np.float64)
    ridges = np.asarray(sato(green, sigmas=(1, 2, 3, 4), black_ridges=True))  # type: ignore[no-untyped-call]
    strong = (ridges > np.quantile(ridges[inside], 0.9)) & inside
    share, at = patches_of(strong.astype(np.float64), side)
    whole = patches_of(inside, side)[0].all(axis=(1, 2))
    share = share.mean(axis=(1, 2))
    keep = np.flatnonzero(whole & ((share >= 0.1) | (share < 0.02)))
    pixels = levelled(patches_of(luminance(eye), side)[0][keep])
    return pictures(
        grey(pixels),
        (share[keep] >= 0.1).astype(np.int64),
        ("none", "vessel"),
        groups=[block_of("retina", at[i], block) for i in keep],
        names=["retina@{},{}".format(*at[i]) for i in keep],
    )


def damage(side: int = 32, block: int = 64) -> Found:
    """What was done to a patch of a photograph: nothing, blur, noise, coarse blocks or faded contrast; 32x32 in colour.

    Patches of scikit-image's `astronaut` and `retina` (halved) that are not flat. Which damage and how strong is drawn
    once, so the labels are exact; the mildest damage is hard to see.
    """
    made, groups, names = [], [], []
    for word, picture in (("astronaut", photo("astronaut.png")), ("retina", _halved(photo("retina.jpg")))):
        cut, at = patches_of(picture, side)
        for k in np.flatnonzero(luminance(cut).std(axis=(1, 2)) >= 8):
            made.append(cut[k])
            groups.append(block_of(word, at[k], block))
            names.append("{}@{},{}".format(word, *at[k]))
    rng = np.random.default_rng(2027)
    labels = rng.permutation(np.arange(len(made)) % len(DAMAGE))
    pixels = np.stack([_damaged(patch, label, rng) for patch, label in zip(made, labels, strict=True)])
    return pictures(pixels, labels, DAMAGE, groups=groups, names=names)


def scenes(side: int = 32, block: int = 64, most: int = 60) -> Found:
    """Which of five pictures a patch was cut from, at most 60 of each: 32x32 in grey, of one mean and spread.

    scikit-image's astronaut, cell, scanned page, retina (halved) and handwritten text; flat patches are
    left out. Patches of one picture are near in light and focus, as in any task made of a few photographs.
    """
    pixels, labels, groups, names = [], [], [], []
    for label, file in enumerate(SCENES):
        picture = photo(file)
        cut, at = patches_of(luminance(_halved(picture) if file == "retina.jpg" else picture), side)
        found = np.flatnonzero(cut.std(axis=(1, 2)) >= 8)
        found = np.sort(np.random.default_rng(2028).permutation(found)[:most])
        pixels.append(levelled(cut[found]))
        labels += [label] * len(found)
        groups += [block_of(file, at[k], block) for k in found]
        names += ["{}@{},{}".format(file, *at[k]) for k in found]
    classes = tuple(file.partition(".")[0] for file in SCENES)
    return pictures(grey(np.concatenate(pixels)), np.array(labels), classes, groups=groups, names=names)


def _halved(picture: Picture) -> Picture:
    """Means of 2x2 pixels."""
    height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
    quads = picture[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
    return np.asarray(np.rint(quads.mean(axis=(1, 3))), dtype=np.uint8)


def _field(eye: Picture) -> NDArray[np.bool_]:
    """The round field of view, without its rim."""
    from scipy.ndimage import binary_erosion

    return np.asarray(binary_erosion(eye.max(axis=2) > 30, iterations=12), dtype=bool)


def _damaged(patch: Picture, label: int, rng: np.random.Generator) -> Picture:
    from scipy.fft import dctn, idctn
    from scipy.ndimage import gaussian_filter

    x, strength = patch.astype(np.float64), rng.uniform()
    if DAMAGE[label] == "blurred":
        x = gaussian_filter(x, (0.7 + 1.3 * strength, 0.7 + 1.3 * strength, 0))
    elif DAMAGE[label] == "noisy":
        x = x + (6 + 20 * strength) * rng.standard_normal(x.shape)
    elif DAMAGE[label] == "blocky":  # squares of 8x8 in which small frequencies are dropped, as a coarse JPEG does
        squares = x.reshape(4, 8, 4, 8, 3)
        step = 60 + 120 * strength
        x = idctn(np.rint(dctn(squares, axes=(1, 3), norm="ortho") / step) * step, axes=(1, 3), norm="ortho")
        x = x.reshape(32, 32, 3)
    elif DAMAGE[label] == "faded":
        x = x.mean() + (0.3 + 0.35 * strength) * (x - x.mean())
    return np.rint(np.clip(x, 0, 255)).astype(np.uint8)
