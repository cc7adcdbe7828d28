"""Fused goals: three averages restated slowly, their equalities, and numbers too small for probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headstart.attack import fused
from headstart.core.validate import Refused

WAYS = ["logits", "probabilities", "loss"]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**16))
def test_each_average_equals_a_slow_restatement(count, n, c, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, 3, c, dtype=torch.float64, generator=generator)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(c, (n,), generator=generator)
    found = {by: fused([lambda a, w=w: a @ w for w in weights], y, by=by)(x) for by in WAYS}
    for i in range(n):
        logits = [(x[i] @ w).tolist() for w in weights]
        shares = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]
        mean = [sum(row[k] for row in logits) / count for k in range(c)]
        by_hand = {
            "logits": -math.log(math.exp(mean[y[i]]) / sum(map(math.exp, mean))),
            "probabilities": -math.log(sum(row[y[i]] for row in shares) / count),
            "loss": -sum(math.log(row[y[i]]) for row in shares) / count,
        }
        assert {by: found[by][i].item() for by in WAYS} == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("models", [1, 3])
def test_one_model_or_copies_of_it_fuse_to_itself_in_every_way(models):
    model, x, y = nn.Linear(4, 3).double(), torch.ones(5, 4).double(), torch.arange(5) % 3
    plain = nn.functional.cross_entropy(model(x), y, reduction="none")
    assert all(torch.allclose(fused([model] * models, y, by=by)(x), plain, rtol=1e-12) for by in WAYS)


def test_probabilities_below_the_smallest_float_keep_their_gradient():
    x = torch.zeros(1, 2, requires_grad=True)
    loss = fused([lambda a: a + torch.tensor([0.0, 300.0])] * 2, torch.tensor([0]), by="probabilities")(x)
    assert loss.item() == pytest.approx(300.0)
    assert torch.autograd.grad(loss.sum(), x)[0][0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-5)


def test_no_models_and_unknown_averages_are_refused():
    with pytest.raises(Refused, match="at least one model"):
        fused([], torch.tensor([0]))
    with pytest.raises(Refused, match="logits"):
        fused([nn.Linear(1, 2)], torch.tensor([0]), by="logit")


@pytest.mark.parametrize("by", WAYS)
def test_weights_are_shares_of_the_models(by):
    (one, two), x, y = [nn.Linear(4, 3).double() for _ in range(2)], torch.rand(5, 4).double(), torch.arange(5) % 3
    assert torch.allclose(
        fused([one, two], y, by=by, weights=[1, 2])(x), fused([one, two, two], y, by=by)(x), rtol=1e-12
    )
    assert torch.allclose(fused([one, two], y, by=by, weights=[0, 3])(x), fused([two], y, by=by)(x), rtol=1e-12)
    point = x.clone().requires_grad_()
    assert torch.autograd.grad(fused([one, two], y, by=by, weights=[0, 3])(point).sum(), point)[0].isfinite().all()


@pytest.mark.parametrize("by", WAYS)
def test_targeted_turns_the_sign_and_nothing_else(by):
    models, x, y = [nn.Linear(4, 3) for _ in range(2)], torch.rand(5, 4), torch.arange(5) % 3
    assert torch.equal(fused(models, y, by=by, targeted=True)(x), -fused(models, y, by=by)(x))


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], []])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(Refused, match="one weight"):
        fused([nn.Linear(1, 2)] * 2, torch.tensor([0]), weights=weights)


def test_labels_that_are_no_class_numbers_are_refused():
    with pytest.raises(Refused, match="class numbers"):
        fused([nn.Linear(1, 2)], torch.eye(2))
