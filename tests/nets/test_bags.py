"""Bags: padding changes nothing, order changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.nets.bags import ABMIL, padded


def network() -> ABMIL:
    with seeded(0):
        return ABMIL(5, 3, width=8, attention=4).double().eval()


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_7_padding_and_mask_equal_the_unpadded_bag(sizes, seed):
    generator, model = torch.Generator().manual_seed(seed), network()
    bags = [torch.randn(k, 5, generator=generator, dtype=torch.float64) for k in sizes]
    alone = torch.cat([model(bag[None]) for bag in bags])
    assert torch.allclose(model(padded(bags)), alone, atol=1e-12)


def test_5_the_order_of_instances_changes_nothing():
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    assert torch.allclose(network()(x), network()(x[:, torch.randperm(7)]), atol=1e-12)


def test_the_bag_is_a_mean_weighted_by_gated_attention():
    model, x = network(), torch.randn(1, 4, 5, dtype=torch.float64)
    h = (x[0] @ model.embed[0].weight.T + model.embed[0].bias).relu()
    a = torch.tanh(h @ model.content[0].weight.T + model.content[0].bias)
    b = torch.sigmoid(h @ model.gate[0].weight.T + model.gate[0].bias)
    score = ((a * b) @ model.weigh.weight.T + model.weigh.bias)[:, 0]
    assert torch.allclose(model.bag(x)[0], score.softmax(0) @ h, atol=1e-12)


@pytest.mark.parametrize("bags", [[], [torch.ones(0, 3)], [torch.ones(2, 3), torch.ones(2, 4)], [torch.ones(3)]])
def test_bad_bags_are_refused(bags):
    with pytest.raises(Refused, match="one width"):
        padded(bags)
    with pytest.raises(Refused, match="finite"):
        padded([torch.full((2, 2), torch.nan)])
