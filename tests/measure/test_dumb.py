"""The DUMB study: cases, balance and pair counts of the card, rates that agree with the transfer matrix."""

from __future__ import annotations

import copy
from itertools import product
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from headstart.attack.pgd import PGD
from headstart.core.validate import Refused
from headstart.measure.balance import balanced
from headstart.measure.dumb import CASES, Condition, DumbStudy, case, dumb_study, unguided
from headstart.measure.transfer_matrix import perturbed, transfer_matrix
from headstart.testing.material import digits, trained

PAIRS = {"C1": 24, "C2": 72, "C3": 48, "C4": 144, "C5": 24, "C6": 72, "C7": 48, "C8": 144}
GRID = [Condition(*c) for c in product(("a", "b"), ("m", "n"), ("50/50", "20/80"))]


def linear(seed: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 64, generator=generator))
        model[1].bias.zero_()
    return model


def material(n: int = 40) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[:n], y[:n] % 2


TESTS = {"a": material(), "b": (1 - material()[0], material()[1])}
MODELS = {condition: linear(k) for k, condition in enumerate(GRID)}


def studied(perturbations, **settings) -> DumbStudy:
    return dumb_study(MODELS, TESTS, perturbations, **{"least_accuracy": 0, "least_counted": 0, **settings})


@pytest.mark.parametrize(("source", "architecture", "balance"), list(product((False, True), repeat=3)))
def test_the_case_is_a_binary_number(source: bool, architecture: bool, balance: bool) -> None:
    one = Condition("a", "m", "50/50")
    two = Condition("b" if source else "a", "n" if architecture else "m", "20/80" if balance else "50/50")
    assert case(one, two) == case(two, one) == f"C{1 + 4 * source + 2 * architecture + balance}"


def test_another_seed_is_no_white_box() -> None:
    one, two = Condition("a", "m", "50/50"), Condition("a", "m", "50/50", seed=1)
    assert (case(one, one), case(one, two)) == ("C1", "C1'")
    assert case(one, Condition("a", "m", "20/80", seed=1)) == "C2"


def test_pairs_of_the_papers_grid() -> None:
    grid = [Condition(*c) for c in product(("1", "2"), ("vgg", "alex", "res"), ("50", "40", "30", "20"))]
    found = [case(one, two) for one in grid for two in grid]
    assert {which: found.count(which) for which in PAIRS} == PAIRS
    assert len(found) == sum(PAIRS.values()) == 576


@pytest.mark.parametrize(("shares", "left"), [((50, 50), 3500), ((40, 60), 2333), ((30, 70), 1500), ((20, 80), 875)])
def test_balance_as_the_paper_counts(shares: tuple[int, int], left: int) -> None:
    labels = torch.arange(7000) % 2
    rows = balanced(labels, shares)
    assert torch.bincount(labels[rows]).tolist() == [left, 3500]
    first = (labels == 0).nonzero()[:left, 0]
    assert torch.equal(rows[labels[rows] == 0], first)


@pytest.mark.parametrize(("labels", "shares"), [([0, 1], (50,)), ([0, 1], (0, 1)), ([0, 1], (1, 2)), ([0, 1], ())])
def test_a_balance_that_does_not_fit_is_refused(labels: list[int], shares: tuple[int, ...]) -> None:
    with pytest.raises(Refused):
        balanced(torch.tensor(labels), shares)


def test_nothing_moved_fools_nobody_across_sources_either() -> None:
    study = studied({"zero": PGD(radius=0.0).perturb})
    assert len(study.pairs) == 64
    assert {pair.success for pair in study.pairs} == {0.0}
    assert study.success("zero") == dict.fromkeys(PAIRS, 0.0)


def test_the_victim_that_is_the_surrogate_is_the_white_box() -> None:
    study = studied({"pgd": PGD(radius=0.05).perturb})
    for pair in study.pairs:
        if pair.surrogate == pair.victim:
            x, y = TESTS[pair.surrogate.source]
            own = {"own": MODELS[pair.surrogate]}
            alone = transfer_matrix(perturbed(own, x, y, PGD(radius=0.05).perturb), own, x, y)
            assert pair.success == float(alone.success)
            assert pair.counted == int(alone.counted)
            assert pair.case == "C1"
    assert study.success("pgd")["C1"] > study.success("pgd")["C8"]


def test_what_asks_no_model_depends_on_the_victim_alone() -> None:
    study = studied({"inversion": unguided(lambda x: 1 - x)})
    rates = {}
    for pair in study.pairs:
        rates.setdefault((pair.surrogate.source, pair.victim), set()).add(pair.success)
    assert len(rates) == 16
    assert all(len(found) == 1 for found in rates.values())


def test_success_is_the_mean_over_classes_weighted_by_their_counts() -> None:
    for pair in studied({"pgd": PGD(radius=0.05).perturb}).pairs:
        assert sum(n for _, n in pair.by_class.values()) == pair.counted
        total = sum(rate * n for rate, n in pair.by_class.values())
        assert pair.success * pair.counted == pytest.approx(total, abs=1e-9)


def test_weak_victims_are_dropped_and_counted() -> None:
    study = studied({"pgd": PGD(radius=0.05).perturb}, least_accuracy=0.5, least_counted=15)
    for row in study.cases:
        asked = [pair for pair in study.pairs if pair.case == row.case]
        kept = [pair for pair in asked if pair.clean >= 0.5 and pair.counted >= 15]
        assert (row.pairs, row.dropped) == (len(kept), len(asked) - len(kept))
        assert row.success == pytest.approx(fmean(pair.success for pair in kept))
    assert sum(row.dropped for row in study.cases) > 0
    assert studied({"pgd": PGD(radius=0.05).perturb}, least_counted=41).cases == ()


def test_intervals_are_over_models() -> None:
    """One model of eight is always fooled: in a draw of eight it comes Binomial(8, 1/8) times, at 97.5 % three times."""
    y = torch.arange(20) % 2
    x = y[:, None].float().repeat(1, 2)

    class Reads(nn.Module):
        def __init__(self, column: int) -> None:
            super().__init__()
            self.column = column

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 - x[:, self.column], x[:, self.column]], 1)

    models = {c: Reads(0 if c == GRID[0] else 1) for c in GRID}
    flip = unguided(lambda x: torch.stack([1 - x[:, 0], x[:, 1]], 1))
    study = dumb_study(models, dict.fromkeys("ab", (x, y)), {"flip": flip}, resamples=4000)
    for row in study.cases:
        assert row.success == pytest.approx(1 / 8)  # each victim has as many surrogates in each case
    assert study.cases[0].interval == pytest.approx((0, 3 / 8))
    wider = [row.interval[1] for row in study.cases[1:]]  # pairs of two models vary more than eight pairs alone
    assert min(wider) > 3 / 8


def test_models_and_random_state_stay() -> None:
    model = copy.deepcopy(trained())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, y = digits()
    models = {Condition("d", "m", "1"): model, Condition("d", "m", "2"): trained()}
    study = dumb_study(models, {"d": (x[:40], y[:40])}, {"pgd": PGD(radius=0.1).perturb})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert study.success("pgd").keys() <= set(CASES)


def test_bad_input_is_refused() -> None:
    attack = {"pgd": PGD(radius=0.05).perturb}
    for models, tests, perturbations, settings in (
        ({GRID[0]: linear(0)}, TESTS, attack, {}), ({}, TESTS, attack, {}), (MODELS, {"a": TESTS["a"]}, attack, {}),
        (MODELS, TESTS, {}, {}), (MODELS, TESTS, attack, {"resamples": 0}),
        (MODELS, {**TESTS, "b": (TESTS["b"][0] * torch.nan, TESTS["b"][1])}, attack, {}),
    ):  # fmt: skip
        with pytest.raises(Refused):
            dumb_study(models, tests, perturbations, **settings)
