"""H-score: scikit-learn's Ledoit-Wolf inside the definition, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from headstart.choose import HScore
from headstart.core.evidence import Evidence
from headstart.testing import contract

test_contract = contract(HScore(), invariant=("rotation", "scale", "shift"))


def score(features, labels) -> float:
    return HScore().score(Evidence(features=torch.as_tensor(features), labels=torch.as_tensor(labels)))


@pytest.mark.parametrize(("n", "d"), [(60, 20), (30, 80), (40, 40), (25, 1), (7, 300)])
def test_equals_the_definition_with_scikit_learns_shrinkage(n, d):
    rng = np.random.default_rng(n)
    labels = np.arange(n) % 3
    features = rng.normal(size=(n, d)) * rng.uniform(0.1, 3, d) + 0.5 * labels[:, None]
    covariance, a = ledoit_wolf(features)
    means = np.stack([features[labels == c].mean(0) for c in range(3)])[labels]
    expected = (1 - a) * np.trace(np.linalg.solve(covariance, np.cov(means.T, ddof=0).reshape(d, d)))
    assert score(features, labels) == pytest.approx(expected, abs=1e-8)


def test_what_changes_nothing():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(50, 8)), rng.integers(0, 4, 50)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    order = rng.permutation(50)
    for same in (score(100 * features @ turn + 7, labels), score(features[order], 9 - 3 * labels[order])):
        assert same == pytest.approx(score(features, labels), abs=1e-9)


def test_lies_between_nothing_and_one_less_than_the_classes():
    labels = torch.arange(4000) % 4
    exact = torch.nn.functional.one_hot(labels).double()
    assert 2.9 < score(exact, labels) <= 3
    assert score(torch.ones(8, 3), torch.arange(8) % 2) == 0
    for seed in range(20):  # more features than examples: without shrinkage this is 3 for every model
        features = torch.randn(40, 200, generator=torch.Generator().manual_seed(seed))
        assert 0 <= score(features, labels[:40]) < 1.5
