"""Exactly the largest entries: sorting agrees, whatever the pieces, chunks and magnitudes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.merge import sparsify
from headstart.merge.sparsify import distinct, largest

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0 + 2**-23]
)


@given(rows=st.lists(st.lists(FLOATS, min_size=12, max_size=12), min_size=1, max_size=3), kept=st.integers(1, 12),
       cut=st.integers(0, 12))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_agrees_with_a_stable_sort(rows, kept, cut):
    x = torch.tensor(rows, dtype=torch.float32)
    pieces = [x[:, :cut], x[:, cut:].view(len(x), -1, 1)]
    order = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    expected = torch.zeros_like(x).scatter(1, order, x.gather(1, order))
    assert torch.equal(largest(lambda: pieces, kept)(x), expected)


def test_chunks_change_nothing(monkeypatch):
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    whole = largest(lambda: [x], 137)
    monkeypatch.setattr(sparsify, "_CHUNK", 7)
    chunked = largest(lambda: [x], 137)
    assert torch.equal(whole.edge, chunked.edge)
    assert torch.equal(whole.ties, chunked.ties)
    assert (whole(x) != 0).sum(1).tolist() == [137, 137]


def test_ties_are_counted_piece_by_piece():
    cut = largest(lambda: [torch.ones(1, 3), torch.ones(1, 3)], 4)
    assert cut.ties.tolist() == [[4]]
    assert cut.tied_in(torch.tensor([[1.0, -1.0, 2.0]])).tolist() == [[2]]


def test_copies_are_found_by_their_bytes_and_integers_left_out():
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(1, 2), "n": torch.tensor(1)}
    model = {**base, "a": torch.ones(2), "b": torch.ones(2), "d": torch.ones(1, 2)}
    assert distinct(list(base), [model], base) == {"a": "a", "b": "a", "c": "c", "d": "d"}
