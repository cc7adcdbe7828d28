"""LEEP: the card's known answers and the definition written out."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.choose import LEEP
from headstart.core.evidence import Evidence
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(LEEP(), invariant=("rotation", "scale", "shift", "zero columns"))


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
