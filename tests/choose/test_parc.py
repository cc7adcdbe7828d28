"""PARC: scipy's rank correlation with and without ties, the card's bounds, and what it may not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from headstart.choose import PARC
from headstart.choose.parc import balanced, binary_spearman, distances
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def published(evidence: Evidence, dimensions: int | None = None) -> float:
    """Spearman over the upper triangles of two distance matrices; labels as booleans, which cannot split ties."""
    x, y = (t.numpy() for t in evidence.need("features", "labels"))
    x = x.astype(float)
    if dimensions is not None and x.shape[1] > dimensions:
        centred = x - x.mean(0)
        x = centred @ np.linalg.svd(centred, full_matrices=False)[2][:dimensions].T
        x = x * np.sign(x[np.abs(x).argmax(0), np.arange(x.shape[1])])
    x = (x - x.mean(0)) / x.std(0)
    upper = np.triu_indices(len(x), 1)
    return 100 * spearmanr((1 - np.corrcoef(x))[upper].round(9), (y[:, None] != y)[upper]).statistic


test_contract = contract(
    PARC(),
    invariant=("scale", "shift", "zero columns"),
    reference=published,
    refuses=[lambda: PARC(dimensions=1), lambda: PARC(examples=2)],
)
test_contract_reduced = contract(PARC(dimensions=3), invariant=("rotation", "scale", "shift"),
                                 reference=lambda evidence: published(evidence, 3))  # fmt: skip


def score(features, labels, **settings) -> float:
    return PARC(**settings).score(Evidence(features=torch.as_tensor(features), labels=torch.as_tensor(labels)))


def sample(n, d, classes=3, apart=0.7):
    rng = np.random.default_rng(n + d)
    labels = rng.choice(classes, size=n, p=np.r_[1.0, np.full(classes - 1, 0.3)] / (1 + 0.3 * (classes - 1)))
    labels[:classes] = np.arange(classes)
    return rng.normal(size=(n, d)) * rng.uniform(0.1, 5, d) + apart * rng.normal(size=(classes, d))[labels], labels


@pytest.mark.parametrize("dimensions", [None, 4, 32])
@pytest.mark.parametrize(("n", "d"), [(60, 8), (40, 40), (25, 80), (90, 3)])
def test_equals_the_definition_for_any_shape(n, d, dimensions):
    features, labels = sample(n, d)
    if dimensions == 32 and n <= 32:
        dimensions = n - 2  # published has no rule for components without spread
    evidence = Evidence(features=torch.from_numpy(features), labels=torch.from_numpy(labels))
    assert PARC(dimensions=dimensions).score(evidence) == pytest.approx(published(evidence, dimensions), rel=1e-9)


@pytest.mark.parametrize("tilt", [1e-2, 1e-4])
def test_keeps_nine_digits_on_nearly_collinear_features(tilt):
    features, labels = sample(50, 6)
    features[:, 0] = features[:, 1] + tilt * features[:, 0]
    evidence = Evidence(features=torch.from_numpy(features), labels=torch.from_numpy(labels))
    for dimensions in (None, 5):
        assert PARC(dimensions=dimensions).score(evidence) == pytest.approx(published(evidence, dimensions), rel=1e-9)


@pytest.mark.parametrize("copies", [2, 3])
def test_duplicated_examples_tie_as_scipy_ties_them(copies):
    features, labels = sample(20, 5)
    rng = np.random.default_rng(0)
    features, labels = np.tile(features, (copies, 1)), rng.permutation(np.tile(labels, copies))
    evidence = Evidence(features=torch.from_numpy(features), labels=torch.from_numpy(labels))
    assert score(features, labels) == pytest.approx(published(evidence), rel=1e-9)
    untied = features + 1e-7 * rng.normal(size=features.shape)
    assert abs(score(untied, labels) - score(features, labels)) > 1e-3  # the correction is not lost in rounding


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_the_closed_form_is_spearman_whatever_the_ties(data):
    values, mark = (np.array(v) for v in zip(*data, strict=True))
    found = binary_spearman(torch.from_numpy(values / 7), torch.from_numpy(mark))
    if len(set(values)) == 1 or len(set(mark)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(spearmanr(values, mark).statistic, abs=1e-12)


def test_without_ties_it_is_the_mann_whitney_form():
    g = torch.Generator().manual_seed(0)
    values, mark = torch.randn(300, generator=g), torch.rand(300, generator=g) < 0.3
    auc = float((values[mark][:, None] > values[~mark]).double().mean())
    p, m = float((~mark).double().mean()), 300
    expected = math.sqrt(3 * p * (1 - p)) * (2 * auc - 1) * m / math.sqrt(m * m - 1)
    assert binary_spearman(values, mark) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("classes", "n", "most"), [(2, 40, 86.6), (5, 50, 67.1), (10, 100, 49.8)])
def test_6_separated_classes_reach_the_bound_and_no_more(classes, n, most):
    rng = np.random.default_rng(classes)
    labels = np.arange(n) % classes
    features = 1000 * rng.normal(size=(classes, 20))[labels] + rng.normal(size=(n, 20))
    p = (n / classes - 1) / (n - 1)
    assert 100 * math.sqrt(3 * p * (1 - p)) == pytest.approx(most, abs=0.06)
    assert score(features, labels) == pytest.approx(100 * math.sqrt(3 * p * (1 - p)), rel=1e-5)
    assert score(rng.permutation(features), labels) < most


def test_8_order_and_names_change_nothing():
    features, labels = sample(60, 50)
    order = np.random.default_rng(1).permutation(60)
    assert score(features[order], 9 - 4 * labels[order]) == pytest.approx(score(features, labels), rel=1e-9)


def test_wider_features_become_principal_components_and_narrower_ones_stay():
    features, labels = sample(80, 40)
    assert score(features, labels) != pytest.approx(score(features, labels, dimensions=None), rel=1e-3)
    assert score(features[:, :32], labels) == score(features[:, :32], labels, dimensions=None)


def test_a_balanced_draw_is_taken_from_many_and_everything_from_few():
    labels = torch.tensor([0] * 600 + [1] * 60 + [2] * 140)
    counts = labels[balanced(labels, 250, seed=0)].bincount()
    assert counts.tolist() == [95, 60, 95]
    assert torch.equal(balanced(labels, 800, seed=0), torch.arange(800))
    assert len(balanced(labels, 250, seed=1).unique()) == 250
    assert not torch.equal(balanced(labels, 250, seed=0), balanced(labels, 250, seed=1))
    features = torch.randn(800, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    rows = balanced(labels, 250, seed=3)
    assert score(features, labels, examples=250, seed=3) == score(features[rows], labels[rows])
    assert score(features, 2 - labels, examples=250, seed=3) == pytest.approx(
        score(features, labels, examples=250, seed=3), rel=1e-9
    )


def test_an_example_level_in_all_features_correlates_with_nothing():
    rows = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, -2.0], [-1.0, -1.0, 2.0]])
    far = distances(rows)
    assert far[2, [0, 1, 3, 4]].tolist() == [1, 1, 1, 1]
    assert far[0, 1] == pytest.approx(2)
    assert math.isfinite(score(rows, torch.tensor([0, 0, 1, 1, 1])))


def test_nothing_to_rank_scores_nothing():
    labels = torch.arange(8) % 2
    assert score(torch.full((8, 3), 0.1), labels) == 0  # constant features
    assert score(torch.randn(8, 1), labels) == 0  # one feature correlates with nothing


def test_refuses_one_class_no_pair_and_missing_labels():
    with pytest.raises(Refused, match="two classes"):
        score(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(Refused, match="two examples of one class"):
        score(torch.randn(4, 2), torch.arange(4))
    with pytest.raises(Refused, match="two examples of one class"):
        score(torch.randn(40, 2), torch.arange(40) % 20, examples=20)
    with pytest.raises(Refused, match="labels"):
        PARC().score(Evidence(features=torch.randn(4, 2)))
