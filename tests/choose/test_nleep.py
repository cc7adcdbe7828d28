"""N-LEEP: the published pipeline restated with scikit-learn, and what happens at its edges."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from headstart.choose import LEEP, NLEEP
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(
    NLEEP(),
    invariant=("shift", "scale", "zero columns"),
    refuses=[
        lambda: NLEEP(components=0),
        lambda: NLEEP(variance=0),
        lambda: NLEEP(variance=1.1),
        lambda: NLEEP(floor=0),
    ],
)


def sample(n: int, d: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64), labels


def published(features: torch.Tensor, labels: torch.Tensor, per_class: int) -> float:
    """PCA to 80 % of the variance, a mixture of Gaussians, and the n x c matrix of expected predictions."""
    z = PCA(n_components=0.8, svd_solver="full").fit_transform(features.numpy())
    z = z / np.sqrt(np.square(z).mean())
    z = z * np.sign(z[np.abs(z).argmax(0), np.arange(z.shape[1])])
    order = z[:, 0].argsort(kind="stable")
    z, (present, y) = z[order], np.unique(labels.numpy()[order], return_inverse=True)
    p = GaussianMixture(per_class * len(present), reg_covar=1e-4, random_state=0).fit(z).predict_proba(z)
    joint = np.stack([p[y == c].sum(0) for c in range(len(present))]) / len(y)
    mass = joint.sum(0)
    matrix = p @ np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0).T
    return float(np.mean([math.log(row[label]) for row, label in zip(matrix, y, strict=True)]))


@pytest.mark.parametrize(("n", "d", "per_class"), [(300, 6, 5), (60, 20, 2), (40, 90, 1)])
@pytest.mark.parametrize("tilt", [0, 3, 6])
def test_equals_the_published_pipeline(n, d, per_class, tilt):
    features, labels = sample(n, d)
    features = features * torch.logspace(0, -tilt, d, dtype=torch.float64)  # the last feature 10^tilt times smaller
    ours, z = NLEEP().reduced(features), PCA(n_components=0.8, svd_solver="full").fit_transform(features.numpy())
    assert ours.shape == z.shape
    assert np.allclose(np.abs(ours.numpy()), np.abs(z) / np.sqrt(np.square(z).mean()), atol=1e-9)
    value = NLEEP().score(Evidence(features=features, labels=labels))
    assert value == pytest.approx(published(features, labels, per_class), rel=1e-9)


def test_equals_the_published_pipeline_on_rare_classes():
    features, labels = sample(400, 5, seed=3)
    kept = (labels == 0) | (torch.arange(400) % 20 == 0)
    assert NLEEP().score(Evidence(features=features[kept], labels=labels[kept])) == pytest.approx(
        published(features[kept], labels[kept], 4), rel=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(n=st.integers(6, 60), d=st.integers(1, 70), classes=st.integers(2, 3), seed=st.integers(0, 99))
def test_it_is_a_log_likelihood_that_order_names_place_and_size_leave(n, d, classes, seed):
    features, labels = sample(n, d, classes, seed)
    value = NLEEP().score(Evidence(features=features, labels=labels))
    assert -math.log(n * (5 * classes) ** 2) <= value <= 1e-12
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    changed = Evidence(features=8 * features[order], labels=(9 - 3 * labels)[order])
    assert NLEEP().score(changed) == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_the_callers_generators_and_warnings_are_left_alone():
    features, labels = sample(60, 3)
    before = np.random.get_state()[1].copy()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        twins = Evidence(features=features[:6].repeat(10, 1), labels=labels[:6].repeat(10))
        first, second = (NLEEP(components=2).score(twins) for _ in range(2))
    assert first == second
    assert not seen
    assert (np.random.get_state()[1] == before).all()


def test_clusters_that_are_the_classes_score_nothing_lost_and_noise_the_entropy():
    features, labels = sample(300, 4)
    far = Evidence(features=features + 100 * torch.eye(4, dtype=torch.float64)[labels], labels=labels)
    assert NLEEP(components=1).score(far) == pytest.approx(0, abs=1e-6)
    constant = Evidence(features=torch.ones(30, 3), labels=torch.arange(30) % 3)
    assert NLEEP().score(constant) == pytest.approx(-math.log(3))
    noise = Evidence(
        features=torch.randn(600, 2, generator=torch.Generator().manual_seed(1)), labels=torch.arange(600) % 3
    )
    assert -math.log(3) <= NLEEP().score(noise) < -0.95 * math.log(3)


def test_with_one_gaussian_a_class_far_apart_it_is_leep_of_the_classes():
    features, labels = sample(90, 4, seed=2)
    logits = 50 * torch.eye(3, dtype=torch.float64)[labels]
    exact = LEEP().score(Evidence(features=features, labels=labels, logits=logits))
    apart = Evidence(features=features + 100 * torch.eye(4, dtype=torch.float64)[labels], labels=labels)
    assert NLEEP(components=1).score(apart) == pytest.approx(exact, abs=1e-6)


def test_few_examples_get_fewer_gaussians(monkeypatch):
    seen = []
    plain = NLEEP.responsibilities
    monkeypatch.setattr(NLEEP, "responsibilities", lambda self, x, count: seen.append(count) or plain(self, x, count))
    for n in (12, 90, 150, 3000):
        features, labels = sample(n, 2)
        NLEEP().score(Evidence(features=features, labels=labels))
    assert seen == [3, 9, 15, 15]


def test_bad_input():
    features, labels = sample(30, 3)
    with pytest.raises(Refused, match="two classes"):
        NLEEP().score(Evidence(features=features, labels=torch.zeros(30, dtype=torch.long)))
    with pytest.raises(Refused, match="labels"):
        NLEEP().score(Evidence(features=features))
    alone = Evidence(features=features[:3], labels=labels[:3])  # one example a class
    assert -math.log(3) <= NLEEP().score(alone) <= 0
    twins = Evidence(features=features[:3].repeat(20, 1), labels=labels[:3].repeat(20))
    assert math.isfinite(NLEEP().score(twins))
