"""1-NN: scikit-learn's neighbours, duplicates, and ties that must not depend on order."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from headstart.choose import KNN
from headstart.core.evidence import Evidence
from headstart.testing import contract

test_contract = contract(KNN(), invariant=("rotation", "scale", "shift", "zero columns"))


def score(features: torch.Tensor, labels: torch.Tensor) -> float:
    return KNN().score(Evidence(features=features, labels=labels))


@pytest.mark.parametrize(("n", "d"), [(50, 3), (30, 80), (2100, 5)])
def test_equals_scikit_learns_neighbours(n, d):
    g = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 3, (n,), generator=g)
    features = torch.randn(n, d, generator=g) + labels[:, None]
    nearest = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(features).kneighbors(features)[1][:, 1]
    assert score(features, labels) == pytest.approx((labels[nearest] == labels).double().mean().item(), abs=1e-12)


def test_duplicated_data_scores_one():
    features, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    assert score(features.repeat(2, 1), labels.repeat(2)) == 1


def test_equally_near_neighbours_share_the_vote_in_any_order():
    features = torch.tensor([[0.1, 0.3]]).repeat(5, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert score(features, labels) == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)
    assert score(features + 1e4, labels.flip(0)) == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)


def test_what_changes_nothing():
    features, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(40) % 3
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()).Q
    assert score(9 * features @ turn + 5, 4 - 2 * labels) == score(features, labels)
