"""The fifteen common corruptions, each a function (picture, severity, rng) -> picture.

A picture is float64 (H, W, 3) in [0, 1]; severity runs from 1 to 5; values outside [0, 1] are cut by the caller. The
random numbers that a function draws do not depend on the severity (but for shot noise, whose law does), so severities
of one picture differ in strength alone. Strengths follow the
published ones where a number has a meaning of its own (noise levels, JPEG qualities, shares of contrast) and are
chosen here for what is painted by other means. Lengths are given for a
side of 224 pixels and scale with the smaller side; below 32 pixels they are as at 32, where they would vanish else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

Picture: TypeAlias = np.typing.NDArray[np.float64]
Random = np.random.Generator
_REFERENCE, _SMALLEST = 224, 32


def gaussian_noise(x: Picture, severity: int, rng: Random) -> Picture:
    """What a sensor adds in the dark: normal noise of 0.08 to 0.38."""
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * rng.standard_normal(x.shape)


def shot_noise(x: Picture, severity: int, rng: Random) -> Picture:
    """What counting light adds: Poisson with 60 to 3 quanta at white."""
    quanta = (60, 25, 12, 5, 3)[severity - 1]
    return rng.poisson(x * quanta) / quanta


def impulse_noise(x: Picture, severity: int, rng: Random) -> Picture:
    """Salt and pepper: 3 % to 27 % of the values become 0 or 1; those of a severity are among those of the next."""
    share, u = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1], rng.random(x.shape)
    return np.where(u < share / 2, 0.0, np.where(u > 1 - share / 2, 1.0, x))


def defocus_blur(x: Picture, severity: int, rng: Random) -> Picture:
    """A lens out of focus: the mean over a disc."""
    return _convolved(x, _disc(_length(x, (4.5, 6, 8, 10, 12)[severity - 1])))


def glass_blur(x: Picture, severity: int, rng: Random) -> Picture:
    """Frosted glass: a slight blur, then every pixel is looked up a little to the side, twice."""
    from scipy.ndimage import gaussian_filter

    soft = _length(x, (2, 2.5, 3, 3.5, 4)[severity - 1])
    far = _length(x, (2.5, 4, 5.5, 7, 9)[severity - 1])
    y = gaussian_filter(x, (soft / 2, soft / 2, 0), mode="reflect")
    for _ in range(2):
        y = _looked_up(y, *(far * rng.uniform(-1, 1, (2, *x.shape[:2]))))
    return np.asarray(y)


def motion_blur(x: Picture, severity: int, rng: Random) -> Picture:
    """A camera that moves: the mean along a line within 45 degrees of the horizontal."""
    return _convolved(x, _line(_length(x, (10, 15, 20, 27, 35)[severity - 1]), rng.uniform(-math.pi / 4, math.pi / 4)))


def zoom_blur(x: Picture, severity: int, rng: Random) -> Picture:
    """A camera that nears its object: the mean of the picture and ten enlargements up to 1.1 to 1.3."""
    most, (h, w) = (1.1, 1.15, 1.2, 1.25, 1.3)[severity - 1], x.shape[:2]
    rows, columns = np.arange(h)[:, None] - (h - 1) / 2, np.arange(w)[None] - (w - 1) / 2
    copies = [_looked_up(x, rows * (1 / zoom - 1), columns * (1 / zoom - 1)) for zoom in np.linspace(1, most, 11)[1:]]
    return np.asarray(np.mean([x, *copies], axis=0))


def snow(x: Picture, severity: int, rng: Random) -> Picture:
    """Flakes, streaked by their fall, over a paler picture."""
    paler, threshold = (0.1, 0.17, 0.24, 0.32, 0.4)[severity - 1], (1.9, 1.6, 1.35, 1.1, 0.9)[severity - 1]
    field = _smooth_field(x.shape[:2], _length(x, 3), rng)
    flakes = _line(_length(x, 12), math.pi / 2 + rng.uniform(-0.6, 0.6))
    layer = _convolved(np.clip(1.5 * (field - threshold), 0, 1)[..., None], flakes)
    grey = x.mean(2, keepdims=True)
    return np.asarray(x + paler * (np.maximum(x, np.minimum(1.5 * grey + 0.5, 1)) - x) + layer)


def frost(x: Picture, severity: int, rng: Random) -> Picture:
    """Ice on the window: a crystal texture of ridges takes the place of a growing share of the picture."""
    share, ridges = (0.25, 0.4, 0.52, 0.62, 0.7)[severity - 1], np.zeros(x.shape[:2])
    for octave, length in enumerate((32, 14, 6)):
        ridges += 0.6**octave * (1 - np.minimum(np.abs(_smooth_field(x.shape[:2], _length(x, length), rng)), 1))
    cover = (ridges / max(float(ridges.max()), 1e-12))[..., None]
    return x + share * (0.4 + 0.6 * cover) * ((0.55 + 0.45 * cover) * (0.88, 0.95, 1.0) - x)


def fog(x: Picture, severity: int, rng: Random) -> Picture:
    """Light scattered on the way: clouds, with more power at longer waves, are added and the sum is scaled down."""
    dense, (h, w) = (0.6, 0.9, 1.3, 1.8, 2.5)[severity - 1], x.shape[:2]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    frequency[0, 0] = np.inf
    cloud = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h, w))) * frequency**-1.7, s=(h, w))
    cloud = 0.5 + 0.5 * (cloud - cloud.min()) / max(float(np.ptp(cloud)), 1e-12)  # a flat cloud must not give 0 / 0
    return np.asarray((x + dense * cloud[..., None]) / (1 + dense))


def brightness(x: Picture, severity: int, rng: Random) -> Picture:
    """Daylight: the value of hue, saturation and value rises by 0.1 to 0.5."""
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 1)
    return np.asarray(np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter))


def contrast(x: Picture, severity: int, rng: Random) -> Picture:
    """Flat light: 40 % to 5 % of each channel's distance from its mean stays."""
    mean = x.mean((0, 1))
    return np.asarray(mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (x - mean))


def elastic_transform(x: Picture, severity: int, rng: Random) -> Picture:
    """A picture on rubber: every place is moved by a smooth random field of 4 to 14 pixels (root mean square)."""
    far = _length(x, (4, 6, 8, 11, 14)[severity - 1])
    wide = 0.08 * min(x.shape[:2])
    return _looked_up(x, *(far * _smooth_field(x.shape[:2], wide, rng) for _ in range(2)))


def pixelate(x: Picture, severity: int, rng: Random) -> Picture:
    """Too few pixels: averaged down to 60 % to 25 % of each side, at least one pixel a severity, and up again."""
    from PIL import Image

    h, w = sides = list(x.shape[:2])
    for share in (0.6, 0.5, 0.4, 0.3, 0.25)[:severity]:
        sides = [min(side - 1, round(share * whole)) for side, whole in zip(sides, (h, w), strict=True)]
    small = Image.fromarray(_bytes(x)).resize((sides[1], sides[0]), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.NEAREST)) / 255


def jpeg_compression(x: Picture, severity: int, rng: Random) -> Picture:
    """JPEG at quality 25 to 7."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_bytes(x)).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(file)) / 255


CORRUPTIONS: dict[str, Callable[[Picture, int, Random], Picture]] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip


def _bytes(x: Picture) -> np.ndarray:
    return np.asarray(np.rint(x.clip(0, 1) * 255).astype(np.uint8))


def _length(x: Picture, pixels: float) -> float:
    return pixels * max(int(min(x.shape[:2])), _SMALLEST) / _REFERENCE


def _disc(radius: float) -> np.ndarray:
    """The share of each pixel that a disc covers, by 15 x 15 points a pixel."""
    reach = math.ceil(radius - 0.5) if radius > 0.5 else 0
    points = (np.arange((2 * reach + 1) * 15) + 0.5) / 15 - reach - 0.5
    inside = points[:, None] ** 2 + points[None] ** 2 <= radius**2
    covered = inside.reshape(2 * reach + 1, 15, 2 * reach + 1, 15).mean((1, 3))
    return np.asarray(covered / covered.sum())


def _line(length: float, angle: float) -> np.ndarray:
    """A line of unit weight, its points shared among the four pixels around each."""
    reach = math.ceil(length / 2) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    along = np.linspace(-length / 2, length / 2, 32 * reach + 1)
    rows, columns = reach + along * math.sin(angle), reach + along * math.cos(angle)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - (rows - top)) * np.abs(1 - right - (columns - left))
            np.add.at(kernel, (top + down, left + right), weight)
    return np.asarray(kernel / kernel.sum())


def _convolved(x: Picture, kernel: np.ndarray) -> Picture:
    from scipy.signal import fftconvolve

    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    return np.asarray(fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1)))


def _looked_up(x: Picture, down: np.ndarray, right: np.ndarray) -> Picture:
    """The picture at places that lie `down` and `right` of each pixel, between pixels linearly."""
    from scipy.ndimage import map_coordinates

    rows, columns = np.arange(x.shape[0])[:, None] + down, np.arange(x.shape[1])[None] + right
    places = np.broadcast_arrays(rows, columns)
    return np.stack([map_coordinates(x[..., k], places, order=1, mode="reflect") for k in range(x.shape[2])], -1)


def _smooth_field(shape: tuple[int, ...], length: float, rng: Random) -> np.ndarray:
    """Normal noise blurred by `length` pixels, then of mean 0 and standard deviation 1."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal(shape), length, mode="wrap")
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-12))
