"""Slerp: ends, lengths, angles, and what a line or zeros do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.validate import Refused
from headstart.merge import Average, Slerp
from headstart.testing import contract

test_contract = contract(
    Slerp(),
    models=2,
    refuses=[lambda: Slerp(towards=-0.1), lambda: Slerp(towards=1.1), lambda: Slerp().merge([{}, {}, {}])],
)


def vectors(seed: int, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return one, two


def arc(one: torch.Tensor, two: torch.Tensor, towards: float) -> torch.Tensor:
    return Slerp(towards=towards).merge([{"w": one}, {"w": two}])["w"]


@given(seed=st.integers(0, 999), towards=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_unit_vectors_stay_unit_and_turn_by_the_share(seed, towards):
    one, two = (v / v.norm() for v in vectors(seed))
    whole = math.acos(float(one @ two))
    turned = arc(one, two, towards)
    assert turned.norm().item() == pytest.approx(1, abs=1e-9)
    assert math.acos(min(1.0, float(one @ turned))) == pytest.approx(towards * whole, abs=1e-6)


def test_ends_known_answer_and_order():
    one, two = vectors(0)
    torch.testing.assert_close(arc(one, two, 0.0), one)
    torch.testing.assert_close(arc(one, two, 1.0), two)
    torch.testing.assert_close(arc(one, two, 0.3), arc(two, one, 0.7))
    half = arc(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), 0.5)
    torch.testing.assert_close(half, torch.tensor([3.0, 4.0]) / math.sqrt(2))


@pytest.mark.parametrize("two", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0001, 2.0]])
def test_on_one_line_it_is_the_average(two):
    one, other = torch.tensor([1.0, 2.0]), torch.tensor(two)
    assert torch.allclose(arc(one, other, 0.5), Average().merge([{"w": one}, {"w": other}])["w"])


def test_needs_two_models():
    with pytest.raises(Refused, match="got 1 models"):
        Slerp().merge([{}])
