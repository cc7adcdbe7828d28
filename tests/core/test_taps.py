"""Taps read layers without changing the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.core.taps import features_at, first_tensor, layer_of, tapped, token_similarity, tokens_of
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


def test_features_stop_at_the_last_layer_asked_for_and_survive_later_changes_in_place() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2), nn.Identity()), torch.randn(5, 4)
    calls: list[int] = []
    model[2].register_forward_pre_hook(lambda _m, _i: calls.append(1))
    found = features_at(model, ["1", "0"], x)
    assert list(found) == ["1", "0"]
    assert torch.equal(found["0"], model[0](x))
    assert torch.equal(found["1"], model[0](x).relu())
    assert calls == []
    assert not any(m._forward_hooks for m in model.modules())
    for layers, says in ((["0", "9"], "exist"), ([], "Name one")):
        with pytest.raises(Refused, match=says):
            features_at(model, layers, x)


def test_a_layer_called_twice_is_read_at_its_first_call() -> None:
    once = nn.Linear(3, 3)
    model, x = nn.Sequential(once, nn.Tanh(), once, nn.Identity()), torch.randn(2, 3)
    assert torch.equal(features_at(model, ["0", "3"], x)["0"], once(x))


def test_tokens_are_rows_places_or_the_whole() -> None:
    sequence, picture = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 6)
    assert torch.equal(tokens_of(sequence), sequence)
    assert torch.equal(tokens_of(sequence, "cls"), sequence[:, :1])
    assert torch.equal(tokens_of(sequence, "patch"), sequence[:, 1:])
    assert tokens_of(sequence[:, 0]).shape == (2, 1, 3)
    assert torch.equal(tokens_of(picture)[:, 7], picture[:, :, 1, 1])
    for value, which in ((picture, "cls"), (sequence[:, :1], "patch"), (sequence[0, 0], "all"), (sequence, "none")):
        with pytest.raises(Refused):
            tokens_of(value, which)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_token_similarity_is_the_mean_cosine_whatever_the_scale(n, p, d, scale, seed) -> None:
    a, b = torch.randn(2, n, p, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = token_similarity(a, b)
    assert torch.allclose(found, torch.cosine_similarity(a, b, dim=-1).mean(1), atol=1e-12)
    assert torch.allclose(found, token_similarity(scale * a, b), atol=1e-12)
    assert found.abs().max() <= 1 + 1e-12
    a[:, 0] = 0
    point = a.clone().requires_grad_()
    same = token_similarity(point, a)
    assert torch.equal(same, torch.ones(n, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(same.sum(), point)[0], torch.zeros_like(a))
