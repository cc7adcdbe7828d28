"""Statistics add over shards, and are those of the features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.evidence import extract, extract_statistics
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused


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
