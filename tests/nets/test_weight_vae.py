"""The autoencoder of weights: its divergence is torch's, and it samples in training only."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.nets.weight_vae import WeightVAE, divergence


def test_no_divergence_of_the_standard_normal():
    assert divergence(torch.zeros(3, 5), torch.zeros(3, 5)).tolist() == [0, 0, 0]


def test_the_divergence_is_torchs():
    mean, log_variance = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    theirs = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), theirs)


def test_samples_in_training_only():
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        vae = WeightVAE(7, 3)
        assert not torch.equal(vae(x)[0], vae(x)[0])
        again, mean, log_variance = vae.eval()(x)
    assert torch.equal(again, vae.decode(mean))
    assert again.shape == x.shape
    assert mean.shape == log_variance.shape == (4, 3)


def test_the_variance_stays_within_bounds():
    with seeded(0):
        vae = WeightVAE(2, 1, hidden=0)
    _, _, log_variance = vae.eval()(torch.tensor([[1e6, 1e6], [-1e6, -1e6]]))
    assert sorted(log_variance.flatten().tolist()) == [-30, 20]


def test_widths_are_checked():
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(Refused, match="widths"):
            WeightVAE(*sizes)
