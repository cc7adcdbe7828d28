"""Captioned letters: pictures and captions say what their values say."""

from __future__ import annotations

import pytest
import torch

from headstart.core.validate import Refused
from headstart.worlds.captioned_letters import KINDS, OTHERS, WORDS, captions, pictures

EVERY = torch.cartesian_prod(*map(torch.arange, KINDS.values()))


def test_a_picture_shows_its_values():
    x = pictures(EVERY, 0)
    assert x.shape == (256, 1, 20, 20)
    assert 0 <= x.min() < x.max() <= 1
    strong = (x[:, 0] - 0.5) * ((x[:, 0] - 0.5).abs() > 0.25)
    weight = strong.abs()
    place = torch.arange(20.0)
    down = (weight.sum(2) @ place) / weight.sum((1, 2))
    across = (weight.sum(1) @ place) / weight.sum((1, 2))
    assert torch.equal(across > 9.5, EVERY[:, 1] == 1)
    assert torch.equal(down > 9.5, EVERY[:, 2] == 1)
    assert torch.equal(strong.sum((1, 2)) < 0, EVERY[:, 3] == 1)


def test_a_caption_names_four_of_the_five_values_in_any_of_three_words():
    found = captions(EVERY, 1)
    for values, rows in zip(EVERY.tolist(), found.tolist(), strict=True):
        true = {f"{kind}{value}" for kind, value in zip(KINDS, values, strict=True)}
        for row in rows:
            said = [WORDS[k] for k in row]
            assert len({word[:-1] for word in said}) == 4
            assert {word[:-1] for word in said} <= true
    assert found.unique().tolist() == list(range(len(WORDS)))


def test_others_are_of_the_same_kind_and_say_something_else():
    assert len(WORDS) == 72
    for word, others in OTHERS.items():
        count = 45 if word.startswith("letter") else 3
        assert len(others) == count
        kind = word.rstrip("0123456789abc")
        assert all(other.startswith(kind) and other[:-1] != word[:-1] for other in others)


def test_the_seed_decides_and_bad_values_are_refused():
    assert torch.equal(pictures(EVERY[:9], 3), pictures(EVERY[:9], 3))
    assert not torch.equal(pictures(EVERY[:9], 3), pictures(EVERY[:9], 4))
    assert not torch.equal(captions(EVERY[:9], 3), captions(EVERY[:9], 4))
    for wrong in (EVERY + 1, EVERY - 1, EVERY[:, :4], EVERY.float(), EVERY[0]):
        for make in (pictures, captions):
            with pytest.raises(Refused, match="Values must be"):
                make(wrong, 0)
