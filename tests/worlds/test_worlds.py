"""What every world owes: bytes fixed by the seed, even classes, labels that the pictures bear out, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headstart.core.validate import Refused
from headstart.worlds import glyphs, gratings, noise, photographs, shapes
from headstart.worlds.noise import spectral

WORLDS = pytest.mark.parametrize(
    "world", [glyphs, gratings, noise, photographs, shapes], ids=lambda world: world.__name__.rsplit(".")[-1]
)


@WORLDS
def test_a_seed_fixes_every_byte_and_another_seed_changes_them(world):
    first, again, other = (world.render(60, seed) for seed in (1, 1, 2))
    assert first.images.tobytes() == again.images.tobytes()
    assert first.images.tobytes() != other.images.tobytes()


@WORLDS
def test_global_random_state_stays(world):
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    world.render(8, 0)
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    assert torch.equal(torch_before, torch.get_rng_state())


@WORLDS
def test_pictures_have_the_declared_form_and_even_classes(world):
    images, labels, classes = world.render(len(world.render(1, 0).classes) * 3, 0, size=24)
    assert images.shape == (len(classes) * 3, 24, 24, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert set(np.bincount(labels)) == {3}
    assert len(set(classes)) == len(classes)
    assert images.std(axis=(1, 2, 3)).min() > 0, "an empty picture"


@WORLDS
def test_bad_orders_are_refused(world):
    with pytest.raises(Refused):
        world.render(0, 0)
    with pytest.raises(Refused):
        world.render(3, 0, size=2)


def test_gratings_show_their_orientation_and_frequency():
    images, labels, _ = gratings.render(480, 0)
    grey = images.astype(float).mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True)))[:, :, :17] ** 2
    peak = power.reshape(len(grey), -1).argmax(1)
    fy, fx = np.fft.fftfreq(32)[peak // 17] * 32, peak % 17
    frequency, angle = np.hypot(fy, fx), np.rad2deg(np.arctan2(fx, fy)) % 180
    middle = np.array([2.0, 4.25, 8.5])[labels // 8]
    assert (np.abs(np.log2(frequency / middle)) < 0.75).mean() > 0.9
    away = np.abs((angle - 22.5 * (labels % 8) + 90) % 180 - 90)
    assert np.median(away[labels >= 8]) < 11.25  # the coarse ones have too few periods for a spectrum


def test_spectral_noise_falls_as_declared():
    field = spectral(400, 64, np.random.default_rng(0), 1.5).numpy()
    power = (np.abs(np.fft.fft2(field)) ** 2).mean(0)
    frequencies = np.arange(2, 24)
    slope = np.polyfit(np.log(frequencies), np.log(power[0, frequencies]), 1)[0]
    assert slope == pytest.approx(-2 * 1.5, abs=0.15)


def test_the_spectrum_alone_tells_most_processes_apart():
    from sklearn.ensemble import RandomForestClassifier

    def rows(seed):
        images, labels, _ = noise.render(960, seed)
        grey = images.astype(float).mean(-1)
        grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
        spectrum = np.abs(np.fft.rfft2(grey))
        return np.sort(spectrum.reshape(len(grey), -1), axis=1), labels

    x, y = rows(0)
    held_x, held_y = rows(1)
    assert RandomForestClassifier(60, random_state=0).fit(x, y).score(held_x, held_y) > 3 / 12  # chance 1/12


def test_no_shape_is_another_one_turned():
    from scipy.ndimage import rotate

    drawn = shapes._atlas().numpy()
    assert np.all((drawn > 0).mean((1, 2)) > 0.04)
    for one in range(len(drawn)):
        for angle in range(0, 360, 15):
            turned = rotate(drawn[one], angle, reshape=False, order=1, mode="nearest") > 0
            for other in range(one + 1, len(drawn)):
                both = (turned & (drawn[other] > 0)).sum() / (turned | (drawn[other] > 0)).sum()
                assert both < 0.87, (shapes.CLASSES[one], shapes.CLASSES[other], angle)


def test_photographs_of_the_tasks_stay_out_and_parts_share_no_pixel():
    files = {path.rsplit("/")[-1].split(".")[0] for _, path in photographs.PHOTOGRAPHS.values()}
    assert not files & {"brick", "grass", "gravel", "ihc", "lfw_subset", "text", "page"}
    # a picture whose red channel is its column tells where a patch was cut
    ramp = torch.linspace(0, 1, 400).expand(3, 300, 400).contiguous()
    rng = np.random.default_rng(0)
    reach = {part: [photographs._cut(ramp, rng, 32, part)[0] for _ in range(60)] for part in ("train", "held-out")}
    assert max(float(patch.max()) for patch in reach["train"]) < 0.751
    assert min(float(patch.min()) for patch in reach["held-out"]) > 0.749
    with pytest.raises(Refused, match="held-out"):
        photographs.render(2, 0, part="heldout")
