"""NCE: the definition written out example by example, LEEP of certain predictions, and entropies known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.choose import LEEP, NCE
from headstart.choose.nce import conditional_entropy
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def published(labels: Tensor, predicted: Tensor) -> float:
    """The sum over all pairs of classes of J log(J / J_z), with J counted in a loop over the examples."""
    y, z = labels.numpy(), predicted.numpy()
    joint = np.zeros((y.max() + 1, z.max() + 1))
    for target, source in zip(y, z, strict=True):
        joint[target, source] += 1
    seen, mass = joint > 0, np.broadcast_to(joint.sum(0), joint.shape)
    return float((joint[seen] * np.log(joint[seen] / mass[seen])).sum()) / len(y)


test_contract = contract(
    NCE(),
    invariant=("rotation", "scale", "shift", "zero columns"),
    reference=lambda e: published(e.need("labels")[0], e.need("logits")[0].argmax(1)),
)


def evidence(labels: Tensor, predicted: Tensor) -> Evidence:
    logits = 1e4 * torch.nn.functional.one_hot(predicted).double()
    return Evidence(features=logits, logits=logits, labels=labels)


def draws(n: int, classes: int, seed: int = 0, power: float = 1.0) -> Tensor:
    """Classes with shares falling as 1 / rank ** power."""
    shares = torch.arange(1, classes + 1, dtype=torch.float64) ** -power
    return torch.multinomial(shares, n, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n", "classes", "sources", "power"),
    [(500, 5, 7, 0.0), (40, 10, 100, 0.0), (500, 6, 6, 3.0), (12, 12, 2, 0.0), (3000, 2, 500, 1.0)],
    ids=["random", "fewer examples than classes", "imbalanced", "one example a class", "many source classes"],
)
def test_equals_the_definition(n, classes, sources, power):
    labels = draws(n, classes, 1, power) if n > classes else torch.arange(n)
    predicted = draws(n, sources, 2, power)
    assert NCE().score(evidence(labels, predicted)) == pytest.approx(published(labels, predicted), rel=1e-9)


def test_keeps_its_digits_where_almost_nothing_is_left_open():
    """One misfit among a hundred thousand."""
    labels = torch.arange(100_000) % 2
    predicted = labels.clone()
    predicted[0] = 1
    exact = -(math.log1p(1 / 50_000) * 50_000 + math.log(50_001)) / 100_000
    assert -conditional_entropy(labels, predicted) == pytest.approx(exact, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 60), classes=st.integers(2, 6), sources=st.integers(1, 8), seed=st.integers(0, 999))
def test_1_equals_leep_of_certain_predictions(n, classes, sources, seed):
    labels, predicted = draws(n, classes, seed), draws(n, sources, seed + 1)
    labels[:2] = torch.arange(2)
    e = evidence(labels, predicted)
    assert NCE().score(e) == pytest.approx(LEEP().score(e), abs=1e-12)
    entropy = conditional_entropy(labels, torch.zeros(n, dtype=torch.long))
    assert -entropy - 1e-12 <= NCE().score(e) <= 0


def test_1_of_constant_predictions_is_the_entropy_of_the_labels_and_of_the_labels_themselves_zero():
    labels = draws(200, 4)
    share = torch.bincount(labels).double() / 200
    assert NCE().score(evidence(labels, torch.zeros(200).long())) == pytest.approx(float((share * share.log()).sum()))
    assert NCE().score(evidence(labels, 3 - labels)) == 0


def test_finer_predictions_leave_no_more_open():
    labels, coarse = draws(300, 5, 1), draws(300, 4, 2)
    fine = 3 * coarse + draws(300, 3, 3)
    assert conditional_entropy(labels, fine) < conditional_entropy(labels, coarse)


def test_the_chain_rule_holds():
    """H(y | z) + H(z) = H(z | y) + H(y)."""
    y, z, nothing = draws(400, 5, 1), draws(400, 7, 2), torch.zeros(400).long()
    left = conditional_entropy(y, z) + conditional_entropy(z, nothing)
    assert left == pytest.approx(conditional_entropy(z, y) + conditional_entropy(y, nothing), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_any_integers_number_the_classes(dtype):
    y, z = draws(100, 2, 1), draws(100, 5, 2)
    expected = published(y, z)
    assert -conditional_entropy(y.to(dtype), z) == pytest.approx(expected, rel=1e-12)
    for shift, step in ((-7, 1), (0, 10**15), (-(10**17), 10**16)):
        assert -conditional_entropy(shift + step * y, shift + step * z) == pytest.approx(expected, rel=1e-12)


def test_refuses_one_class_missing_fields_and_other_lengths():
    logits = torch.zeros(4, 3)
    for e, message in [
        (Evidence(features=logits, logits=logits, labels=torch.ones(4).long()), "two classes; got 1"),
        (Evidence(features=logits, labels=torch.arange(4)), "with logits"),
        (Evidence(features=logits, logits=logits), "with labels"),
    ]:
        with pytest.raises(Refused, match=message):
            NCE().score(e)
    for first, second in ((torch.arange(3), torch.arange(4)), (torch.arange(0), torch.arange(0))):
        with pytest.raises(Refused, match="one class of both kinds"):
            conditional_entropy(first, second)
