"""Written characters: the fonts inside matplotlib, bent, thickened, recoloured and seen at low resolution.

Every glyph is kept as a signed distance to its outline, so that a pen of any width can redraw it.
"""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headstart.core.validate import one_of, require

from .pictures import CHUNK, Pictures, asked, coarse, eight_bit, painted, uniform
from .warp import signed_distance, warp

_CANVAS = 64  # side of the distance images
_BODY = 44  # longest side of a glyph inside its canvas, so that thick pens have room

FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
        "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
        "STIXGeneralItalic", "cmb10", "cmr10", "cmtt10",
    ),
    "held-out": (
        "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBolIta", "cmss10", "cmti10",
    ),
}  # fmt: skip

# the punctuation that Computer Modern, whose encoding is not ASCII, draws as everyone else does
PUNCTUATION = "!#%&()*+,-./:;=?@[]"
CLASSES = {
    "letters": string.ascii_letters,
    "upper": string.ascii_uppercase,
    "lower": string.ascii_lowercase,
    "digits": string.digits,
    "letters+digits": string.ascii_letters + string.digits,
    "all": string.ascii_letters + string.digits + PUNCTUATION,
}


def render(
    count: int,
    seed: int,
    *,
    size: int = 32,
    classes: str = "letters",
    fonts: Literal["train", "held-out"] = "train",
    low_resolution: float = 0.6,
) -> Pictures:
    """Pictures of single characters in random hands: font, slant, pen width, colours and resolution vary.

    Args:
        count: how many pictures; the classes are drawn evenly.
        seed: of every random choice; the same seed gives the same bytes.
        size: side of the square pictures, in pixels.
        classes: a name in `CLASSES`, or the characters themselves such as "0123456789".
        fonts: "train", or the disjoint set "held-out".
        low_resolution: share of pictures averaged down to 8..16 pixels and up again.

    Returns:
        images uint8 (count, size, size, 3), labels int64 (count,), one class name a character.

    Cost: about 0.2 ms a picture of 32x32, after half a second for the fonts.

    Raises:
        Refused: count < 1, size outside 8..256, unknown fonts, or a character that not all fonts have.

    >>> images, labels, names = render(4, 0, classes="abc")
    >>> images.shape, labels.tolist(), names
    ((4, 32, 32, 3), [0, 1, 2, 0], ('a', 'b', 'c'))
    """
    asked(count, size)
    one_of("fonts", fonts, FONTS)
    characters = CLASSES.get(classes, classes)
    strange = sorted(set(characters) - set(CLASSES["all"]))
    require(
        bool(characters) and not strange,
        "glyphs.render draws ASCII letters, digits and some punctuation",
        repr(classes),
        f"Pass a name of {sorted(CLASSES)} or characters from {CLASSES['all']!r}.",
    )
    return drawn(characters, FONTS[fonts], count, seed, size=size, low_resolution=low_resolution)


def drawn(
    characters: str, fonts: tuple[str, ...], count: int, seed: int, *, size: int = 32, low_resolution: float = 0.6
) -> Pictures:
    """`render` for any characters that all of the named fonts have, such as Greek letters."""
    atlas, pens = _atlas(characters, fonts)
    rng = np.random.default_rng([seed, 1])
    labels = np.arange(count) % len(characters)
    parts = [
        _draw(atlas, pens, labels[first : first + CHUNK], rng, size, low_resolution) for first in range(0, count, CHUNK)
    ]
    return Pictures(np.concatenate(parts), labels.astype(np.int64), tuple(characters))


def boxed(count: int, seed: int, *, classes: str = "digits", size: int = 8) -> tuple[Tensor, Tensor]:
    """Characters as UCI's digits are: white on black, fitted to the frame, tiny; sheared by up to 0.3, with some noise.

    Args:
        count: how many; the classes are drawn evenly, the fonts at random.
        seed: of every random choice.
        classes: a name in `CLASSES`, or the characters themselves.
        size: side of the square pictures, in pixels.

    Returns:
        pictures float32 (count, 1, size, size) in [0, 1] and labels int64 (count,).

    >>> x, y = boxed(3, 0)
    >>> x.shape, y.tolist()
    (torch.Size([3, 1, 8, 8]), [0, 1, 2])
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    characters = CLASSES.get(classes, classes)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [ImageFont.truetype(str(folder / f"{name}.ttf"), 48) for name in FONTS["train"]]
    rng, labels, pictures = np.random.default_rng(seed), torch.arange(count) % len(characters), []
    for label in labels.tolist():
        page = Image.new("L", (128, 128))
        face = faces[rng.integers(len(faces))]
        ImageDraw.Draw(page).text((64, 64), characters[label], fill=255, font=face, anchor="mm")
        shear = rng.uniform(-0.3, 0.3)
        across = (1, shear, -64 * shear, 0, 1, 0)
        page = page.transform(page.size, Image.Transform.AFFINE, across, Image.Resampling.BILINEAR)
        small = page.crop(page.getbbox()).resize((size, size), Image.Resampling.BOX)
        pictures.append(np.asarray(small, np.float32) / 255 + rng.normal(0, 0.1, (size, size)))
    return torch.tensor(np.stack(pictures), dtype=torch.float32)[:, None].clamp(0, 1), labels


def loose(count: int, seed: int, *, classes: str = "digits", size: int = 8) -> tuple[Tensor, Tensor]:
    """As `boxed`, but not fitted to the frame: size, stroke, rotation and shear are random, and there is no noise.

    >>> x, y = loose(3, 0, classes="AB", size=16)
    >>> x.shape, y.tolist()
    (torch.Size([3, 1, 16, 16]), [0, 1, 0])
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    characters = CLASSES.get(classes, classes)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng, labels, pictures = np.random.default_rng(seed), torch.arange(count) % len(characters), []
    faces = [[ImageFont.truetype(str(folder / f"{name}.ttf"), high) for high in range(36, 61, 4)]
             for name in FONTS["train"]]  # fmt: skip
    for label in labels.tolist():
        page, sizes = Image.new("L", (64, 64)), faces[rng.integers(len(faces))]
        face, stroke = sizes[rng.integers(len(sizes))], int(rng.integers(4))
        ImageDraw.Draw(page).text((32, 32), characters[label], 255, face, "mm", stroke_width=stroke, stroke_fill=255)
        shear = rng.uniform(-0.25, 0.25)
        page = page.transform(page.size, Image.Transform.AFFINE, (1, shear, -32 * shear, 0, 1, 0))
        page = page.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
        pictures.append(np.asarray(page, np.float32) / 255)
    return torch.tensor(np.stack(pictures))[:, None], labels


def _draw(
    atlas: Tensor, pens: Tensor, labels: np.ndarray, rng: np.random.Generator, size: int, low_resolution: float
) -> np.ndarray:
    n = len(labels)
    which = torch.from_numpy(labels), torch.from_numpy(rng.integers(0, atlas.shape[1], n))
    distance = atlas[which][:, None]  # (n, 1, 64, 64), positive inside
    distance = warp(
        distance, rng, size=size, rotate=18, shear=0.25, scale=(0.85, 1.6), stretch=0.7, shift=0.2, elastic=0.07
    )[:, 0]
    pen = torch.maximum(uniform(rng, 1.2, 6.0, n), 0.55 * pens[which])  # thinner than about half breaks the stroke
    soft = uniform(rng, 0.4, 2.0, n)
    ink = torch.sigmoid((distance + (pen - pens[which])[:, None, None]) / soft[:, None, None])
    images = coarse(painted(ink, rng), rng, (8, 8, 10, 12, 16), low_resolution)
    return eight_bit(images, rng)


@cache
def _atlas(characters: str, fonts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Signed distances (characters, fonts, 64, 64) in pixels, and half the stroke width of each (characters, fonts)."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    loaded = [ImageFont.truetype(str(folder / f"{font}.ttf"), 96) for font in fonts]
    distances = np.stack([[_distance(font, character) for font in loaded] for character in characters])
    inside = distances > 0
    # a straight stroke of half width h has a mean inner distance of h / 2
    pens = 2 * (distances * inside).sum((-1, -2)) / np.maximum(inside.sum((-1, -2)), 1)
    return torch.from_numpy(distances), torch.from_numpy(pens.astype(np.float32))


def _distance(font: Any, character: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (288, 288))
    ImageDraw.Draw(canvas).text((96, 96), character, fill=255, font=font)
    glyph = canvas.crop(canvas.getbbox())
    scale = min(_BODY / max(glyph.size), 1.0)  # small marks such as a full stop are not blown up
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)
    frame = Image.new("L", (_CANVAS, _CANVAS))
    frame.paste(glyph, ((_CANVAS - glyph.width) // 2, (_CANVAS - glyph.height) // 2))
    return signed_distance(np.asarray(frame) > 127)
