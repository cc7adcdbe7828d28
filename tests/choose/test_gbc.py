"""GBC: the card's known answers and the definition pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.choose import GBC
from headstart.core.evidence import Evidence
from headstart.core.statistics import ClassStatistics
from headstart.core.validate import Refused
from headstart.testing import contract


def streamed(pieces: list[Evidence], method: GBC) -> float:
    return method.score_from(ClassStatistics.stream((p.need("features", "labels") for p in pieces), 9))


test_contract = contract(
    GBC(),
    invariant=("rotation", "shift"),
    streamed=lambda pieces: streamed(pieces, GBC()),
    refuses=[lambda: GBC(floor=0), lambda: GBC(covariance="full")],  # type: ignore[arg-type]
)
DIAGONAL = GBC(covariance="diagonal")
test_contract_diagonal = contract(DIAGONAL, invariant=("shift",), streamed=lambda pieces: streamed(pieces, DIAGONAL))


def score(features: torch.Tensor, labels: torch.Tensor, **settings) -> float:
    return GBC(**settings).score(Evidence(features=features, labels=labels))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_4_identical_classes_overlap_fully(classes):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).repeat(classes, 1)
    assert score(features, torch.arange(classes).repeat_interleave(6)) == pytest.approx(-classes * (classes - 1))


@pytest.mark.parametrize("d", [0.5, 2.0, 5.0])
def test_4_two_unit_spheres_at_a_distance(d):
    unit = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # variance 1 in each dimension
    features = torch.cat([unit, unit + torch.tensor([d, 0.0])])
    assert score(features, torch.arange(2).repeat_interleave(4)) == pytest.approx(-2 * math.exp(-(d**2) / 8))


@pytest.mark.parametrize("dims", [1, 3, 40])
def test_equals_the_definition_pair_by_pair(dims):
    g = torch.Generator().manual_seed(dims)
    labels = torch.arange(30) % 3
    features = torch.randn(30, dims, generator=g).double() * (1 + 0.3 * labels[:, None]) + 0.2 * labels[:, None]
    total = 0.0
    for i in range(3):
        for j in range(3):
            a, b = features[labels == i], features[labels == j]
            va, vb = (float(x.var(0, correction=0).mean()) for x in (a, b))
            v = (va + vb) / 2
            distance = float((a.mean(0) - b.mean(0)).square().sum()) / v / 8
            distance += 0.5 * sum(math.log(v) - 0.5 * math.log(va) - 0.5 * math.log(vb) for _ in range(dims))
            total -= math.exp(-distance) if i != j else 0
    assert score(features, labels) == pytest.approx(total, abs=1e-10)


def test_diagonal_equals_torchs_normals_pair_by_pair():
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(30) % 3
    features = torch.randn(30, 4, generator=g).double() * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 0.2 * labels[:, None]
    x = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    total = 0.0
    for i in range(3):
        for j in range(3):
            overlap = 1.0
            for k in range(4):  # the Bhattacharyya coefficient is the integral of sqrt(p q)
                p, q = (
                    torch.distributions.Normal(v[:, k].mean(), v[:, k].std(correction=0)).log_prob(x)
                    for v in (features[labels == i], features[labels == j])
                )
                overlap *= float(torch.trapezoid(((p + q) / 2).exp(), x))
            total -= overlap if i != j else 0
    assert score(features, labels, covariance="diagonal") == pytest.approx(total, rel=1e-8)


def test_the_floor_holds_where_a_class_has_no_spread():
    features, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    assert score(features, labels, floor=0.25) == pytest.approx(-2 * math.exp(-1 / 0.25 / 8))
    with pytest.raises(Refused, match="floor > 0"):
        GBC(floor=0)
