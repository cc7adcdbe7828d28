"""Intervals of scores, rank agreement, and the probes' exactness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import weightedtau
from sklearn.linear_model import LogisticRegression, Ridge

from headstart.choose import GBC, KNN, LEEP, HScore, LogME
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.run.bootstrap import agreement, block_statistics, estimate, half_samples, weighted_tau
from headstart.run.probe import closed_form, cross_validated, fit_probe, folds_of


def clouds(n=60, d=8, classes=3, apart=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = apart * torch.randn(classes, d, generator=generator)
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def test_halves_are_stratified_without_copies_and_follow_the_seed():
    labels = torch.tensor([0] * 9 + [1] * 4 + [2])
    halves = half_samples(labels, 20, seed=3)
    for rows in halves.rows:
        assert len(set(rows.tolist())) == len(rows)
        assert labels[rows].bincount().tolist() == [5, 2, 1]
    assert len({tuple(rows.tolist()) for rows in halves.rows}) > 10
    assert all(torch.equal(a, b) for a, b in zip(halves.rows, half_samples(labels, 20, seed=3).rows, strict=True))


def test_the_spread_over_halves_is_the_standard_error_of_the_mean():
    class Mean:
        def score(self, evidence):
            return float(evidence.features.mean())

    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 2
    found = estimate(Mean(), Evidence(features=values, labels=labels), half_samples(labels, 2000, seed=0))
    by_formula = 1.645 * float(values.std()) / 400**0.5
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(by_formula, rel=0.1)


@pytest.mark.parametrize("score", [LogME(), HScore(), HScore(shrink=False), GBC()])
def test_statistics_of_blocks_give_what_the_rows_give(score):
    x, y = clouds(n=600)
    evidence, halves = Evidence(features=x, labels=y), half_samples(y, 12, seed=0)
    assert all(rows.numel() in range(280, 321) for rows in halves.rows)
    by_rows, by_blocks = (estimate(score, evidence, halves, s) for s in (None, block_statistics(evidence, halves)))
    assert by_blocks.high == pytest.approx(by_rows.high, rel=1e-8)
    assert block_statistics(evidence, half_samples(y[:90], 12, seed=0)) is None


def test_intervals_of_scores_hold_what_new_samples_give():
    x, y = clouds(n=3000)
    score, halves = LogME(), half_samples(y[:300], 24, seed=0)
    found = estimate(score, Evidence(features=x[:300], labels=y[:300]), halves)
    others = [score.score(Evidence(features=x[k : k + 300], labels=y[k : k + 300])) for k in range(300, 3000, 300)]
    assert found.low < found.value < found.high
    inside = [found.low <= other <= found.high for other in others]
    assert sum(inside) >= 5  # two estimates differ by sqrt(2) standard errors: 83 % of nine
    assert found.high - found.low < 4 * (max(others) - min(others))


def test_copies_do_not_lift_the_neighbour_score():
    x, _ = clouds(n=100, apart=0.0)
    y = torch.randint(2, (100,), generator=torch.Generator().manual_seed(0))
    evidence = Evidence(features=x, labels=y)
    drawn = torch.randint(100, (100,), generator=torch.Generator().manual_seed(0))
    assert KNN().score(evidence.take(drawn)) > 0.75  # the bootstrap with copies finds structure in noise
    found = estimate(KNN(), evidence, half_samples(y, 24, seed=0))
    assert found.high < 0.75


def test_a_score_without_its_evidence_is_absent():
    x, y = clouds()
    assert estimate(LEEP(), Evidence(features=x, labels=y), half_samples(y, 4, seed=0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_weighted_tau_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 12).astype(float), rng.normal(size=12)
    y[:4] = y[0]
    assert weighted_tau(x, y) == pytest.approx(weightedtau(x, y).statistic, abs=1e-12)


def test_agreement_uses_the_sources_that_both_scores_have():
    table = agreement(
        {"a": {"p": 1.0, "q": 2.0, "r": 3.0}, "b": {"p": 1.0, "q": 2.0, "r": 3.0, "s": -9.0}, "c": {"p": 1.0}}
    )
    assert table["a"]["b"] == table["b"]["a"] == 1.0
    assert "c" not in table["a"]
    assert agreement({"a": {"p": 1.0, "q": 1.0, "r": 1.0}}) == {}  # all equal: no order to agree on
    with pytest.raises(Refused, match="one length"):
        weighted_tau([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("n", "d"), [(40, 5), (20, 60)])
def test_closed_form_is_leave_one_out_by_refitting(n, d):
    x, y = clouds(n=n, d=d, apart=0.5)
    z = x.double().numpy()
    z = (z - z.mean(0)) / z.std(0)
    singular = np.linalg.svd(z, compute_uv=False)
    onehot = np.eye(3)[y]
    best = (np.inf, None)
    for power in (-2, -1, 0, 1, 2):
        rows = []
        for i in range(n):
            keep = np.arange(n) != i
            rows.append(Ridge(alpha=(singular**2).mean() * 10.0**power).fit(z[keep], onehot[keep]).predict(z[[i]])[0])
        rows = np.stack(rows)
        best = min(best, (((rows - onehot) ** 2).sum(), rows), key=lambda pair: pair[0])
    accuracy, right = closed_form(x, y)
    assert torch.equal(right, torch.from_numpy(best[1].argmax(1)) == y)
    assert accuracy == right.double().mean()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 50)])
def test_the_probe_head_is_logistic_regression_on_standardised_features(n, d, classes):
    x, y = clouds(n=n, d=d, classes=classes)
    x = x * torch.logspace(-2, 2, d) + 5
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    weight, bias = fit_probe(x, y, classes, strength=0.1)
    want = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(z.numpy(), y.numpy()).predict_proba(z.numpy())
    assert torch.allclose((x @ weight.T + bias).double().softmax(1), torch.from_numpy(want), atol=5e-3)


def test_a_class_without_examples_is_never_predicted():
    x, y = clouds(classes=2)
    weight, bias = fit_probe(x, y, 4)
    assert set((x @ weight.T + bias).argmax(1).tolist()) <= {0, 1}


def test_constant_and_repeated_features_do_no_harm():
    x, y = clouds()
    wide = torch.cat([x, x, torch.full((60, 2), 7.0)], 1)
    assert closed_form(wide, y)[0] == closed_form(torch.cat([x, x], 1), y)[0]
    weight, _ = fit_probe(wide, y, 3)
    assert torch.isfinite(weight).all()
    assert (weight[:, -2:] == 0).all()


def test_folds_deal_out_every_class_evenly():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 3)
    fold = folds_of(labels, 5, seed=1)
    for label in range(3):
        counts = fold[labels == label].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(fold, folds_of(labels, 5, seed=2))


def test_cross_validation_sees_through_noise_and_finds_signal():
    x, y = clouds(n=90, apart=3.0)
    found = cross_validated(x, y, seed=0)
    assert found.accuracy > 0.95
    shuffled = y[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    chance = cross_validated(x, shuffled, seed=0)
    assert chance.accuracy < 0.5
    assert found.right.shape == (90,)
    assert cross_validated(x, y, seed=0).accuracy == found.accuracy
