"""agreement and sharpness: closed forms of linear goals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.core.ascent import misclassify
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.measure import agreement, sharpness


def model_of(seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


def test_identical_models_agree_and_disjoint_ones_have_nothing_in_common():
    twin = agreement([misclassify(model_of(0), Y)] * 3, X)
    assert twin.mean == pytest.approx(1)
    apart = agreement([lambda x: x[:, 0].sin(), lambda x: x[:, 1].exp()], X)
    assert apart.mean == 0
    k = len(apart.cosines)  # the published helper averages the diagonal in
    assert float(apart.cosines.triu().sum()) / (k * (k + 1) / 2) == pytest.approx(2 / 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 100))
def test_it_is_the_cosine_of_each_pair_whatever_the_scale(seed, times):
    w = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    found = agreement([lambda x: times * (x @ w[0]), lambda x: x @ w[1], lambda x: x @ w[2]], X)
    pairs = [(0, 1), (0, 2), (1, 2)]
    wanted = [float(torch.cosine_similarity(w[i].double(), w[j].double(), dim=0)) for i, j in pairs]
    assert [float(found.cosines[i, j]) for i, j in pairs] == pytest.approx(wanted, abs=1e-6)
    assert found.mean == pytest.approx(sum(wanted) / 3, abs=1e-6)


def test_silent_gradients_are_counted_and_left_out():
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    found = agreement([lambda x: weight * x[:, 0], lambda x: x[:, 0]], X)
    assert found.silent.tolist() == [3, 0]
    assert found.mean == pytest.approx(1)
    none = agreement([lambda x: 0 * x[:, 0], lambda x: x[:, 0]], X)
    assert none.silent.tolist() == [5, 0]
    assert none.mean == 0


def test_the_sharpness_of_linear_goals_is_exact():
    w = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    x = 0.25 + X / 2
    found = sharpness([lambda a: a @ w[0], lambda a: a @ w[1]], x, radius=0.1)
    torch.testing.assert_close(found, torch.full((5,), 0.1 * float(w.mean(0).abs().sum())))


def test_sharpness_is_zero_at_the_top_and_grows_with_the_radius():
    top = [lambda x: -(x - 0.5).square().sum(1)]
    assert float(sharpness(top, torch.full((3, 6), 0.5), radius=0.1).max()) == 0
    goals = [misclassify(model_of(k), Y) for k in range(2)]
    small, large = (sharpness(goals, X, radius=r) for r in (0.01, 0.1))
    assert (small > 0).all()
    assert (small < large).all()


def test_bad_input_is_refused():
    with pytest.raises(Refused, match="two goals"):
        agreement([lambda x: x[:, 0]], X)
    with pytest.raises(Refused, match="lie in"):
        agreement([lambda x: x[:, 0]] * 2, 2 + X)
    with pytest.raises(Refused, match="finite"):
        agreement([lambda x: x[:, 0], lambda x: math.nan * x[:, 0]], X)
    with pytest.raises(Refused, match="steps >= 1"):
        sharpness([lambda x: x[:, 0]], X, radius=0.1, steps=0)
    with pytest.raises(Refused, match="at least one goal"):
        sharpness([], X, radius=0.1)
