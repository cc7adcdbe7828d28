"""Sums of low-rank changes: hand answers, the dense decomposition, and properties over random factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.core.validate import Refused
from headstart.merge.low_rank import Factors, low_rank_sum


def parts_of(seed: int, m: int, n: int, ranks: list[int], dtype=torch.float64) -> list[tuple[Tensor, Tensor, float]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(m, r, generator=g, dtype=torch.float64).to(dtype),
             torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype),
             float(torch.randn((), generator=g))) for r in ranks]  # fmt: skip


def dense(parts) -> Tensor:
    return sum(weight * (up.double() @ down.double()) for up, down, weight in parts)


def test_by_hand():
    # 2 e1 e1ᵀ + 5 e2 e2ᵀ: singular values 5, 2; of rank 1, 4 of 29 are lost
    e = torch.eye(3, dtype=torch.float64)
    parts = [(e[:, :1], e[:1], 2.0), (e[:, 1:2], e[1:2], 5.0)]
    whole, cut = low_rank_sum(parts), low_rank_sum(parts, rank=1)
    torch.testing.assert_close(whole.factors.dense(), torch.diag(torch.tensor([2.0, 5.0, 0.0], dtype=torch.float64)))
    torch.testing.assert_close(cut.factors.dense(), torch.diag(torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)))
    assert whole.singular_values.tolist() == cut.singular_values.tolist() == pytest.approx([5.0, 2.0])
    assert whole.discarded == 0
    assert cut.discarded == pytest.approx(4 / 29)


@given(seed=st.integers(0, 10_000), m=st.integers(1, 12), n=st.integers(1, 12), cut=st.integers(1, 14),
       ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_equals_the_decomposition_of_the_dense_sum(seed, m, n, ranks, cut):
    parts = parts_of(seed, m, n, ranks)
    expected = dense(parts)
    u, s, vh = torch.linalg.svd(expected, full_matrices=False)
    whole = low_rank_sum(parts)
    count = min(sum(ranks), m, n)
    assert whole.factors.rank == len(whole.singular_values) == count
    torch.testing.assert_close(whole.factors.dense(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.singular_values, s[:count], rtol=1e-10, atol=1e-10)
    less = low_rank_sum(parts, rank=cut)
    best = (u[:, :cut] * s[:cut]) @ vh[:cut]
    torch.testing.assert_close((less.factors.dense() - expected).norm(), (best - expected).norm(), rtol=1e-8, atol=1e-9)
    lost = float((less.factors.dense() - expected).square().sum() / expected.square().sum().clamp(min=1e-300))
    assert less.discarded == pytest.approx(lost, rel=1e-6, abs=1e-12)


def test_the_first_columns_are_the_further_cut():
    parts = parts_of(0, 20, 15, [4, 4])
    whole, cut = low_rank_sum(parts).factors, low_rank_sum(parts, rank=3).factors
    torch.testing.assert_close(whole.up[:, :3] @ whole.down[:3], cut.dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.up.norm(dim=0), whole.down.norm(dim=1))  # the values are shared evenly


def test_opposite_changes_cancel():
    up, down, _ = parts_of(1, 6, 5, [2])[0]
    gone = low_rank_sum([(up, down, 0.7), (up, down, -0.7)])
    assert float(gone.factors.dense().abs().max()) < 1e-14
    assert gone.discarded == 0
    assert low_rank_sum([(up, down, 0.0)], rank=1).discarded == 0  # nothing is lost of nothing


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_dtype_stays_and_is_rounded_once(dtype, digits):
    parts = parts_of(2, 30, 20, [3, 4], dtype)
    before = [(up.clone(), down.clone()) for up, down, _ in parts]
    state = torch.get_rng_state()
    merged = low_rank_sum(parts).factors
    assert merged.up.dtype == merged.down.dtype == dtype
    error = (merged.dense().double() - dense(parts)).norm() / dense(parts).norm()
    assert float(error) < digits
    exact = low_rank_sum([(up.double(), down.double(), w) for up, down, w in parts]).factors
    assert torch.equal(merged.up, exact.up.to(dtype))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d, _) in zip(before, parts, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_rows_of_the_dense_change():
    up, down, _ = parts_of(3, 7, 4, [2])[0]
    factors = Factors(up, down, 0.5)
    torch.testing.assert_close(factors.dense(2, 5), 0.5 * (up @ down)[2:5])
    assert (factors.rank, factors.shape) == (2, (7, 4))


def test_refusals():
    up, down, _ = parts_of(4, 6, 5, [2])[0]
    with pytest.raises(Refused, match=r"at least one part; got 0"):
        low_rank_sum([])
    with pytest.raises(Refused, match=r"B \(m, r\) and A \(r, n\); got \(2, 5\) and \(6, 2\) of part 0"):
        low_rank_sum([(down, up, 1.0)])
    with pytest.raises(Refused, match=r"\(6, 5\) and \(6, 4\) \(part 1\)"):
        low_rank_sum([(up, down, 1.0), (up, down[:, :4], 1.0)])
    with pytest.raises(Refused, match="rank >= 1; got 0"):
        low_rank_sum([(up, down, 1.0)], rank=0)
    with pytest.raises(Refused, match="nan of part 0"):
        low_rank_sum([(up, down, float("nan"))])
    with pytest.raises(Refused, match=r"A of part 0 must be finite; got 1 NaN"):
        low_rank_sum([(up, torch.where(down == down[0, 0], torch.nan, down), 1.0)])
