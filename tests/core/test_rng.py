"""Random state is borrowed and given back."""

from __future__ import annotations

import random
from io import BytesIO

import numpy as np
import pytest
import torch

from headstart.core.rng import random_state, restore_random_state, seeded
from headstart.testing.subject import difference


def draw() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random(), float(np.random.randn())


def draw_and_fail() -> None:
    draw()
    raise KeyError


def test_seeded_seeds_all_three_and_gives_all_three_back() -> None:
    before = random_state()
    with seeded(5):
        first = draw()
    assert not difference(before, random_state())
    with seeded(5):
        assert draw() == first
    with seeded(6):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_none_leaves_the_seed_alone_and_still_gives_back() -> None:
    with seeded(1):
        expected = draw()
    with seeded(1):
        with seeded(None):
            assert draw() == expected
        assert draw() == expected


def test_given_back_after_an_error() -> None:
    before = random_state()
    with pytest.raises(KeyError), seeded(1):
        draw_and_fail()
    assert not difference(before, random_state())


def test_state_survives_a_safe_file() -> None:
    with seeded(3):
        draw()  # leaves numpy with a stored second normal
        file = BytesIO()
        torch.save(random_state(), file)
        expected = draw()
        file.seek(0)
        restore_random_state(torch.load(file, weights_only=True))
        assert draw() == expected
