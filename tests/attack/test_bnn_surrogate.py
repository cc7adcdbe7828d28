"""The light attack: one surrogate is the plain attack, the order is one shuffle; sound samples; T-DEE."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import MIFGSM, BNNSurrogate, fused
from headstart.attack.bnn_surrogate import deep_ensemble_equivalent, sound
from headstart.core.ascent import misclassify
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(
    BNNSurrogate(),
    refuses=[lambda: BNNSurrogate(steps=-1), lambda: BNNSurrogate(step_size=0.0), lambda: BNNSurrogate(per_step=0),
             lambda: BNNSurrogate(decay=-1.0), lambda: BNNSurrogate(norm="l1")],
)  # fmt: skip
test_contract_l2 = contract(BNNSurrogate(radius=0.5, norm="l2", per_step=2, decay=0.9))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).eval()


def pictures(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_one_sample_is_the_plain_attack_and_so_are_identical_ones_all_at_once(norm, decay):
    model, (x, y) = model_of(), pictures()
    plain = MIFGSM(radius=0.1, steps=12, step_size=0.01, decay=decay, norm=norm)
    expected = plain.perturb(x, [misclassify(model, y)])
    light = BNNSurrogate(radius=0.1, steps=12, decay=decay, norm=norm)
    assert torch.equal(light.perturb(x, [misclassify(model, y)]), expected)
    assert torch.equal(light.perturb(x, [misclassify(model, y)] * 5), expected)
    assert torch.allclose(light.perturb(x, [fused([model] * 4, y)]), expected, atol=1e-6)


def looked_at(attack: BNNSurrogate, goals: int) -> list[int]:
    """Which goal is asked at each step, in order."""
    asked: list[int] = []

    def goal(k: int, x: Tensor) -> Tensor:
        asked.append(k)
        return x.flatten(1).sum(1)

    attack.perturb(torch.full((1, 2), 0.5), [lambda x, k=k: goal(k, x) for k in range(goals)])
    return asked


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 20), st.integers(1, 9), st.integers(0, 99))
def test_samples_take_turns_in_one_shuffled_order(goals, steps, per_step, seed):
    asked = looked_at(BNNSurrogate(steps=steps, per_step=per_step, seed=seed), goals)
    width = min(per_step, goals)
    assert len(asked) == steps * width
    order = torch.randperm(goals, generator=torch.Generator().manual_seed(seed)).tolist()
    assert asked == (order * len(asked))[: len(asked)]


def test_other_seeds_give_other_orders_and_one_step_sees_one_sample():
    orders = {tuple(looked_at(BNNSurrogate(steps=6, seed=seed), 6)) for seed in range(10)}
    assert len(orders) > 5
    assert all(sorted(order) == list(range(6)) for order in orders)
    (model, other), (x, y) = (model_of(0), model_of(1)), pictures()
    first = looked_at(BNNSurrogate(steps=1), 2)[0]
    alone = BNNSurrogate(steps=1).perturb(x, [misclassify((model, other)[first], y)])
    assert torch.equal(BNNSurrogate(steps=1).perturb(x, [misclassify(m, y) for m in (model, other)]), alone)


def test_all_samples_a_step_average_the_losses():
    models, (x, y) = [model_of(k) for k in range(3)], pictures()
    mine = BNNSurrogate(radius=0.1, steps=5, per_step=9).perturb(x, [misclassify(m, y) for m in models])
    plain = MIFGSM(radius=0.1, steps=5, step_size=0.01, decay=0.0).perturb(x, [fused(models, y, by="loss")])
    assert torch.allclose(mine, plain, atol=1e-6)


def test_the_l2_step_is_of_its_size_and_no_steps_stay():
    x = torch.full((2, 4), 0.5)
    goal = lambda a: a @ torch.tensor([3.0, 0, 4, 0])  # noqa: E731
    moved = BNNSurrogate(radius=0.2, steps=1, norm="l2").perturb(x, [goal])
    assert torch.allclose(moved - x, 0.02 * torch.tensor([0.6, 0, 0.8, 0]), atol=1e-6)
    assert torch.equal(BNNSurrogate(steps=0).perturb(x, [goal]), x)


def says(classes: list[int]) -> nn.Module:
    """A model that names `classes` for the rows of the unit matrix."""
    model = nn.Linear(len(classes), 10, bias=False)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight[torch.tensor(classes), torch.arange(len(classes))] = 1.0
    return model


def test_samples_without_skill_are_dropped():
    x, y = torch.eye(10), torch.arange(10)
    perfect, nine, seven = says(list(range(10))), says([*range(9), 0]), says([*range(7), 0, 0, 0])
    assert sound([perfect, nine, seven], x, y) == [perfect, nine]
    assert sound([nine, seven], x, y, share=0.7) == [nine, seven]
    assert sound([nine, seven], x, y) == [nine]
    with pytest.raises(Refused, match="most frequent class"):
        sound([says([3] * 10)], x, y)


@pytest.mark.parametrize(
    ("models", "n", "share"),
    [([], 2, 0.8), ([says([0, 1])], 1, 0.8), ([says([0, 1])], 2, 1.5), ([says([0, 1])], 2, math.nan)],
)
def test_samples_that_cannot_be_judged_are_refused(models, n, share):
    with pytest.raises(Refused):
        sound(models, torch.eye(2)[:n], torch.arange(2), share=share)


def test_the_equivalent_ensemble():
    ensembles = {1: 0.579, 2: 0.751, 5: 0.933, 15: 0.985}  # the paper's, ResNet-50 in the norm linf
    assert [deep_ensemble_equivalent(rate, ensembles) for rate in ensembles.values()] == [1, 2, 5, 15]
    assert deep_ensemble_equivalent((0.751 + 0.933) / 2, ensembles) == pytest.approx(3.5)
    assert 4 < deep_ensemble_equivalent(0.908, ensembles) < 5  # cSGLD: "about 4-5 networks"
    assert deep_ensemble_equivalent(0.986, ensembles) == math.inf
    assert deep_ensemble_equivalent(0.0, ensembles) == 0
    assert deep_ensemble_equivalent(0.579 / 2, ensembles) == pytest.approx(0.5)
    assert deep_ensemble_equivalent(0.6, {1: 0.6, 2: 0.5}) == 1  # a larger ensemble that fools less


@pytest.mark.parametrize(("rate", "ensembles"), [(0.5, {}), (0.5, {0: 0.1}), (90.0, {1: 0.5}), (math.nan, {1: 0.5})])
def test_rates_that_mean_nothing_are_refused(rate, ensembles):
    with pytest.raises(Refused):
        deep_ensemble_equivalent(rate, ensembles)
