"""TransRate: the published determinants, its limits, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.choose import TransRate
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def published(evidence: Evidence, epsilon: float = 1e-4, scale: bool = True) -> float:
    """A dense d x d determinant for all and for every class, weighted by the classes' shares."""
    features, labels = (t.numpy() for t in evidence.need("features", "labels"))
    f = features.astype(np.float64) - features.astype(np.float64).mean(0)
    f = f / np.sqrt(np.square(f).sum(1).mean()) if scale else f

    def rate(x: np.ndarray) -> float:
        return 0.5 * np.linalg.slogdet(np.eye(x.shape[1]) + x.T @ x / (len(x) * epsilon))[1]

    return rate(f) - sum((labels == c).mean() * rate(f[labels == c]) for c in np.unique(labels))


test_contract = contract(
    TransRate(),
    invariant=("rotation", "scale", "shift", "zero columns"),
    reference=published,
    refuses=[lambda: TransRate(distortion=0), lambda: TransRate(distortion=float("inf"))],
)
test_contract_unscaled = contract(
    TransRate(scale=False), invariant=("rotation", "shift"), reference=lambda e: published(e, scale=False)
)


def sample(n: int, d: int, classes: int = 3, seed: int = 0, tilt: float = 1.0) -> Evidence:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    labels[:classes] = np.arange(classes)
    features = rng.normal(size=(n, d)) * np.logspace(0, -np.log10(tilt), d) + rng.normal(size=(classes, d))[labels]
    return Evidence(features=torch.from_numpy(features), labels=torch.from_numpy(labels))


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 50), (40, 40), (300, 3)])
@pytest.mark.parametrize("tilt", [1.0, 1e4, 1e8])
def test_equals_the_published_determinants(n, d, tilt):
    evidence = sample(n, d, tilt=tilt)
    assert TransRate().score(evidence) == pytest.approx(published(evidence), rel=1e-9)


def test_5_one_class_says_nothing_and_coarse_codes_neither():
    evidence = sample(50, 6)
    with pytest.raises(Refused, match="two classes"):
        TransRate().score(Evidence(features=evidence.features, labels=torch.zeros(50, dtype=torch.long)))
    assert TransRate(distortion=1e12).score(evidence) == pytest.approx(0, abs=1e-9)


def test_twin_classes_say_nothing():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    assert TransRate().score(Evidence(features=x.repeat(2, 1), labels=torch.arange(2).repeat_interleave(30))) < 1e-9


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 30), d=st.integers(1, 30), classes=st.integers(2, 4), seed=st.integers(0, 99))
def test_5_it_is_never_negative(n, d, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes + 4,), generator=generator)])
    features = torch.randn(len(labels), d, generator=generator)
    evidence = Evidence(features=features, labels=labels)
    assert TransRate().score(evidence) == pytest.approx(published(evidence), abs=1e-9)
    assert TransRate().score(evidence) >= 0


def test_constant_features_score_nothing():
    assert TransRate().score(Evidence(features=torch.ones(8, 3), labels=torch.arange(8) % 2)) == 0


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("d", [2, 60])
def test_two_crossed_lines_by_hand(size, d):
    """Classes at plus and minus `size` on one axis each: log(1 + s²/2e) - 1/2 log(1 + s²/e), whichever way they lie."""
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    labels = torch.arange(12) % 2
    signs = 1.0 - 2 * (torch.arange(12) // 2 % 2)
    features = size * signs[:, None].double() * turn[labels]
    evidence = Evidence(features=features, labels=labels)

    def by_hand(s2: float) -> float:
        return np.log1p(s2 / 2e-4) - 0.5 * np.log1p(s2 / 1e-4)

    assert TransRate().score(evidence) == pytest.approx(by_hand(1.0), rel=1e-9)
    assert TransRate(scale=False).score(evidence) == pytest.approx(by_hand(size**2), rel=1e-9)


def test_fine_codes_of_more_features_than_examples_stay_exact():
    """Against singular values: a Gram matrix has lost the digits that a distortion of 1e-14 asks for."""
    evidence = sample(20, 50, tilt=1e3)
    f = evidence.features - evidence.features.mean(0)
    f, y = (f / f.square().sum(1).mean().sqrt()).numpy(), evidence.need("labels")[0].numpy()

    def rate(x: np.ndarray) -> float:
        return 0.5 * np.log1p(np.square(np.linalg.svd(x, compute_uv=False)) / (len(x) * 1e-14)).sum()

    known = sum((y == c).mean() * rate(f[y == c]) for c in np.unique(y))
    assert TransRate(distortion=1e-14).score(evidence) == pytest.approx(rate(f) - known, rel=1e-9)


def test_one_example_a_class_has_the_code_of_a_line():
    evidence = Evidence(features=sample(6, 9).features, labels=torch.arange(6))
    assert TransRate().score(evidence) == pytest.approx(published(evidence), rel=1e-9)
