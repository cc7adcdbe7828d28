"""PED: the card's known answers, and the pairwise form that moves every example at every step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.choose import PED, SFDA, LogME, ped
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def published(e: Evidence, tau=0.1, kappa=1.0, nsigma=0.6, exit_ratio=0.5, steps=6, eps=1e-3):
    """Pair by pair, means and variances from the moved examples again at each step: features and accepted steps."""
    x, y = (v.double().numpy() for v in e.need("features", "labels"))
    reference = x if e.source is None else e.source.features.double().numpy()
    mu, s = reference.mean(0), np.maximum(reference.std(0), eps)
    z, names, first = (x - mu) / s, np.unique(y), None
    for step in range(steps):
        m = [z[y == c].mean(0) for c in names]
        r = [math.sqrt(z[y == c].var(0).sum()) for c in names]
        moved = np.zeros((len(m), x.shape[1]))
        for i in range(len(m)):
            for j in range(len(m)):
                d = np.linalg.norm(m[i] - m[j])
                if i != j and d > 0:
                    o = max(nsigma * (r[i] + r[j]) - d, 0)
                    moved[i] += (m[i] - m[j]) / d * min(tau**2 * kappa * o / 2, o)
        change = np.abs(moved).sum()
        first = change if step == 0 else first
        if first == 0 or not change / first > exit_ratio:
            return z * s + mu, step
        for i, c in enumerate(names):
            z[y == c] += moved[i]
    return z * s + mu, steps


test_contract = contract(
    PED(),
    invariant=("shift",),
    reference=lambda e: SFDA().score(replace(e, features=torch.from_numpy(published(e)[0]))),
    refuses=[
        lambda: PED(base=7), lambda: PED(tau=-1), lambda: PED(kappa=-1), lambda: PED(nsigma=math.inf),  # type: ignore[arg-type]
        lambda: PED(exit_ratio=-0.1), lambda: PED(steps=0), lambda: PED(eps=0),
    ],
)  # fmt: skip
test_contract_logme = contract(
    PED(base=LogME()),
    invariant=("scale", "zero columns"),
    known_failures={"repr_gives_it_back": "LogME is read from the module of PED, which has no need of it"},
)


def evidence(features, labels, source=None) -> Evidence:
    return Evidence(features=torch.as_tensor(features), labels=torch.as_tensor(labels),
                    source=None if source is None else Evidence(features=torch.as_tensor(source)))  # fmt: skip


def sample(n=90, d=6, classes=4, apart=0.5, seed=0):
    """Imbalanced overlapping classes on features of different scales, with a source that scales otherwise."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, classes, n), rng.integers(0, classes, n))
    labels[:classes] = np.arange(classes)
    centres, scale = apart * rng.normal(size=(classes, d)), np.geomspace(0.1, 30, d)
    features = (centres[labels] + rng.normal(size=(n, d)) * (1 + 0.3 * labels[:, None])) * scale + 5
    return features, labels, (rng.normal(size=(40, d)) - 0.5) * scale[::-1]


def two_classes(distance=1.0, n=50, d=3):
    """Equal classes of unit covariance, exactly, whose source has mean 0 and deviation 1 in each feature."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, d))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(rows.T @ rows / n)).T
    shift = np.array([distance / 2, *[0.0] * (d - 1)])
    source = np.concatenate([np.eye(d), -np.eye(d)]) * math.sqrt(d)
    return np.concatenate([rows - shift, rows + shift]), np.arange(2 * n) // n, source


def centres(features, labels):
    features = np.asarray(features)
    return np.stack([features[labels == c].mean(0) for c in np.unique(labels)])


FORMS = [{}, {"tau": 1.0}, {"tau": 3.0, "nsigma": 0.3}, {"exit_ratio": 0.0, "tau": 0.7}, {"kappa": 5.0, "steps": 3}]


@pytest.mark.parametrize("choices", FORMS)
@pytest.mark.parametrize(("n", "d", "classes"), [(90, 6, 4), (30, 80, 3), (60, 3, 12), (40, 1, 5)])
def test_6_equals_the_pairwise_form_that_moves_every_example(n, d, classes, choices):
    features, labels, source = sample(n, d, classes)
    for reference in (None, source):
        e = evidence(features, labels, reference)
        found, (expected, steps) = PED(**choices).move(e), published(e, **choices)
        assert found.steps == steps
        assert found.from_source == (reference is not None)
        assert found.features.numpy() == pytest.approx(expected, rel=1e-10, abs=1e-10)
        assert PED(**choices).score(e) == pytest.approx(SFDA().score(evidence(expected, labels)), rel=1e-9)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_6_classes_that_almost_coincide_far_from_a_third_keep_their_digits(gap, monkeypatch):
    features, labels, source = two_classes(gap)
    features = np.concatenate([features, features[labels == 0] + 1.5])
    e = evidence(features, np.append(labels, np.full(50, 2)), source)
    moved, steps = published(e, tau=1.0)
    for pairs in (4096, 1):
        monkeypatch.setattr(ped, "PAIRS", pairs)
        found = PED(tau=1.0).move(e)
        assert found.steps == steps >= 1
        # means of fifty rows have about 2e-16 / gap of a direction wrong in either form
        assert found.features.numpy() == pytest.approx(moved, abs=1e-10 + 1e-14 / gap)


def test_1_classes_apart_stay_where_they_are():
    features, labels, source = sample()
    far = features + 1e6 * np.eye(6)[labels]
    found = PED().move(evidence(far, labels, source))
    assert (found.steps, found.displacement, found.relative, found.potential) == (0, 0.0, 0.0, (0.0,))
    assert torch.equal(found.features, torch.from_numpy(far))
    assert PED().score(evidence(far, labels, source)) == SFDA().score(evidence(far, labels))


def test_2_the_mean_of_class_means_is_preserved_and_the_grand_mean_of_balanced_classes():
    features, labels, source = sample()
    found = PED(tau=1.0).move(evidence(features, labels, source))
    before, after = centres(features, labels) / source.std(0), centres(found.features, labels) / source.std(0)
    assert np.abs(after - before).max() > 0.1
    assert after.mean(0) == pytest.approx(before.mean(0), abs=1e-11)
    assert found.features.mean(0).numpy() != pytest.approx(features.mean(0), abs=1e-3)
    order = np.argsort(labels, kind="stable")
    even = np.concatenate([order[labels[order] == c][:5] for c in range(4)])
    balanced = PED(tau=1.0).move(evidence(features[even], labels[even], source))
    assert balanced.steps > 0
    assert balanced.features.mean(0).numpy() == pytest.approx(features[even].mean(0), abs=1e-11)


def test_3_covariance_within_classes_is_unchanged():
    features, labels, source = sample()
    found = PED(tau=1.0).move(evidence(features, labels, source)).features.numpy()
    for c in range(4):
        assert np.cov(found[labels == c].T) == pytest.approx(np.cov(features[labels == c].T), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("tau", [0.1, 0.7, 1.0, 1.4])
def test_4_two_classes_part_by_the_overlap_times_tau_squared_kappa(tau):
    features, labels, source = two_classes(1.0)
    overlap = 0.6 * 2 * math.sqrt(3) - 1  # radii are the root of three unit variances
    found = PED(tau=tau, steps=1).move(evidence(features, labels, source))
    a, b = centres(found.features, labels)
    assert np.linalg.norm(a - b) == pytest.approx(1 + tau**2 * overlap, rel=1e-12)
    assert found.displacement == pytest.approx(tau**2 * overlap, rel=1e-12)
    assert found.potential[0] == pytest.approx(overlap**2 / 2, rel=1e-12)
    # each row moves by half of it; the rows' mean square about the grand mean is 3, and 1/4 between the classes
    assert found.relative == pytest.approx(tau**2 * overlap / 2 / math.sqrt(3.25), rel=1e-12)


@pytest.mark.parametrize(("tau", "kappa"), [(math.sqrt(2), 1.0), (5.0, 1.0), (1.0, 2.0)])
def test_4_at_the_cap_each_of_two_classes_moves_by_the_whole_overlap(tau, kappa):
    features, labels, source = two_classes(1.0)
    found = PED(tau=tau, kappa=kappa, steps=1).move(evidence(features, labels, source))
    a, b = centres(found.features, labels)
    assert np.linalg.norm(a - b) == pytest.approx(1 + 2 * (1.2 * math.sqrt(3) - 1), rel=1e-12)


@pytest.mark.parametrize(
    "choices", [{"nsigma": 0.0}, {"kappa": 0.0}, {"tau": 0.0}, {"exit_ratio": 1.0}, {"exit_ratio": 2.0}]
)
def test_5_and_7_settings_that_move_nothing(choices):
    features, labels, source = sample()
    found = PED(**choices).move(evidence(features, labels, source))
    assert found.steps == 0
    assert torch.equal(found.features, torch.from_numpy(features))


def test_7_without_an_exit_all_six_steps_are_taken_while_overlap_remains():
    features, labels, source = sample()
    assert PED(exit_ratio=0.0).move(evidence(features, labels, source)).steps == 6
    assert PED(exit_ratio=0.0, tau=1.0).move(evidence(*two_classes(1.0))).steps == 1  # no overlap is left


def test_8_turning_the_rescaled_axes_turns_the_movement():
    features, labels, source = two_classes(1.0)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    straight = PED(tau=0.8).move(evidence(features, labels, source))
    turned = PED(tau=0.8).move(evidence(features @ turn, labels, source))  # the source rescales by 1 in any axes
    assert straight.steps > 0
    assert turned.features.numpy() == pytest.approx(straight.features.numpy() @ turn, abs=1e-12)


def test_8_rescaling_features_and_reference_alike_rescales_the_movement():
    features, labels, source = sample()
    scale, shift = np.geomspace(0.01, 50, 6), np.arange(6)
    straight = PED(tau=0.8).move(evidence(features, labels, source)).features.numpy()
    rescaled = PED(tau=0.8).move(evidence(features * scale + shift, labels, source * scale + shift)).features.numpy()
    assert rescaled == pytest.approx(straight * scale + shift, rel=1e-10, abs=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    tau=st.floats(0.05, 1.0), kappa=st.floats(0.1, 1.0), nsigma=st.floats(0.2, 2.0), apart=st.floats(0.01, 1.0),
    d=st.integers(1, 20), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_potential_of_two_classes_falls_at_every_accepted_step(tau, kappa, nsigma, apart, d, seed):
    features, labels, source = sample(40, d, 2, apart, seed)
    found = PED(tau=tau, kappa=kappa, nsigma=nsigma, exit_ratio=1e-6).move(evidence(features, labels, source))
    assert len(found.potential) == found.steps + 1
    energy = np.array(found.potential)
    assert (energy[1:] < energy[:-1]).all()
    expected = energy[0] * (1 - tau**2 * kappa) ** (2 * np.arange(len(energy)))  # each step leaves this of the overlap
    assert energy == pytest.approx(expected, rel=1e-6, abs=1e-12 * max(energy[0], 1))


def test_classes_that_share_a_mean_do_not_move_each_other():
    features, labels, source = two_classes(0.0)
    features[labels == 0] = features[labels == 1]
    found = PED(tau=1.0).move(evidence(features, labels, source))
    assert found.steps == 0
    assert torch.equal(found.features, torch.from_numpy(features))
    with_third = PED(tau=1.0).move(
        evidence(np.concatenate([features, features[:50] + 0.5]), np.append(labels, [2] * 50), source)
    )
    a, b, c = centres(with_third.features, np.append(labels, [2] * 50))
    assert a == pytest.approx(b, abs=1e-12)
    assert np.linalg.norm(a - c) > 0.9


def test_features_dead_on_the_reference_are_counted():
    features, labels, source = sample()
    source[:, 2] = 1.0
    source[:, 4] = 1 + 1e-5 * np.arange(40)
    found = PED().move(evidence(features, labels, source))
    assert found.dead == 2
    assert found.features.numpy() == pytest.approx(published(evidence(features, labels, source))[0], rel=1e-9, abs=1e-9)


def test_classes_of_one_example_are_pushed_by_the_others_radius():
    features, labels, source = sample()
    labels = labels.copy()
    labels[0] = 40
    e = evidence(features, labels, source)
    assert PED(tau=1.0).move(e).features.numpy() == pytest.approx(published(e, tau=1.0)[0], rel=1e-10, abs=1e-10)
    alone = PED().move(evidence(features[:4], np.arange(4)))
    assert (alone.steps, alone.potential) == (0, (0.0,))


def test_the_source_of_evidence_is_the_reference():
    features, labels, source = sample()
    assert PED().score(evidence(features, labels, source)) != PED().score(evidence(features, labels))
    own = PED().move(evidence(features, labels, features))
    assert torch.allclose(own.features, PED().move(evidence(features, labels)).features, rtol=1e-13, atol=0)


def test_the_repr_of_any_base_evaluates_back():
    method = PED(base=LogME(iterations=7), tau=0.2)
    assert eval(repr(method)) == method


def test_refuses_one_class_and_missing_labels():
    features, labels, _ = sample()
    with pytest.raises(Refused, match="two classes"):
        PED().move(evidence(features, 0 * labels))
    with pytest.raises(Refused, match="labels"):
        PED().score(Evidence(features=torch.as_tensor(features)))
    with pytest.raises(Refused, match="same model at the same layer"):
        evidence(features, labels, features[:, :2])
    with pytest.raises(Refused, match="finite"):
        evidence(np.where(features > 0, np.nan, features), labels)
