"""Statistics add over shards; the Fisher diagonal is the slow per-example sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.evidence import extract, extract_statistics
from headstart.core.rng import random_state
from headstart.core.statistics import ClassStatistics, diagonal_fisher
from headstart.core.validate import Refused
from headstart.testing.subject import difference, snapshot


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 20), edge=st.integers(0, 20), d=st.integers(1, 5), c=st.integers(1, 4), seed=st.integers(0, 9))
def test_shards_add_up_to_the_sums(n: int, edge: int, d: int, c: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    y = torch.randint(c, (n,), generator=generator)
    both = ClassStatistics.of(x[:edge], y[:edge], c) + ClassStatistics.of(x[edge:], y[edge:], c)
    double = x.double()
    assert torch.allclose(both.gram, sum((torch.outer(v, v) for v in double), torch.zeros(d, d, dtype=torch.float64)))
    for k in range(c):
        assert torch.allclose(both.sums[k], double[y == k].sum(0))
        assert both.counts[k] == (y == k).sum()
    assert both.n == n


def test_centring_is_that_of_the_features_and_shards_may_lack_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=generator) + 5, torch.arange(40) % 3
    centred = ClassStatistics.of(x, y, 5).centred()
    direct = ClassStatistics.of(x.double() - x.double().mean(0), y, 5)
    for name in ("gram", "sums", "squares", "counts", "cubes", "fourth"):
        assert torch.allclose(getattr(centred, name), getattr(direct, name), atol=1e-9), name
    assert len(centred.present().counts) == 3
    streamed = ClassStatistics.stream([(x[y == k], y[y == k]) for k in range(3)], 5)  # one class a shard
    assert torch.allclose(streamed.gram, ClassStatistics.of(x, y, 5).gram, rtol=1e-12)
    with pytest.raises(Refused, match="at least one batch"):
        ClassStatistics.stream([], 3)
    with pytest.raises(Refused, match=r"0\.\.1"):
        ClassStatistics.stream([(x, y)], 2)
    with pytest.raises(Refused, match="one label an example"):
        ClassStatistics.stream([(x, y[:3])], 3)


def test_statistics_of_a_model_are_those_of_its_features() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)).train()
    x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    batches = [(x[:7], y[:7]), (x[7:20], y[7:20]), (x[20:], y[20:])]
    found, held = extract_statistics(model, iter(batches), 3), extract(model, batches)
    assert held.labels is not None
    assert torch.allclose(found.gram, ClassStatistics.of(held.features, held.labels, 3).gram)
    assert torch.equal(found.counts, torch.full((3,), 10.0, dtype=torch.float64))
    assert model.training
    with pytest.raises(Refused, match="labels in every batch"):
        extract_statistics(model, [x], 3)


def test_memory_does_not_grow_with_the_examples() -> None:
    def rows(n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(n):
            yield torch.full((10, 8), float(k)), torch.arange(10) % 2

    short, long = (ClassStatistics.stream(rows(n), 2) for n in (2, 200))
    assert [getattr(short, f.name).shape for f in fields(short)] == [getattr(long, f.name).shape for f in fields(long)]
    assert long.n == 2000


def model_and_data(n: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.double(), torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3


def slow_fisher(model: nn.Module, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """One example, one class, one backward pass at a time."""
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(x)):
        logs = model(x[k : k + 1]).log_softmax(1)[0]
        for c in range(len(logs)) if y is None else [int(y[k])]:
            gradients = torch.autograd.grad(logs[c], list(model.parameters()), retain_graph=True)
            for (_, value), g in zip(total.items(), gradients, strict=True):
                value += (float(logs[c].detach().exp()) if y is None else 1.0) * g.square() / len(x)
    return total


@pytest.mark.parametrize("labels", ["expected", "true"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_fisher_is_the_slow_loop_whatever_the_batches(labels: str, chunk: int) -> None:
    model, x, y = model_and_data()
    slow = slow_fisher(model, x, y if labels == "true" else None)
    stream = [(x[:2], y[:2]), (x[2:], y[2:])]
    fast = diagonal_fisher(model, stream, labels=labels, chunk=chunk)  # type: ignore[arg-type]
    assert fast.keys() == slow.keys()
    for name, value in slow.items():
        assert torch.allclose(fast[name].double(), value, rtol=1e-6, atol=1e-9), name  # the result is float32


def test_fisher_of_logistic_regression_is_the_closed_form() -> None:
    _, x, _ = model_and_data()
    model = nn.Linear(4, 3).double()
    p = model(x).softmax(1).detach()
    found = diagonal_fisher(model, [x])
    variance = p * (1 - p)  # E_y (1[y=c] - p_c)^2 for softmax regression
    assert torch.allclose(found["bias"].double(), variance.mean(0), rtol=1e-6)
    assert torch.allclose(found["weight"].double(), variance.T @ x.square() / len(x), rtol=1e-6)


def test_sampled_labels_are_seeded_and_right_on_average() -> None:
    model, x, _ = model_and_data()
    a, b, c = (diagonal_fisher(model, [x], labels="sampled", seed=s) for s in (0, 0, 1))
    assert not difference(a, b)
    assert difference(a, c)
    many = torch.stack([diagonal_fisher(model, [x], labels="sampled", seed=s)["3.bias"] for s in range(100)])
    exact = diagonal_fisher(model, [x])["3.bias"]
    error = (many.mean(0) - exact).abs() / (many.std(0) / 10)
    assert float(error.max()) < 4  # standard errors


def test_fisher_leaves_no_trace_and_skips_frozen_weights() -> None:
    model, x, y = model_and_data()
    model.train()
    model[0].weight.requires_grad = False
    before, state = snapshot(model), random_state()
    found = diagonal_fisher(model, [(x, y)], labels="sampled")
    assert "0.weight" not in found
    assert not difference(before, snapshot(model))
    assert not difference(state, random_state())


def test_fisher_refuses() -> None:
    model, x, _ = model_and_data()
    with pytest.raises(Refused, match="at least one example"):
        diagonal_fisher(model, [])
    with pytest.raises(Refused, match="needs labels in the stream"):
        diagonal_fisher(model, [x], labels="true")
    with pytest.raises(Refused, match="Did you mean 'expected'"):
        diagonal_fisher(model, [x], labels="expcted")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="trainable parameters"):
        diagonal_fisher(model.requires_grad_(False), [x])
