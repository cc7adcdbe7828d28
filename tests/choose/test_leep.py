"""LEEP: the card's known answers and the definition written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.choose import LEEP
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract


def published(p: np.ndarray, labels: np.ndarray) -> float:
    """The n x c matrix of expected predictions, and a loop over the examples to read their own labels from it."""
    classes, y = np.unique(labels, return_inverse=True)
    share = p / len(p)
    joint = np.stack([share[y == c].sum(0) for c in range(len(classes))])
    mass = joint.sum(0)
    matrix = p @ np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0).T
    return float(np.mean(np.log([row[label] for row, label in zip(matrix, y, strict=True)])))


def reference(evidence: Evidence) -> float:
    logits, labels = evidence.need("logits", "labels")
    return published(logits.double().softmax(1).numpy(), labels.numpy())


test_contract = contract(LEEP(), invariant=("rotation", "scale", "shift", "zero columns"), reference=reference)


def score(p: torch.Tensor, labels: torch.Tensor) -> float:
    logits = p.double().log().clamp(min=-1e4)
    return LEEP().score(Evidence(features=torch.zeros(len(p), 1), logits=logits, labels=labels))


def sample(n: int = 40, sources: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (n,), generator=g)
    return (torch.randn(n, sources, generator=g).double() + labels[:, None]).softmax(1), labels


def test_equals_the_definition():
    p, labels = sample()
    joint = [[sum(float(p[i, s]) for i in range(40) if labels[i] == y) / 40 for s in range(5)] for y in range(3)]
    mass = [sum(joint[y][s] for y in range(3)) for s in range(5)]
    total = sum(math.log(sum(float(p[i, s]) * joint[labels[i]][s] / mass[s] for s in range(5))) for i in range(40))
    assert score(p, labels) == pytest.approx(total / 40, abs=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 3000.0], ids=["flat", "plain", "sure", "with empty source classes"])
@pytest.mark.parametrize(
    ("n", "sources", "shares"),
    [(400, 7, (0.4, 0.3, 0.3)), (30, 900, (0.4, 0.3, 0.3)), (5000, 11, (0.98, 0.015, 0.005)), (3, 20_000, (1, 1, 1))],
    ids=["random", "few examples", "imbalanced, in several parts", "more source classes than a part holds"],
)
def test_equals_the_published_matrix(n, sources, shares, spread):
    g = torch.Generator().manual_seed(3)
    labels = torch.multinomial(torch.tensor(shares, dtype=torch.float64), n, replacement=True, generator=g)
    labels[:3] = torch.arange(3)
    known = torch.randn(3, sources, generator=g, dtype=torch.float64)[labels]
    logits = spread * (known + torch.randn(n, sources, generator=g, dtype=torch.float64))
    evidence = Evidence(features=logits[:, :1], logits=logits, labels=labels)
    assert LEEP().score(evidence) == pytest.approx(reference(evidence), rel=1e-9, abs=1e-14)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(2, 50), sources=st.integers(1, 9), seed=st.integers(0, 999), spread=st.sampled_from([0.0, 1.0, 50.0])
)
def test_it_lies_between_what_the_example_itself_counts_and_zero(n, sources, seed, spread):
    g = torch.Generator().manual_seed(seed)
    labels, logits = torch.arange(n) % 3, spread * torch.randn(n, sources, generator=g)
    value = LEEP().score(Evidence(features=logits, logits=logits, labels=labels))
    assert -math.log(n * sources**2) - 1e-12 <= value <= 1e-12


def test_1_certain_predictions_give_the_negative_conditional_entropy():
    _, labels = sample()
    z = torch.arange(40) % 4
    joint = torch.zeros(3, 4).index_put_((labels, z), torch.ones(40), accumulate=True).double() / 40
    nce = sum(float(j) * math.log(j / m) for row in joint for j, m in zip(row, joint.sum(0), strict=True) if j > 0)
    assert score(torch.nn.functional.one_hot(z, 6), labels) == pytest.approx(nce, abs=1e-12)


def test_1_constant_rows_give_the_entropy_of_the_labels_and_the_labels_themselves_zero():
    _, labels = sample()
    share = torch.bincount(labels).double() / 40
    assert score(torch.full((40, 4), 0.25), labels) == pytest.approx(float((share * share.log()).sum()), abs=1e-12)
    assert score(torch.nn.functional.one_hot(labels), labels) == 0


def test_1_permuting_or_splitting_source_classes_changes_nothing():
    p, labels = sample()
    split = torch.cat([p[:, [3, 1, 0, 2]], 0.3 * p[:, 4:], 0.7 * p[:, 4:]], 1)
    assert score(split, labels) == pytest.approx(score(p, labels), abs=1e-12)


def test_1_is_at_least_nce_plus_the_mean_log_confidence():
    p, labels = sample()
    confidence, z = p.max(1)
    assert score(p, labels) >= score(torch.nn.functional.one_hot(z, 5), labels) + float(confidence.log().mean())


def test_refuses_a_model_without_classes_of_its_own():
    with pytest.raises(Refused, match="needs evidence with logits"):
        LEEP().score(Evidence(features=torch.zeros(4, 2), labels=torch.tensor([0, 1, 0, 1])))
