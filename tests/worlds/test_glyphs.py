"""Rendered characters: same seed same bytes, readable by a template, fonts kept apart, bad orders refused."""

from __future__ import annotations

import numpy as np
import pytest

from headstart.core.validate import Refused
from headstart.worlds import glyphs


def test_a_seed_fixes_every_byte_and_another_seed_changes_them():
    first, again, other = (glyphs.render(40, seed, classes="digits") for seed in (3, 3, 4))
    assert first.images.tobytes() == again.images.tobytes()
    assert first.images.tobytes() != other.images.tobytes()


def test_classes_are_drawn_evenly_and_named_in_order():
    _, labels, classes = glyphs.render(100, 0, classes="letters+digits")
    counts = np.bincount(labels, minlength=len(classes))
    assert counts.max() - counts.min() <= 1
    assert classes[:3] == ("a", "b", "c")
    assert classes[-1] == "9"


def test_training_and_held_out_fonts_share_nothing():
    assert not set(glyphs.FONTS["train"]) & set(glyphs.FONTS["held-out"])


def test_pictures_show_their_label():
    """A linear classifier fitted on training fonts reads held-out fonts far above chance."""
    from sklearn.linear_model import LogisticRegression

    def rows(fonts, seed):
        images, labels, _ = glyphs.render(1500, seed, classes="OXL-H", fonts=fonts, low_resolution=0.0)
        grey = images.mean(-1).reshape(len(images), -1)
        grey = grey - np.median(grey, axis=1, keepdims=True)  # the background is most of the picture
        return np.abs(grey) / 255, labels

    x, y = rows("train", 0)
    held_x, held_y = rows("held-out", 1)
    assert LogisticRegression(max_iter=300).fit(x, y).score(held_x, held_y) > 0.6  # chance 0.2


def test_low_resolution_removes_detail():
    sharp, low = (glyphs.render(200, 0, low_resolution=share).images.astype(float) for share in (0.0, 1.0))
    detail = [np.abs(np.diff(np.diff(images, axis=1), axis=1)).mean() for images in (sharp, low)]
    assert detail[1] < 0.7 * detail[0]


@pytest.mark.parametrize(
    "order",
    [{"count": 0}, {"count": 4, "size": 4}, {"count": 4, "classes": "äö"}, {"count": 4, "fonts": "Comic"}],
)
def test_bad_orders_are_refused(order):
    with pytest.raises(Refused):
        glyphs.render(seed=0, **order)
