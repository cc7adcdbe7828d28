"""LogME: the multivariate-normal density it is, the published iteration, streams, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from headstart.choose import LogME
from headstart.core.evidence import Evidence
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused
from headstart.testing import contract


def published(features: torch.Tensor, labels: torch.Tensor) -> float:
    """The fixed point as printed, class by class, with the full log determinant, until nothing moves."""
    n, d = features.shape
    total = 0.0
    for c in range(int(labels.max()) + 1):
        t = (labels == c).double()
        alpha = beta = 1.0
        for _ in range(20_000):
            a = alpha * torch.eye(d, dtype=torch.float64) + beta * features.T @ features
            m = beta * torch.linalg.solve(a, features.T @ t)
            gamma = d - alpha * float(torch.linalg.inv(a).trace())
            before, alpha = alpha, gamma / float(m @ m)
            beta = (n - gamma) / float((features @ m - t).square().sum())
            if abs(alpha - before) <= 1e-10 * before:
                break
        a = alpha * torch.eye(d, dtype=torch.float64) + beta * features.T @ features
        m = beta * torch.linalg.solve(a, features.T @ t)
        total += 0.5 * (d * math.log(alpha) + n * math.log(beta / 2 / math.pi) - float(torch.logdet(a)))
        total -= 0.5 * (beta * float((features @ m - t).square().sum()) + alpha * float(m @ m))
    return total / (int(labels.max()) + 1) / n


def streamed(pieces: list[Evidence]) -> float:
    parts = [ClassStatistics.of(*piece.need("features", "labels"), 5) for piece in pieces]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return LogME().score_from(total)


test_contract = contract(
    LogME(),
    invariant=("rotation", "scale", "zero columns"),
    reference=lambda evidence: published(*evidence.need("features", "labels")),
    streamed=streamed,
    refuses=[lambda: LogME(tolerance=0), lambda: LogME(iterations=0)],
)
SIZES = [(60, 20), (30, 80), (40, 40), (25, 1)]


def sample(n: int, d: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    features = torch.randn(n, d, generator=g, dtype=torch.float64)
    for c in range(min(d, classes)):
        features[:, c] += 2 * (labels == c)
    return features, labels


def score(features: torch.Tensor, labels: torch.Tensor, **settings: float) -> float:
    return LogME(**settings).score(Evidence(features=features, labels=labels))


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_equals_the_highest_multivariate_normal_density(n, d):
    """Known answer 3: t ~ N(0, I / beta + F Fᵀ / alpha), maximised by a general optimiser."""
    features, labels = sample(n, d)
    gram = (features @ features.T).numpy()
    best = []
    for c in range(3):
        t = (labels == c).double().numpy()

        def loss(log: np.ndarray, t: np.ndarray = t) -> float:
            return -multivariate_normal.logpdf(t, cov=np.exp(-log[1]) * np.eye(n) + np.exp(-log[0]) * gram) / n

        runs = [minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 4000})
                for start in ([0, 0], [3, 3], [6, 2])]  # fmt: skip
        best.append(-min(run.fun for run in runs))
    assert score(features, labels) == pytest.approx(np.mean(best), abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(60, 20), (25, 3), (30, 40)])
def test_equals_the_published_iteration(n, d):
    features, labels = sample(n, d, seed=1)
    assert score(features, labels) == pytest.approx(published(features, labels), abs=1e-8)


def test_reaches_the_fixed_point_within_the_rounds_it_is_given():
    for n, d in SIZES:
        features, labels = sample(n, d)
        assert score(features, labels) == pytest.approx(score(features, labels, tolerance=1e-15, iterations=10_000),
                                                        abs=1e-10)  # fmt: skip


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_streamed_statistics_give_the_same(n, d):
    features, labels = sample(n, d)
    evidence = Evidence(features=features, labels=labels)
    pieces = [evidence.take(rows) for rows in torch.split(torch.arange(n), 7)]
    assert streamed(pieces) == pytest.approx(LogME().score(evidence), abs=1e-9)


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_what_changes_nothing(n, d):
    features, labels = sample(n, d)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    same = score(features, labels)
    assert score(features @ turn, labels) == pytest.approx(same, abs=1e-9)
    assert score(1000 * features, labels) == pytest.approx(same, abs=1e-9)
    assert score(features[order], labels[order]) == pytest.approx(same, abs=1e-9)
    assert score(features, 7 * (2 - labels)) == pytest.approx(same, abs=1e-9)
    assert score(torch.cat([features, torch.zeros(n, 30).double()], 1), labels) == pytest.approx(same, abs=1e-9)


def test_features_that_say_nothing_get_the_evidence_of_noise():
    labels = torch.tensor([0, 0, 0, 1])
    noise = np.mean([-0.5 * math.log(2 * math.pi * math.e * share) for share in (0.75, 0.25)])
    assert score(torch.zeros(4, 2), labels) == pytest.approx(noise, abs=1e-12)
    features, labels = sample(60, 20)
    assert score(features, labels) >= score(torch.zeros(60, 20), labels)


def test_constant_features_act_as_an_intercept_at_any_height():
    labels = torch.tensor([0, 0, 0, 1])
    assert score(torch.ones(4, 2), labels) == pytest.approx(score(torch.full((4, 2), 50.0), labels), abs=1e-9)


def test_labels_explained_without_rest_score_higher_than_with():
    features, labels = sample(60, 3)
    exact = torch.nn.functional.one_hot(labels).double()
    assert math.isfinite(score(exact, labels))
    assert score(exact, labels) > score(exact + 0.001 * features, labels) > score(exact + 0.1 * features, labels)


def test_refuses_one_class_and_missing_labels():
    with pytest.raises(Refused, match="two classes"):
        score(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(Refused, match="two classes"):
        LogME().score_from(ClassStatistics.of(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), 3))
    with pytest.raises(Refused, match="labels"):
        LogME().score(Evidence(features=torch.randn(4, 2)))
    with pytest.raises(Refused, match="statistics must be finite"):
        LogME().score_from(ClassStatistics.of(torch.full((4, 2), torch.nan), torch.arange(4) % 2, 2))


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize(("n", "d"), [(120, 12), (40, 60)])
def test_keeps_nine_digits_on_ill_conditioned_features(n, d, spread, noise):
    """Against the same evidence from a singular value decomposition, maximised over a grid that narrows."""
    labels = torch.from_numpy(np.random.default_rng(0).choice(3, size=n, p=[0.8, 0.1, 0.1]))
    features = noise * torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features[:, :3] += torch.nn.functional.one_hot(labels, 3)
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    features = features @ turn * torch.logspace(0, -math.log10(spread), d, dtype=torch.float64) @ turn.T
    u, s, _ = np.linalg.svd(features.numpy(), full_matrices=False)
    kept, total = s > 1e-15 * s[0], 0.0
    for c in range(3):
        t = (labels == c).double().numpy()
        x = u.T @ t
        rest = np.square(t - u @ x).sum() if n > d else 0.0
        low, high = np.log(1e-12 * s[0] ** 2), np.log(1e12 * s[0] ** 2)
        for _ in range(60):
            ratio = np.exp(np.linspace(low, high, 41))[:, None]
            least = (rest + (x[kept] ** 2 * ratio / (ratio + s[kept] ** 2)).sum(1)) / n
            found = -0.5 * (n * np.log(2 * np.pi * np.e * least) + np.log1p(s[kept] ** 2 / ratio).sum(1))
            best, width = np.linspace(low, high, 41)[found.argmax()], (high - low) / 20
            low, high = max(low, best - width), min(high, best + width)
        total += found.max() / 3 / n
    assert score(features, labels) == pytest.approx(total, rel=1e-9)
