"""Common corruptions: exact where there is a formula, else stronger with severity, and the same for the same seed."""

from __future__ import annotations

import io
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.validate import Refused
from headstart.measure.corruptions import (
    SEVERITIES,
    CorruptionAccuracy,
    accuracy_by_corruption,
    corrupt,
    corruption_error,
)
from headstart.measure.distortions import CORRUPTIONS
from headstart.worlds.glyphs import render

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
          "elastic_transform")  # fmt: skip


@cache
def pictures(size: int = 32, count: int = 24) -> np.ndarray:
    return render(count, 0, size=size).images


def measured(**rows: tuple[float, ...]) -> CorruptionAccuracy:
    return CorruptionAccuracy(clean=0.9, corrupted=rows, severities=(1, 2), count=10)


def test_there_are_the_papers_fifteen() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_more_than_the_one_before(name: str, size: int) -> None:
    images = pictures(size)
    change = [float(np.abs(corrupt(images, name, s) - images.astype(float)).mean()) for s in SEVERITIES]
    assert change[0] > 0
    assert all(low < high for low, high in pairwise(change)), change


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_depends_on_seed_and_index_alone(name: str) -> None:
    images = pictures()[:6]
    before, state = images.copy(), (np.random.get_state()[1].copy(), torch.get_rng_state())
    whole = corrupt(images, name, 3, seed=4)
    assert np.array_equal(corrupt(images[2:4], name, 3, seed=4, first=2), whole[2:4])
    assert np.array_equal(corrupt(images[5:], name, 3, seed=4, first=5), whole[5:])
    assert (not np.array_equal(corrupt(images, name, 3, seed=5), whole)) == (name in RANDOM)
    twins = corrupt(np.stack([images[0]] * 2), name, 3)
    assert (not np.array_equal(*twins)) == (name in RANDOM)
    assert np.array_equal(images, before)
    assert np.array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.get_rng_state())


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(CORRUPTIONS)), h=st.integers(8, 40), w=st.integers(8, 40),
       severity=st.sampled_from(SEVERITIES), level=st.sampled_from([None, 0, 100, 255]), seed=st.integers(0, 99))  # fmt: skip
def test_any_picture_keeps_its_shape_and_type(
    name: str, h: int, w: int, severity: int, level: int | None, seed: int
) -> None:
    random = np.random.default_rng(seed).integers(0, 256, (1, h, w, 3), dtype=np.uint8)
    images = random if level is None else np.full_like(random, level)
    moved = corrupt(images, name, severity, seed=seed)
    assert moved.shape == images.shape
    assert moved.dtype == np.uint8


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "pixelate",
                                  "elastic_transform"])  # fmt: skip
@pytest.mark.parametrize("level", [0, 77, 255])
def test_blurs_leave_a_flat_picture_alone(name: str, level: int) -> None:
    flat = np.full((1, 12, 17, 3), level, np.uint8)
    assert np.array_equal(corrupt(flat, name, 5), flat)


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur"])
def test_a_blur_keeps_the_light_of_a_point(name: str) -> None:
    point = np.zeros((41, 41, 3))
    point[20, 20] = 1
    blurred = CORRUPTIONS[name](point, 5, np.random.default_rng(0))
    assert np.allclose(blurred.sum((0, 1)), 1)
    assert blurred.max() < 0.5
    rows, columns = np.indices((41, 41))
    assert np.allclose([(blurred[..., 0] * rows).sum(), (blurred[..., 0] * columns).sum()], 20)  # no shift


def test_gaussian_noise_has_the_declared_spread() -> None:
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    moved = corrupt(grey, "gaussian_noise", 1) / 255.0
    assert abs(float(moved.std()) - 0.08) < 0.001
    assert abs(float(moved.mean()) - 128 / 255) < 0.002


def test_shot_noise_counts_quanta() -> None:
    grey = np.full((4, 64, 64, 3), 51, np.uint8)  # 0.2 of white: 60 quanta make 12 a pixel
    moved = corrupt(grey, "shot_noise", 1) / 255.0
    assert abs(float(moved.mean()) - 0.2) < 0.002
    assert abs(float(moved.var()) - 0.2 / 60) < 1e-4
    assert not corrupt(np.zeros_like(grey), "shot_noise", 5).any()


def test_impulse_noise_strikes_the_declared_share_and_keeps_what_it_struck() -> None:
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    moved = [corrupt(grey, "impulse_noise", s) for s in SEVERITIES]
    for found, share in zip(moved, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True):
        assert set(np.unique(found)) == {0, 128, 255}
        assert abs(float((found != 128).mean()) - share) < 0.005
    assert all((high[low != 128] == low[low != 128]).all() for low, high in pairwise(moved))


def test_brightness_is_that_of_hue_saturation_value() -> None:
    from skimage.color import hsv2rgb, rgb2hsv

    hsv = rgb2hsv(pictures()[:4])
    hsv[..., 2] = (hsv[..., 2] + 0.3).clip(0, 1)
    wanted = np.rint(hsv2rgb(hsv) * 255)
    assert np.abs(corrupt(pictures()[:4], "brightness", 3) - wanted).max() <= 1  # rounding


def test_contrast_keeps_the_mean_and_a_share_of_the_rest() -> None:
    x = pictures()[0] / 255
    moved = CORRUPTIONS["contrast"](x, 5, np.random.default_rng(0))
    assert np.allclose(moved.mean((0, 1)), x.mean((0, 1)))
    assert np.allclose(moved.std((0, 1)), 0.05 * x.std((0, 1)))


def test_pixelate_averages_blocks() -> None:
    image = np.arange(20, dtype=np.uint8).repeat(20).reshape(1, 20, 20, 1).repeat(3, 3)
    moved = corrupt(image, "pixelate", 2)  # half the side: rows 2k and 2k + 1 become their mean
    assert np.array_equal(moved[0, ::2], moved[0, 1::2])
    assert np.abs(moved[0, ::2, 0, 0] - (np.arange(0, 20, 2) + 0.5)).max() <= 0.5
    assert [len(np.unique(corrupt(image[:, :8], "pixelate", s)[0, :, 0, 0])) for s in SEVERITIES] == [5, 4, 3, 2, 1]


def test_jpeg_is_a_jpeg_file() -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pictures()[0]).save(file, "JPEG", quality=7)
    assert np.array_equal(corrupt(pictures()[:1], "jpeg_compression", 5)[0], np.asarray(Image.open(file)))


def test_accuracy_does_not_depend_on_batches() -> None:
    images, labels = pictures(8), np.arange(24) % 3

    def predict(x: np.ndarray) -> np.ndarray:
        return np.asarray(x.reshape(len(x), -1).sum(1, dtype=np.int64) % 3)

    one, two = (accuracy_by_corruption(predict, images, labels, batch_size=k) for k in (5, 24))
    assert one == two
    assert set(one.corrupted) == set(CORRUPTIONS)
    assert one.clean == float((predict(images) == labels).mean())
    by_hand = float((predict(corrupt(images, "fog", 4)) == labels).mean())
    assert one.corrupted["fog"][3] == by_hand
    assert one.mean == pytest.approx(np.mean([*one.corrupted.values()]))


def test_corruption_error_by_hand() -> None:
    model, reference = measured(fog=(0.9, 0.8), snow=(0.6, 0.5)), measured(fog=(0.8, 0.6), snow=(0.4, 0.5))
    found = corruption_error(model, reference)
    assert found.by_corruption == pytest.approx({"fog": 0.3 / 0.6, "snow": 0.9 / 1.1})
    assert found.mean == pytest.approx((0.3 / 0.6 + 0.9 / 1.1) / 2)
    lost = corruption_error(model, reference, relative=True)
    assert lost.by_corruption == pytest.approx({"fog": 0.1 / 0.4, "snow": 0.7 / 0.9})
    assert corruption_error(reference, reference).mean == 1


def test_a_reference_without_errors_is_refused() -> None:
    with pytest.raises(Refused, match="none under fog"):
        corruption_error(measured(fog=(0.5, 0.5)), measured(fog=(1.0, 1.0)))
    with pytest.raises(Refused, match="same corruptions"):
        corruption_error(measured(fog=(0.5, 0.5)), measured(snow=(0.5, 0.5)))


@pytest.mark.parametrize(
    ("images", "name", "severity"),
    [
        (np.zeros((1, 8, 8, 3)), "fog", 1), (np.zeros((1, 8, 8, 1), np.uint8), "fog", 1),
        (np.zeros((8, 8, 3), np.uint8), "fog", 1), (np.zeros((1, 7, 8, 3), np.uint8), "fog", 1),
        (np.zeros((0, 8, 8, 3), np.uint8), "fog", 1), (pictures(8), "fogg", 1), (pictures(8), "fog", 0),
        (pictures(8), "fog", 6),
    ],
)  # fmt: skip
def test_bad_input_is_refused(images: np.ndarray, name: str, severity: int) -> None:
    with pytest.raises(Refused):
        corrupt(images, name, severity)


def test_bad_measurements_are_refused() -> None:
    images, never = pictures(8), lambda x: pytest.fail("predicted before the check")
    for bad in ({"corruptions": []}, {"corruptions": ["rain"]}, {"severities": (2, 1)}, {"severities": ()},
                {"severities": (0,)}, {"batch_size": 0}):  # fmt: skip
        with pytest.raises(Refused):
            accuracy_by_corruption(never, images, [0] * 24, **bad)
    with pytest.raises(Refused, match="one label"):
        accuracy_by_corruption(never, images, [0] * 23)
    with pytest.raises(Refused, match="class indices"):
        accuracy_by_corruption(lambda x: np.zeros((len(x), 10)), images, [0] * 24)
