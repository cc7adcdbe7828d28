"""Similarity of prompts: known answers, slow restatements, what leaves it alone, and prompts that have collapsed."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headstart.choose.similarity import prompt_similarity
from headstart.core.validate import Refused

KINDS = ("outputs", "mean", "tokens", "pairs", "neurons")


def said(k: int, n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(torch.randn(k, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def cosine(a: list[float], b: list[float]) -> float:
    dot, sizes = math.fsum(x * y for x, y in zip(a, b, strict=True)), [math.fsum(x * x for x in v) for v in (a, b)]
    return dot / math.sqrt(sizes[0] * sizes[1])


def slow(a: Tensor, b: Tensor, kind: str) -> float:
    """One pair, number by number."""
    p, q = a.tolist(), b.tolist()
    if kind == "pairs":
        return math.fsum(cosine(x, y) for x in p for y in q) / (len(p) * len(q))
    if kind == "neurons":
        active = [{(i, j) for i, row in enumerate(m) for j, v in enumerate(row) if v > 0} for m in (p, q)]
        return len(active[0] & active[1]) / math.sqrt(len(active[0]) * len(active[1]))
    means = [[math.fsum(column) / len(m) for column in zip(*m, strict=True)] for m in (p, q)]
    if kind in ("mean", "tokens"):
        return cosine(*means)
    flat = [[v - c for row in m for v, c in zip(row, mean, strict=True)] for m, mean in zip((p, q), means, strict=True)]
    return cosine(*flat)


@pytest.mark.parametrize("kind", KINDS)
@given(k=st.integers(1, 4), n=st.integers(2, 6), d=st.integers(2, 5), seed=st.integers(0, 2**16))
def test_it_equals_a_slow_restatement_and_is_symmetric(kind, k, n, d, seed):
    outputs = [h + 0.1 for h in said(k, n, d, seed)]
    outputs = [torch.cat([h, torch.ones(1, d, dtype=h.dtype)]) for h in outputs]  # some neuron is active everywhere
    found = prompt_similarity(outputs, kind)
    assert (found.shape, found.dtype) == ((k, k), torch.float64)
    assert torch.equal(found, found.T)
    for i in range(k):
        for j in range(k):
            assert found[i, j].item() == pytest.approx(slow(outputs[i], outputs[j], kind), rel=1e-9, abs=1e-12)
    if kind != "pairs":
        torch.testing.assert_close(found.diag(), torch.ones(k, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ill_conditioned_outputs_keep_nine_digits():
    columns = torch.logspace(-6, 6, 8, dtype=torch.float64)
    outputs = [h * columns + 100 * columns for h in said(3, 50, 8)]
    expected = [[slow(a, b, "outputs") for b in outputs] for a in outputs]
    np.testing.assert_allclose(prompt_similarity(outputs).numpy(), expected, rtol=1e-9)


@given(st.floats(0.01, 100), st.floats(-50, 50), st.integers(0, 2**16))
def test_a_positive_factor_a_shift_and_a_turn_of_all_leave_the_outputs_similarity(factor, shift, seed):
    a, b = said(2, 7, 4, seed)
    turn = torch.linalg.qr(said(1, 4, 4, seed + 1)[0])[0]
    before = prompt_similarity([a, b])[0, 1]
    moved = prompt_similarity([factor * a + shift * torch.arange(4), b])[0, 1]
    torch.testing.assert_close(moved, before, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(prompt_similarity([a @ turn, b @ turn])[0, 1], before, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(prompt_similarity([-factor * a, b])[0, 1], -before, rtol=1e-9, atol=1e-12)


def test_unrelated_prompts_on_many_inputs_are_near_zero_when_centred_though_their_means_agree():
    a, b = (h + 5 for h in said(2, 500, 16))
    assert abs(prompt_similarity([a, b])[0, 1]) < 0.05
    assert prompt_similarity([a, b], "mean")[0, 1] > 0.99


def test_prompts_of_other_lengths_may_be_compared_by_their_tokens():
    a, b = said(1, 4, 6)[0], said(1, 9, 6, 1)[0]
    for kind in ("tokens", "pairs"):
        assert prompt_similarity([a, b], kind)[0, 1].item() == pytest.approx(slow(a, b, kind), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_prompt_is_like_nothing_and_says_so(dtype):
    constant = torch.full((200, 6), 0.1, dtype=dtype) * torch.arange(1, 7)
    constant = constant * (1 + torch.finfo(dtype).eps * (torch.arange(200)[:, None] % 2))  # rounding is no signal
    with pytest.warns(UserWarning, match="Prompt 1 has collapsed"):
        found = prompt_similarity([said(1, 200, 6, dtype=dtype)[0], constant])
    assert found[0, 1] == found[1, 1] == 0
    assert found[0, 0].item() == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_zero_is_like_nothing(kind):
    with pytest.warns(UserWarning, match="collapsed"):
        assert prompt_similarity([torch.ones(3, 2) + torch.eye(3)[:, :2], torch.zeros(3, 2)], kind)[1].eq(0).all()


def test_a_small_signal_is_no_collapse():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = 1e-20 * said(1, 20, 3)[0]
        assert prompt_similarity([small, small])[0, 1].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("outputs", "kind", "message"),
    [
        ([torch.ones(3, 2)], "cosine", "known name"),
        ([], "outputs", "at least one prompt"),
        ([torch.ones(3, 2), torch.ones(4, 2)], "outputs", "of one shape"),
        ([torch.ones(3, 2), torch.ones(4, 3)], "tokens", "of one width"),
        ([torch.ones(3)], "mean", "matrices"),
        ([torch.ones(0, 3)], "mean", "matrices"),
        ([torch.ones(3, 2, dtype=torch.long)], "neurons", "floating"),
        ([torch.full((3, 2), torch.nan)], "outputs", "must be finite"),
        ([torch.tensor([[1.0, torch.inf]])], "tokens", "must be finite"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(outputs, kind, message):
    with pytest.raises(Refused, match=message):
        prompt_similarity(outputs, kind)
