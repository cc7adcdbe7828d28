"""The labels of the tasks that `tasks.characters` and `tasks.photographs` make, checked against the originals."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy.fft import dctn
from scipy.ndimage import black_tophat, shift

from headstart.tasks.characters import GREEK, GREEK_FONTS, TYPEFACES
from headstart.tasks.found import Found
from headstart.tasks.patches import luminance, photo
from headstart.tasks.read import Reading, read


def _found(name: str) -> Found:
    return read(name, Reading())[0]


def _pixels(found: Found) -> np.ndarray:
    return np.stack([found.inputs[i] for i in range(len(found.names))]).astype(float)


def _corners(found: Found) -> list[tuple[str, int, int]]:
    parts = [name.split("@") for name in found.names]
    return [(word, *map(int, at.split(","))) for word, at in parts]  # type: ignore[misc]


def _halved(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape  # both odd
    quads = pixels[: height - 1, : width - 1].reshape(height // 2, 2, width // 2, 2)
    return np.asarray(quads.mean(axis=(1, 3)))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def test_every_font_of_greek_has_every_letter() -> None:
    for name in GREEK_FONTS:
        font = _font(name, 48)
        drawn = [bytes(font.getmask(letter)) for letter in GREEK]
        assert len(set(drawn)) == len(GREEK) == 24
        assert bytes(font.getmask("\uffff")) not in drawn  # what a font draws for a letter that it lacks


def test_typefaces_are_families_that_share_no_font_and_only_mono_has_one_width() -> None:
    for word, fonts in TYPEFACES.items():
        widths = [_font(name, 48).getlength("i") == _font(name, 48).getlength("W") for name in fonts]
        assert widths == [word == "mono"] * len(fonts)
    every = [name for fonts in TYPEFACES.values() for name in fonts]
    assert len(set(every)) == len(every)


def test_greek_pictures_show_the_letter_of_their_label() -> None:
    """The upright letter of another font that overlaps best is right far above chance, in spite of slant and warp."""
    found, font, templates = _found("greek"), _font("DejaVuSans", 26), []
    for letter in GREEK:
        canvas = Image.new("L", (32, 32))
        left, top, right, bottom = font.getbbox(letter)
        at = (16 - (left + right) / 2, 16 - (top + bottom) / 2)
        ImageDraw.Draw(canvas).text(at, letter, fill=255, font=font)
        glyph = np.asarray(canvas, dtype=float)
        templates.append([shift(glyph, (y, x), order=0) for y in (-4, -2, 0, 2, 4) for x in (-4, -2, 0, 2, 4)])
    flat = np.array(templates).reshape(len(GREEK), -1, 1024)
    light = _pixels(found).mean(axis=3).reshape(-1, 1024)
    for values in (flat, light):
        values -= values.mean(axis=-1, keepdims=True)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
    alike = np.abs(np.einsum("np,ltp->nlt", light, flat)).max(axis=2)  # ink may be darker or lighter than paper
    assert (alike.argmax(axis=1) == found.labels).mean() > 4 / 24


def test_a_scene_is_the_picture_that_it_is_called() -> None:
    found = _found("scenes")
    originals = {name: luminance(photo(name)) for name in ("astronaut.png", "cell.png", "page.png", "text.png")}
    originals["retina.jpg"] = _halved(luminance(photo("retina.jpg")))
    for (file, y, x), patch, label in zip(_corners(found), _pixels(found), found.labels, strict=True):
        assert file.startswith(found.classes[label])
        cut, shown = originals[file][y : y + 32, x : x + 32], patch[..., 0]
        kept = (shown > 0) & (shown < 255)  # the brightest and darkest are clipped
        assert np.corrcoef(cut[kept], shown[kept])[0, 1] > 0.99
    assert np.bincount(found.labels).min() >= 38


def test_a_vessel_is_a_narrow_dark_thing_to_another_filter_too() -> None:
    found = _found("vessels")
    dark = black_tophat(_halved(photo("retina.jpg")[..., 1]), size=(11, 11))
    depth = np.array([dark[y : y + 32, x : x + 32].mean() for _, y, x in _corners(found)])
    above = depth[found.labels == 1][:, None] > depth[found.labels == 0][None]
    assert above.mean() > 0.9


@pytest.mark.parametrize("word", ["blocky", "none"])
def test_blocky_patches_have_lost_their_small_frequencies(word: str) -> None:
    found = _found("damage")
    patches = _pixels(found)[found.labels == found.classes.index(word)]
    squares = patches.reshape(-1, 4, 8, 4, 8, 3)
    size = np.abs(dctn(squares, axes=(2, 4), norm="ortho")).transpose(0, 1, 3, 5, 2, 4)
    unclipped = (squares.min(axis=(2, 4)) > 0) & (squares.max(axis=(2, 4)) < 255)
    between = ((size > 6) & (size < 54)).mean(axis=(-1, -2))[unclipped]  # rounding to grey levels makes up to some 4
    assert len(between) > 1000
    assert between.max() == 0 if word == "blocky" else between.mean() > 0.05


def test_damaged_patches_are_spread_evenly_over_both_pictures() -> None:
    found = _found("damage")
    words = np.array([word for word, _, _ in _corners(found)])
    for word in ("astronaut", "retina"):
        counts = np.bincount(found.labels[words == word], minlength=5)
        assert counts.min() > 0.6 * counts.max()
