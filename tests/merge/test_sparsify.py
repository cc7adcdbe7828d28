"""Exactly the largest entries: sorting agrees, whatever the pieces, chunks and magnitudes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.core import shards
from headstart.merge import edges as module
from headstart.merge.edges import edges, largest
from headstart.merge.sparsify import distinct

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0 + 2**-23]
)


@given(rows=st.lists(st.lists(FLOATS, min_size=12, max_size=12), min_size=1, max_size=3), kept=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_agrees_with_a_stable_sort(rows, kept):
    x = torch.tensor(rows, dtype=torch.float32)
    order = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    expected = torch.zeros_like(x).scatter(1, order, x.gather(1, order))
    assert torch.equal(largest(x, kept), expected)


@given(seed=st.integers(0, 999), cuts=st.tuples(st.integers(0, 400), st.integers(0, 400)), part=st.integers(3, 500),
       kept=st.integers(1, 1000), sample=st.integers(1, 50), coarse=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_tensors_parts_and_samples_change_nothing(seed, cuts, part, kept, sample, coarse):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1000, generator=g) * torch.rand(2, 1000, generator=g)
    x = x.half().float() if coarse else x  # many ties
    sizes = [*cuts, 1000 - sum(cuts)]
    models = [dict(zip("abc", row.split(sizes), strict=True)) for row in x]
    base = {name: torch.zeros_like(value) for name, value in models[0].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PART", part)
        patch.setattr(module, "_SAMPLE", sample)
        found = edges(list(base), models, base, [kept, 500])
    for k, count in enumerate((kept, 500)):
        cut = torch.cat([found[name][k](models[k][name], 0) for name in base])
        assert torch.equal(cut, largest(x[k : k + 1], count)[0])


def test_a_sample_that_misleads_costs_passes_and_nothing_else(monkeypatch):
    x = torch.cat([torch.full((5000,), 1e-6), torch.linspace(1, 2, 5000), torch.full((90_000,), 1e-7)])[None]
    monkeypatch.setattr(module, "_SAMPLE", 100)  # sees equal small changes only
    for kept in (1, 4999, 5001, 50_000):
        assert int((largest(x, kept) != 0).sum()) == kept


def test_an_edge_knows_what_comes_before_a_part():
    edge = edges(["x"], [{"x": torch.ones(6)}], {"x": torch.zeros(6)}, [4])["x"][0]
    assert [edge(torch.ones(3), start).tolist() for start in (0, 3, 6)] == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert edge(torch.ones(3, dtype=torch.float64), 3).tolist() == [1, 0, 0]


def test_copies_are_found_by_their_bytes_and_integers_left_out():
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(1, 2), "n": torch.tensor(1),
            "e": torch.zeros(2)}  # fmt: skip
    model = {**base, "a": torch.ones(2), "b": torch.ones(2), "d": torch.ones(1, 2)}
    assert distinct(list(base), [model], base) == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "e"}
    long = {"a": torch.zeros(1000), "b": torch.zeros(1000)}
    ends = {"a": torch.zeros(1000), "b": torch.ones(1000)}
    ends["b"][:500] = 0
    assert distinct(["a", "b"], [ends], long) == {"a": "a", "b": "b"}
