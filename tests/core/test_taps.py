"""Taps read layers without changing the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.core.taps import first_tensor, layer_of, tapped
from headstart.core.validate import Refused


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_output_and_input_of_a_layer() -> None:
    model, x = perceptron(), torch.randn(5, 4)
    with tapped(model, ["0", "2:input", "2"]) as seen:
        output = model(x)
    assert torch.equal(seen["0"], model[0](x))
    assert torch.equal(seen["2:input"], model[1](model[0](x)))
    assert torch.equal(seen["2"], output)


def test_each_forward_fills_anew_and_the_graph_is_kept() -> None:
    model = perceptron()
    with tapped(model, ["0"]) as seen:
        model(torch.zeros(1, 4))
        first = seen["0"]
        model(torch.ones(1, 4))
    assert not torch.equal(first, seen["0"])
    assert seen["0"].requires_grad


def test_hooks_are_gone_even_after_an_error() -> None:
    model = perceptron()
    with pytest.raises(RuntimeError), tapped(model, ["0", "2:input"]):
        model(torch.zeros(1, 9))
    assert not any(m._forward_hooks for m in model.modules())


def test_unknown_layer_is_refused_with_the_nearest_name_and_no_hook_is_left() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(Refused, match="Did you mean 'encoder'"), tapped(model, ["head", "encodre"]):
        pass
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(Refused, match="NAME or NAME:input"), tapped(model, ["head:output"]):
        pass


def test_first_tensor_looks_into_nests() -> None:
    t = torch.ones(1)
    assert first_tensor({"a": [(t, 2)]}) is t
    with pytest.raises(Refused, match="hand over a tensor"):
        first_tensor(())


def test_layer_of() -> None:
    model = perceptron()
    assert layer_of(model, "2") is model[2]
