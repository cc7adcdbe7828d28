"""Bags: padding changes nothing, order changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.nets.bags import ABMIL, padded


def some(n: int, instances: int) -> torch.Tensor:
    return torch.randn(n, instances, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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
    x = some(2, 7)
    assert torch.allclose(network()(x), network()(x[:, [3, 0, 6, 2, 5, 1, 4]]), atol=1e-12)


def test_the_bag_is_a_mean_weighted_by_gated_attention():
    model, x = network(), some(1, 4)
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


def test_bags_that_a_network_cannot_read_are_refused():
    with pytest.raises(Refused, match=r"\(n, K, 5\)"):
        network()(torch.zeros(2, 3, 4, dtype=torch.float64))
    with pytest.raises(Refused, match="an instance"):
        network()({"instances": some(2, 3), "mask": torch.tensor([[True] * 3, [False] * 3])})


def test_no_gradient_reaches_the_padding():
    x = padded([some(1, 2)[0], some(1, 6)[0]])
    x["instances"].requires_grad_()
    (gradient,) = torch.autograd.grad(network()(x).square().sum(), x["instances"])
    assert (gradient[0, 2:] == 0).all()
    assert (gradient[0, :2] != 0).any()
