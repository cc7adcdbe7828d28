"""An ensemble is the mean of probabilities; its members share nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.harden import Ensemble

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()


def members(n: int = 3) -> list[nn.Module]:
    with seeded(0):
        return [nn.Linear(4, 3).double() for _ in range(n)]


def test_one_member_gives_its_logits():
    (one,) = members(1)
    assert torch.equal(Ensemble([one])(X), one(X))


def test_copies_give_the_log_probabilities_of_one():
    (one,) = members(1)
    copies = Ensemble([copy.deepcopy(one) for _ in range(4)])
    torch.testing.assert_close(copies(X), one(X).log_softmax(1), rtol=0, atol=1e-14)


def test_it_is_the_papers_floored_logarithm_of_the_mean():
    models = members()
    mean = torch.stack([m(X).softmax(1) for m in models]).mean(0)
    torch.testing.assert_close(Ensemble(models)(X), mean.clamp_min(1e-40).log(), rtol=1e-12, atol=1e-12)


def test_members_that_share_a_parameter_are_refused():
    one, other = members(2)
    for shared in ([one, other, one], [nn.Sequential(one, nn.Tanh()), nn.Sequential(other, one)]):
        with pytest.raises(Refused, match="share parameters; got 2 shared"):
            Ensemble(shared)
    with pytest.raises(Refused, match="needs members"):
        Ensemble([])
