"""MI-FGSM: torchattacks' bits, closed forms on linear models, and budgets kept to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import MIFGSM
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(MIFGSM())
test_contract_l2 = contract(MIFGSM(radius=0.5, norm="l2"))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).eval()


def pictures(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def restated(model: nn.Module, x: Tensor, y: Tensor, radius: float, alpha: float, steps: int, decay: float) -> Tensor:
    """The loop of torchattacks 3.5.1 (MIT), line for line."""
    momentum, adv = torch.zeros_like(x), x.clone()
    for _ in range(steps):
        adv.requires_grad = True
        grad = torch.autograd.grad(nn.CrossEntropyLoss()(model(adv), y), adv)[0]
        grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
        grad = grad + momentum * decay
        momentum = grad
        adv = adv.detach() + alpha * grad.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, min=-radius, max=radius), min=0, max=1).detach()
    return adv


@pytest.mark.parametrize("decay", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("n", [1, 16])
def test_it_gives_torchattacks_bits(n, decay):
    model, (x, y) = model_of(), pictures(n)
    mine = MIFGSM(radius=8 / 255, step_size=2 / 255, decay=decay).perturb(x, [misclassify(model, y)])
    assert torch.equal(mine, restated(model, x, y, 8 / 255, 2 / 255, 10, decay))


@pytest.mark.parametrize("targeted", [False, True])
def test_it_gives_the_bits_of_the_installed_torchattacks(targeted):
    theirs = pytest.importorskip("torchattacks").MIFGSM(model_of(), eps=8 / 255, alpha=2 / 255, steps=10)
    (x, y), goal = pictures(), reach if targeted else misclassify
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    mine = MIFGSM(radius=8 / 255, step_size=2 / 255).perturb(x, [goal(model_of(), y)])
    assert torch.equal(mine, theirs(x, y))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_linear_model_is_taken_to_its_exact_worst_case(decay):
    weight = torch.randn(12, generator=torch.Generator().manual_seed(1))
    x = torch.full((3, 12), 0.5)
    found = MIFGSM(radius=0.1, decay=decay).perturb(x, [lambda a: a @ weight])
    assert torch.allclose(found, x + 0.1 * weight.sign(), atol=1e-7)
    found = MIFGSM(radius=0.1, decay=decay, norm="l2").perturb(x, [lambda a: a @ weight])
    assert torch.allclose(found, x + 0.1 * weight / weight.norm(), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.5), st.integers(0, 4), st.floats(0, 2), st.sampled_from(["linf", "l2"]), st.integers(0, 99))
def test_it_stays_in_the_ball_and_the_bounds(radius, steps, decay, norm, seed):
    model, (x, y) = model_of(), pictures(4, seed)
    found = MIFGSM(radius=radius, steps=steps, decay=decay, norm=norm).perturb(x, [misclassify(model, y)])
    assert found.min() >= 0
    assert found.max() <= 1
    away = (found - x).flatten(1)
    size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert size.max() <= radius + 1e-6
    assert not found.requires_grad
    if radius == 0 or steps == 0:
        assert torch.equal(found, x)


def test_a_batch_is_its_examples_one_by_one_and_a_twin_surrogate_changes_nothing():
    model, (x, y) = model_of().double(), pictures()
    x, attack = x.double(), MIFGSM()
    whole = attack.perturb(x, [misclassify(model, y)])
    single = [attack.perturb(x[i : i + 1], [misclassify(model, y[i : i + 1])]) for i in range(len(x))]
    assert torch.equal(whole, torch.cat(single))
    assert torch.equal(whole, attack.perturb(x, [misclassify(model, y)] * 2))


def test_the_surrogates_and_the_inputs_stay_as_they_were():
    model, (x, y) = model_of(), pictures()
    before, kept = x.clone(), [p.clone() for p in model.parameters()]
    MIFGSM(steps=2).perturb(x, [misclassify(model, y)])
    assert torch.equal(x, before)
    assert all(
        torch.equal(a, b) and b.requires_grad and b.grad is None for a, b in zip(kept, model.parameters(), strict=True)
    )


def test_the_loss_rises_and_the_targeted_class_comes_nearer():
    model, (x, y) = model_of(), pictures()
    for goal in (misclassify(model, y), reach(model, (y + 1) % 10)):
        assert (goal(MIFGSM().perturb(x, [goal])) > goal(x)).all()


def test_an_example_without_gradient_stays_where_it_is():
    x = torch.full((2, 3), 0.5)
    found = MIFGSM(radius=0.1).perturb(x, [lambda a: a[:, 0] * torch.tensor([0.0, 1.0])])
    assert torch.equal(found[0], x[0])
    assert found[1, 0] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"radius": -0.1}, "radius"),
        ({"radius": 8.0}, "255"),
        ({"radius": math.nan}, "radius"),
        ({"steps": -1}, "steps >= 0"),
        ({"step_size": 0.0}, "0 < step_size"),
        ({"step_size": 2.0}, "grey levels"),
        ({"decay": -1.0}, "decay >= 0"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(Refused, match=says):
        MIFGSM(**wrong)


@pytest.mark.parametrize(
    "x", [torch.zeros(0, 2), torch.full((1, 2), 1.5), torch.full((1, 2), math.nan), torch.ones(1, 2).int()]
)
def test_inputs_that_mean_nothing_are_refused(x):
    with pytest.raises(Refused):
        MIFGSM().perturb(x, [lambda a: a.sum(1)])


def test_no_goal_is_refused():
    with pytest.raises(Refused, match="at least one goal"):
        MIFGSM().perturb(torch.zeros(1, 2), [])
