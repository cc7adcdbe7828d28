"""kNN: scikit-learn's neighbours, a vote by hand, duplicates, and ties that must not depend on order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from headstart.choose import KNN
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract

FREE = ("rotation", "scale", "shift", "zero columns")
test_contract = contract(KNN(), invariant=FREE, refuses=[lambda: KNN(k=0)])
test_contract_five = contract(KNN(k=5), invariant=FREE)


def score(features: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    return KNN(k=k).score(Evidence(features=features, labels=labels))


def by_hand(points: list[tuple[int, ...]], labels: list[int], k: int) -> Fraction:
    """The rule in whole numbers: shared places, majority, then the nearest, then equal shares."""
    total = Fraction(0)
    for i, p in enumerate(points):
        far = {j: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for j, q in enumerate(points) if j != i}
        last = sorted(far.values())[k - 1]
        nearer, level = [j for j in far if far[j] < last], [j for j in far if far[j] == last]
        votes = {c: Fraction(0) for c in labels}
        for j in nearer:
            votes[labels[j]] += 1
        for j in level:
            votes[labels[j]] += Fraction(k - len(nearer), len(level))
        lead = [c for c, v in votes.items() if v == max(votes.values())]
        first = {c: min(far[j] for j in far if labels[j] == c) for c in lead}
        winners = [c for c in lead if first[c] == min(first.values())]
        total += Fraction(labels[i] in winners, len(winners))
    return total / len(points)


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


def test_the_majority_of_equally_near_neighbours_wins_in_any_order():
    features = torch.tensor([[0.1, 0.3]]).repeat(5, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])  # a 0 sees two of each and shares, a 1 sees three 0
    assert score(features, labels) == pytest.approx(3 / 2 / 5)
    assert score(features + 1e4, labels.flip(0)) == pytest.approx(3 / 2 / 5)


def test_a_tied_vote_goes_to_the_nearest():
    features, labels = torch.tensor([[0.0], [1.0], [-2.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    # k = 2: 0 sees 0 and 1, the 0 nearer; 1 sees 0, then -2: the 0; -2 sees two 0; 9 sees two 0
    assert score(features, labels, k=2) == 0.5
    assert by_hand([(0,), (1,), (-2,), (9,)], [0, 0, 1, 1], 2) == Fraction(1, 2)


@settings(max_examples=80, deadline=None)
@given(
    data=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=4, max_size=20),
    k=st.integers(1, 6), far=st.sampled_from([0.0, 1e5]),
)  # fmt: skip
def test_equals_the_rule_on_a_grid_full_of_ties(data, k, far):
    points, labels = [p[:2] for p in data], [p[2] for p in data]
    if k >= len(data) or len(set(labels)) < 2:
        return
    found = score(torch.tensor(points).double() + far, torch.tensor(labels), k)
    assert found == pytest.approx(float(by_hand(points, labels, k)), abs=1e-9)


@pytest.mark.parametrize("k", [3, 10])
def test_equals_scikit_learns_vote_where_no_vote_is_tied(k):
    g = torch.Generator().manual_seed(k)
    labels = torch.randint(0, 2, (75,), generator=g)
    features = torch.randn(75, 4, generator=g) + labels[:, None]
    near = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(features).kneighbors(features)[1][:, 1:]
    votes = labels[near].double().mean(1)
    votes = torch.where(votes == 0.5, labels[near[:, 0]].double(), votes)  # two labels: the nearest decides
    assert score(features, labels, k) == pytest.approx(((votes > 0.5) == labels).double().mean().item(), abs=1e-12)


def test_refuses_more_neighbours_than_there_are():
    with pytest.raises(Refused, match="k < n"):
        score(torch.randn(4, 2), torch.arange(4) % 2, k=4)
    assert score(torch.eye(4), torch.arange(4) % 2, k=3) == 0  # all the others, of which two in three are unlike


def test_what_changes_nothing():
    features, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(40) % 3
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()).Q
    assert score(9 * features @ turn + 5, 4 - 2 * labels) == score(features, labels)
