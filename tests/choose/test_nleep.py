"""N-LEEP: the published pipeline restated with scikit-learn, and what happens at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize(("n", "d"), [(300, 6), (60, 20), (40, 90)])
def test_equals_the_published_pipeline(n, d):
    """PCA to 80 % of the variance, a mixture of Gaussians, and the n x c matrix of expected predictions."""
    features, labels = sample(n, d)
    z = PCA(n_components=0.8, svd_solver="full").fit_transform(features.numpy())
    z = z / np.sqrt(np.square(z).mean())
    ours = NLEEP().reduced(features)
    assert ours.shape == z.shape
    assert np.allclose(np.abs(ours.numpy()), np.abs(z), atol=1e-9)
    order = ours[:, 0].argsort(stable=True)
    count = 3 * max(1, min(5, n // 30))
    p = GaussianMixture(count, reg_covar=1e-4, random_state=0).fit(ours[order]).predict_proba(ours[order])
    y = labels[order].numpy()
    joint = np.stack([p[y == c].sum(0) for c in range(3)]) / n
    expected = np.log((p @ (joint / joint.sum(0)).T)[np.arange(n), y]).mean()
    assert NLEEP().score(Evidence(features=features, labels=labels)) == pytest.approx(expected, rel=1e-9)


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
