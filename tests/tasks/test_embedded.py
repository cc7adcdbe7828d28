from __future__ import annotations

import socket

import numpy as np
import pytest

from headstart.tasks import EMBEDDED, load_task, wilson
from headstart.tasks.patches import photo
from headstart.tasks.read import Reading, read

SHAPES = {
    "breast-cancer": (569, 2, (30,)),
    "damage": (381, 5, (32, 32, 3)),
    "digits": (1797, 10, (8, 8, 3)),
    "faces": (200, 2, (25, 25, 3)),
    "glyphs": (1040, 26, (32, 32, 3)),
    "greek": (960, 24, (32, 32, 3)),
    "scenes": (269, 5, (32, 32, 3)),
    "textures": (192, 3, (64, 64, 3)),
    "tissue": (217, 2, (32, 32, 3)),
    "typefaces": (600, 5, (32, 32, 3)),
    "vessels": (253, 2, (32, 32, 3)),
    "wine": (178, 3, (13,)),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an embedded task asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_every_embedded_task_is_whole_and_offline(name: str) -> None:
    count, classes, shape = SHAPES[name]
    task = load_task(name)
    assert (task.name, task.target, len(task.classes)) == (name, name, classes)
    assert sum(map(len, (task.train, task.validation, task.test))) == count
    assert task.train.inputs[0].shape == shape
    assert task.manifest == load_task(name).manifest


def test_digits_keep_every_grey_level() -> None:
    from sklearn.datasets import load_digits

    found, _, _ = read("digits", Reading())
    pixels = np.stack([found.inputs[i][..., 0] for i in range(1797)])
    assert np.array_equal(np.rint(pixels / 255 * 16), load_digits().images)
    assert np.array_equal(found.labels, load_digits().target)


@pytest.mark.parametrize(("name", "block"), [
    ("textures", 128), ("tissue", 64), ("vessels", 64), ("damage", 64), ("scenes", 64),
])  # fmt: skip
def test_patches_of_one_region_stay_on_one_side(name: str, block: int) -> None:
    for seed in range(3):
        task = load_task(name, seed=seed)
        sides = []
        for part in (task.train, task.validation, task.test):
            corners = [at.split("@") for at in part.names]
            sides.append({(word, *(int(v) // block for v in at.split(","))) for word, at in corners})
        assert not sides[2] & (sides[0] | sides[1])
        assert not sides[0] & sides[1]


def test_texture_patches_share_no_pixel_with_each_other() -> None:
    found, _, _ = read("textures", Reading())
    corners = {name: tuple(map(int, name.split("@")[1].split(","))) for name in found.names}
    assert len(corners) == 192
    assert all(y % 64 == 0 and x % 64 == 0 for y, x in corners.values())


def test_tissue_does_not_give_its_label_away_by_colour_or_brightness() -> None:
    found, _, _ = read("tissue", Reading())
    pixels = np.stack([found.inputs[i] for i in range(len(found.names))]).astype(float)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    means = pixels.mean(axis=(1, 2, 3))
    assert np.abs(means - 128).max() < 4  # what clipping leaves of equal means
    assert pixels.std(axis=(1, 2, 3)).std() < 2


def test_the_pictures_called_faces_are_the_faces() -> None:
    """Eyes are darker than cheeks; a cut of background is as often the other way round."""
    found, _, _ = read("faces", Reading())
    grey = np.stack([found.inputs[i][..., 0] for i in range(200)]).astype(float)
    darker = grey[:, 8:11, 5:20].mean(axis=(1, 2)) < grey[:, 12:15, 5:20].mean(axis=(1, 2))
    is_face = np.array(found.classes)[found.labels] == "face"
    assert is_face.sum() == 100
    assert wilson(int(darker[is_face].sum()), 100)[0] > 0.5 > wilson(int(darker[~is_face].sum()), 100)[0]


def test_an_embedded_name_takes_no_column() -> None:
    from headstart.core.validate import Refused

    with pytest.raises(Refused, match="have no columns; got label_column"):
        load_task("wine", label_column="x")


def test_damage_is_what_its_label_says() -> None:
    found, _, _ = read("damage", Reading())
    astronaut = photo("astronaut.png")
    for i, name in enumerate(found.names):
        word, _, at = name.partition("@")
        y, x = map(int, at.split(","))
        if word != "astronaut":
            continue
        before, after = astronaut[y : y + 32, x : x + 32].astype(float), found.inputs[i].astype(float)
        rough = [np.abs(np.diff(v, axis=0)).mean() for v in (before, after)]
        match found.classes[found.labels[i]]:
            case "none":
                assert np.array_equal(before, after)
            case "blurred":
                assert rough[1] < rough[0]
            case "noisy":
                assert 3 < (after - before).std() < 30
            case "faded":
                assert 0.25 < after.std() / before.std() < 0.7
            case "blocky":
                assert not np.array_equal(before, after)


def test_patches_of_scenes_and_vessels_have_one_mean_and_spread() -> None:
    for name in ("scenes", "vessels"):
        found, _, _ = read(name, Reading())
        pixels = np.stack([found.inputs[i] for i in range(len(found.labels))]).astype(float)
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
        assert np.abs(np.median(pixels.mean((1, 2, 3))) - 128) < 1  # a few have edges that are clipped
        assert np.abs(np.median(pixels.std((1, 2, 3))) - 48) < 1


def test_vessels_are_darker_along_a_line_than_their_patch() -> None:
    found, _, _ = read("vessels", Reading())
    pixels = np.stack([found.inputs[i][..., 0] for i in range(len(found.labels))]).astype(float)
    darkest = np.quantile(pixels, 0.02, axis=(1, 2))
    assert darkest[found.labels == 1].mean() < darkest[found.labels == 0].mean()
