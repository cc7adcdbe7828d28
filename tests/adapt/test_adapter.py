"""Adapters: where they read, what they add, and when they are LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.adapt import Adapter, LoRA
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract


def model() -> nn.Module:
    with seeded(1):
        return nn.Sequential(nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5)), nn.Tanh(), nn.Linear(5, 3))


def moved(model: nn.Module) -> nn.Module:
    """The model with random numbers in everything that trains."""
    with torch.no_grad(), seeded(0):
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    return model


test_contract = contract(
    Adapter(layers="enter,middle", rank=3),
    trainable=lambda model: 3 * (64 + 32) + 3 + 32 + 3 * (32 + 16) + 3 + 16 + 170,
    refuses=[lambda: Adapter(layers="*", rank=0), lambda: Adapter(layers="*", scale=0.0)],
)
test_sequential = contract(
    Adapter(layers="middle", rank=3, placement="sequential"), trainable=lambda model: 3 * 32 + 3 + 16 + 170
)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_is_the_same_function_bit_for_bit_at_the_start(placement):
    x = torch.randn(4, 7, 6)
    assert torch.equal(Adapter(layers="0", placement=placement).apply(model())(x), model()(x))


def test_parallel_reads_the_input_and_sequential_the_output_of_the_layer():
    x, layer = torch.randn(4, 7, 6), model()[0]
    for placement, z in (("parallel", x), ("sequential", layer(x))):
        adapted = moved(Adapter(layers="0", rank=2, scale=3.0, placement=placement).apply(model()))[0]
        change = (z @ adapted.down.T + adapted.down_bias).relu() @ adapted.up.T + adapted.up_bias
        torch.testing.assert_close(adapted(x), layer(x) + 3 * change)


def test_6_doubling_the_scale_and_halving_the_way_up_changes_nothing():
    x = torch.randn(4, 6)
    once, twice = (moved(Adapter(layers="0", scale=scale).apply(model())) for scale in (1.0, 2.0))
    with torch.no_grad():
        twice[0].up /= 2
        twice[0].up_bias /= 2
    torch.testing.assert_close(once(x), twice(x))


def test_5_where_the_relu_does_nothing_it_is_lora():
    """Inputs and factors above zero pass the relu as they are."""
    x = torch.rand(4, 6)
    adapter = Adapter(layers="0.0", rank=2, scale=2.0).apply(model())
    lora = moved(LoRA(layers="0.0", rank=2, scale=2.0).apply(model()))
    with torch.no_grad():
        lora[0][0].down.abs_()
        adapter[0][0].down.copy_(lora[0][0].down)
        adapter[0][0].up.copy_(lora[0][0].up)
    torch.testing.assert_close(adapter[0](x), lora[0](x))


def test_inner_and_outer_layers_may_both_be_adapted():
    adapted = Adapter(layers="0,0.2").apply(model())
    assert sum(hasattr(m, "up") for m in adapted.modules()) == 2


def test_refuses_layers_that_have_no_width_and_a_head_alone():
    with pytest.raises(Refused, match="with a linear one"):
        Adapter(layers="1").apply(model())
    with pytest.raises(Refused, match="beside the head '2'"):
        Adapter(layers="2").apply(model())
    with pytest.raises(Refused, match="placement"):
        Adapter(layers="0", placement="behind")
