"""E-LEEP and MS-LEEP: the card's known answers, the definitions written out, and every subset from one cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.choose import ELEEP, LEEP, MSLEEP
from headstart.choose.ensemble_leep import expected_predictions
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import sample_set


def prediction(evidence: Evidence) -> list[float]:
    """Of each example, sum over z of p(z | x) p(y | z), with p(y | z) counted on the same examples."""
    logits, labels = evidence.need("logits", "labels")
    p, y = logits.double().softmax(1).tolist(), labels.tolist()
    n, sources = len(p), range(len(p[0]))
    joint = {c: [sum(p[i][z] for i in range(n) if y[i] == c) / n for z in sources] for c in set(y)}
    mass = [sum(joint[c][z] for c in joint) for z in sources]
    return [sum(p[i][z] * joint[y[i]][z] / mass[z] for z in sources if mass[z]) for i in range(n)]


def ensemble(models: Sequence[Evidence]) -> float:
    rows = list(zip(*map(prediction, models), strict=True))
    return math.fsum(math.log(math.fsum(row) / len(row)) for row in rows) / len(rows)


def summed(models: Sequence[Evidence]) -> float:
    return math.fsum(math.fsum(map(math.log, prediction(e))) / len(e.features) for e in models)


ANY = ("rotation", "scale", "shift", "zero columns")
test_contract_of_the_ensemble = contract(ELEEP(), invariant=ANY, reference=ensemble)
test_contract_of_the_sum = contract(MSLEEP(), invariant=ANY, reference=summed)


def models_of(
    k: int, n: int, seed: int, spread: float = 1.0, shares: Sequence[float] = (0.4, 0.3, 0.3)
) -> list[Evidence]:
    """k models with 2, 3, ... source classes that know part of the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=g)
    labels[:2] = torch.arange(2)
    found = []
    for sources in range(2, 2 + k):
        known = torch.randn(3, sources, generator=g, dtype=torch.float64)[labels]
        logits = spread * (known + torch.randn(n, sources, generator=g, dtype=torch.float64))
        found.append(Evidence(features=logits, logits=logits, labels=labels))
    return found


@pytest.mark.parametrize(
    ("n", "spread", "shares"),
    [
        (80, 1.0, (0.4, 0.3, 0.3)),
        (80, 300.0, (0.4, 0.3, 0.3)),
        (4, 3.0, (0.4, 0.3, 0.3)),
        (300, 2.0, (0.98, 0.01, 0.01)),
    ],
    ids=["random", "saturated", "few", "imbalanced"],
)
def test_equal_the_definitions(n: int, spread: float, shares: tuple[float, ...]):
    models = models_of(5, n, 0, spread, shares)
    assert ELEEP().score_set(models) == pytest.approx(ensemble(models), rel=1e-9)
    assert MSLEEP().score_set(models) == pytest.approx(summed(models), rel=1e-9)


def test_7_of_one_model_all_are_leep():
    (model,) = models_of(1, 50, 1)
    assert ELEEP().score_set([model]) == MSLEEP().score_set([model]) == LEEP().score(model)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 6), n=st.integers(2, 40), seed=st.integers(0, 999), spread=st.sampled_from([0.1, 1.0, 50.0]))
def test_7_the_ensemble_is_at_least_the_mean_and_between_worst_and_best_example_by_example(k, n, seed, spread):
    models = models_of(k, n, seed, spread)
    cached = expected_predictions(models)
    assert ELEEP().score_set(models) >= MSLEEP().score_set(models) / k - 1e-12
    assert cached.amin(0).log().mean() - 1e-12 <= ELEEP().score_set(models) <= cached.amax(0).log().mean() + 1e-12
    assert MSLEEP().score_set(models) == pytest.approx(math.fsum(map(LEEP().score, models)), rel=1e-12)
    assert MSLEEP().score_set(models) <= 1e-12


def test_copies_of_a_model_change_nothing():
    (model,) = models_of(1, 50, 2)
    assert ELEEP().score_set([model] * 4) == pytest.approx(LEEP().score(model), rel=1e-14)


def test_models_that_know_different_classes_make_the_better_ensemble():
    labels = torch.arange(60) % 4

    def knows(*classes: int) -> Evidence:
        logits = 60.0 * torch.isin(labels, torch.tensor(classes))[:, None] * torch.eye(4)[labels]
        return Evidence(features=logits, logits=logits, labels=labels)

    unlike, alike = [knows(0, 1), knows(2, 3)], [knows(0, 1), knows(0, 1)]
    # by hand: 2/3 where the model is sure, 1/3 where it says nothing
    assert MSLEEP().score_set(unlike) == pytest.approx(math.log(2 / 9), rel=1e-12)
    assert MSLEEP().score_set(alike) == pytest.approx(math.log(2 / 9), rel=1e-12)
    assert ELEEP().score_set(alike) == pytest.approx(math.log(2 / 9) / 2, rel=1e-12)
    assert ELEEP().score_set(unlike) == pytest.approx(math.log(1 / 2), rel=1e-12)


def test_any_subset_comes_from_the_cache():
    models = models_of(5, 40, 3)
    cached = expected_predictions(models)
    assert cached.shape == (5, 40)
    assert cached.dtype == torch.float64
    for size in (1, 2, 4):
        for subset in itertools.combinations(range(5), size):
            chosen = [models[k] for k in subset]
            for score in (ELEEP(), MSLEEP()):
                assert score.score_predictions(cached[list(subset)]) == pytest.approx(
                    score.score_set(chosen), rel=1e-13
                )


def test_a_source_class_of_no_mass_says_nothing():
    models = models_of(3, 40, 4)
    never = [replace(e, logits=torch.cat([e.logits, torch.full((40, 2), -1e4).double()], 1)) for e in models]
    assert ELEEP().score_set(never) == pytest.approx(ELEEP().score_set(models), rel=1e-12)


@pytest.mark.parametrize("score", [ELEEP(), MSLEEP()])
def test_refuses_what_cannot_be_compared(score):
    one, two, three = sample_set()
    for models, message in [
        ([], "at least one model"),
        ([one, two.take(torch.arange(59))], "on the same examples, in one order; got 59 after 60 in model 1"),
        ([one, two, three.take(torch.arange(60).flip(0))], "got other labels in model 2"),
        ([one, replace(two, logits=None)], "needs evidence with logits"),
        ([replace(one, labels=None), two], "needs evidence with labels"),
        ([one.take(torch.arange(20) * 3)], "at least two classes"),
    ]:
        with pytest.raises(Refused, match=message):
            score.score_set(models)


@pytest.mark.parametrize("score", [ELEEP(), MSLEEP()])
def test_refuses_what_are_not_predictions(score):
    for predictions in (torch.ones(4), torch.ones(0, 4), torch.ones(2, 0), torch.zeros(2, 4), -torch.ones(2, 4),
                        torch.full((2, 4), 1.5), torch.full((2, 4), torch.nan)):  # fmt: skip
        with pytest.raises(Refused, match="redictions must"):
            score.score_predictions(predictions)


def test_labels_of_other_integer_types_are_the_same_examples():
    one, two, three = sample_set()
    mixed = [one, replace(two, labels=two.labels.int()), replace(three, labels=three.labels.to(torch.uint8))]
    assert ELEEP().score_set(mixed) == ELEEP().score_set([one, two, three])
