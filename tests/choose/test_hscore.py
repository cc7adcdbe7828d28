"""H-score: scikit-learn's Ledoit-Wolf inside the definition, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from headstart.choose import HScore
from headstart.core.evidence import Evidence
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused
from headstart.testing import contract


def streamed(pieces: list[Evidence], shrink: bool = True) -> float:
    return HScore(shrink=shrink).score_from(ClassStatistics.stream((p.need("features", "labels") for p in pieces), 9))


def plain(evidence: Evidence) -> float:
    """tr(cov(F)^+ cov(class means)), as Bao et al. write it."""
    features, labels = (t.numpy() for t in evidence.need("features", "labels"))
    means = np.stack([features[labels == c].mean(0) for c in labels])
    inverse = np.linalg.pinv(np.cov(features.T, ddof=0), rcond=1e-15, hermitian=True)
    return float(np.trace(inverse @ np.cov(means.T, ddof=0)))


test_contract = contract(HScore(), invariant=("rotation", "scale", "shift"), streamed=streamed)
test_contract_plain = contract(
    HScore(shrink=False),
    invariant=("rotation", "scale", "shift", "zero columns"),
    streamed=lambda pieces: streamed(pieces, shrink=False),
    reference=plain,
)


def score(features, labels, shrink: bool = True) -> float:
    return HScore(shrink=shrink).score(Evidence(features=torch.as_tensor(features), labels=torch.as_tensor(labels)))


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


@pytest.mark.parametrize("tilt", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("shrink", [True, False])
def test_keeps_nine_digits_on_nearly_collinear_features(tilt, shrink):
    rng = np.random.default_rng(1)
    labels = rng.choice(4, size=200, p=[0.7, 0.1, 0.1, 0.1])
    features = rng.normal(size=(200, 12)) + 0.5 * np.eye(12)[labels]
    features[:, 0] = features[:, 1] + tilt * features[:, 0]
    centred = features - features.mean(0)
    onehot = np.eye(4)[labels]
    if shrink:
        covariance, a = ledoit_wolf(features)
        means = (onehot / onehot.sum(0)).T @ centred
        expected = (1 - a) * np.trace(np.linalg.solve(covariance, means.T * onehot.mean(0) @ means))
    else:  # the squared canonical correlations, from orthonormal bases
        q, basis = (np.linalg.qr(v)[0] for v in (centred, (onehot - onehot.mean(0))[:, 1:]))
        expected = np.square(q.T @ basis).sum()
    assert score(features, labels, shrink) == pytest.approx(expected, rel=1e-9)


def test_without_shrinkage_no_invertible_map_matters_and_one_hot_features_give_one_less_than_the_classes():
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(80, 6)), rng.integers(0, 4, 80)
    turned = features @ rng.normal(size=(6, 6)) + 3
    assert score(turned, labels, shrink=False) == pytest.approx(score(features, labels, shrink=False), rel=1e-9)
    assert score(np.eye(4)[labels], labels, shrink=False) == pytest.approx(3, abs=1e-9)
    with pytest.raises(Refused, match="every model scores c - 1"):
        score(rng.normal(size=(20, 30)), labels[:20], shrink=False)
