"""The linear probe: scikit-learn's pipeline fold by fold, and leave-one-out by leaving one out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from headstart.choose import LinearProbe
from headstart.choose.linear_probe import closed_form, folds_of, logistic, standardised
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(
    LinearProbe(),
    invariant=("scale", "shift", "zero columns"),
    known_failures={"order_of_examples": "which fold an example is dealt to depends on its row"},
    refuses=[lambda: LinearProbe(folds=1), lambda: LinearProbe(strength=0)],
)
test_contract_closed = contract(LinearProbe(closed_form=True), invariant=("scale", "shift", "zero columns"))


def score(features, labels, **settings) -> float:
    return LinearProbe(**settings).score(Evidence(features=torch.as_tensor(features), labels=torch.as_tensor(labels)))


def sample(n, d, classes=3, apart=1.0):
    rng = np.random.default_rng(n + d)
    labels = rng.choice(classes, size=n, p=np.r_[1.0, np.full(classes - 1, 0.4)] / (1 + 0.4 * (classes - 1)))
    labels[:classes] = np.arange(classes)
    features = rng.normal(size=(n, d)) * np.logspace(-2, 2, d) + 5
    return features + apart * np.logspace(-2, 2, d) * rng.normal(size=(classes, d))[labels], labels


@pytest.mark.parametrize(("n", "d", "classes"), [(80, 6, 3), (60, 10, 2), (40, 90, 3), (100, 2, 5)])
def test_equals_scikit_learns_pipeline_on_the_same_folds(n, d, classes):
    features, labels = sample(n, d, classes, apart=0.8 / d**0.5)
    _, first = np.unique(labels, return_index=True)
    fold = folds_of(torch.from_numpy(np.argsort(np.argsort(first))[labels]), 5, seed=3).numpy()
    hits = 0
    for k in range(5):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500))
        hits += (
            probe.fit(features[fold != k], labels[fold != k]).predict(features[fold == k]) == labels[fold == k]
        ).sum()
    assert 1 / classes < hits / n < 1
    assert score(features, labels, seed=3) == hits / n


@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 50), (40, 40)])
def test_the_closed_form_is_leave_one_out_by_refitting(n, d):
    features, labels = sample(n, d, apart=0.5)
    features[:, 1] = features[:, 0] + 1e-5 * features[:, 1]  # nearly collinear
    z = (features - features.mean(0)) / features.std(0)
    mean_square = np.square(np.linalg.svd(z, compute_uv=False)).mean()
    onehot, best, right = np.eye(3)[labels], np.inf, None
    for power in (-2, -1, 0, 1, 2):
        left_out = np.stack([
            Ridge(alpha=mean_square * 10.0**power).fit(np.delete(z, i, 0), np.delete(onehot, i, 0)).predict(z[[i]])[0]
            for i in range(n)
        ])  # fmt: skip
        if (error := np.square(left_out - onehot).sum()) < best:
            best, right = error, left_out.argmax(1) == labels
    assert np.array_equal(closed_form(torch.from_numpy(features), torch.from_numpy(labels))[1].numpy(), right)
    assert score(features, labels, closed_form=True) == right.mean()


def test_far_classes_score_one_and_noise_scores_chance():
    features, labels = sample(120, 6, apart=20.0)
    noise = np.random.default_rng(0).normal(size=(400, 4))
    assert score(features, labels) == score(features, labels, closed_form=True) == 1
    assert 0.4 < score(noise, np.arange(400) % 2) < 0.6
    assert score(noise, np.arange(400) % 2, closed_form=True) < 0.1  # what is left has one more of the other class


def test_constant_features_leave_the_majority():
    labels = torch.tensor([0] * 30 + [1] * 10)
    for closed in (False, True):
        assert score(torch.full((40, 3), 0.1), labels, closed_form=closed) == 0.75


def test_the_training_part_alone_sets_the_scale():
    features, labels = sample(40, 3)
    z, mean, scale = standardised(torch.from_numpy(features[:30]))
    assert torch.allclose(z.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert np.allclose(
        ((features[30:] - mean.numpy()) / scale.numpy()), (features[30:] - features[:30].mean(0)) / features[:30].std(0)
    )
    small = torch.cat([torch.from_numpy(features), torch.full((40, 1), 7.0)], 1) * 1e-12  # no scale is too small
    assert torch.allclose(standardised(small)[0][:, :3], standardised(torch.from_numpy(features))[0])
    assert (standardised(small)[0][:, 3] == 0).all()
    assert len(labels) == 40


def test_a_class_that_a_training_part_lacks_is_never_predicted():
    z = np.random.default_rng(0).normal(size=(20, 3))
    weight, bias = logistic(z, np.arange(20) % 2 * 2, 4, 1.0)
    assert set((z @ weight.T + bias).argmax(1)) <= {0, 2}
    labels = torch.tensor([0] * 10 + [1] * 9 + [2])  # the only example of 2 is never right
    assert score(torch.cat([10 * torch.eye(3)[labels], torch.randn(20, 1)], 1), labels) == 19 / 20


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 20),
    d=st.integers(1, 25),
    classes=st.integers(2, 5),
    closed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_is_a_share_of_the_examples_whatever_the_shape(n, d, classes, closed, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % min(classes, n)
    features = torch.randn(n, d, generator=g)
    found = score(features, labels, closed_form=closed, seed=seed)
    assert found * n == pytest.approx(round(found * n), abs=1e-9)
    assert 0 <= found <= 1
    assert score(features, 7 - 2 * labels, closed_form=closed, seed=seed) == pytest.approx(found, abs=1e-12)


def test_refuses_one_class_and_missing_labels():
    for closed in (False, True):
        with pytest.raises(Refused, match="two classes"):
            score(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), closed_form=closed)
    with pytest.raises(Refused, match="labels"):
        LinearProbe().score(Evidence(features=torch.randn(4, 2)))
