"""SI-FGSM: torchattacks' SI-NI-FGSM, one scale is MI or NI, copies by hand, whatever shares a pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headstart.attack import MIFGSM, NIFGSM, SIFGSM
from headstart.core.ascent import goal_gradient, misclassify, reach
from headstart.core.rng import seeded
from headstart.testing import contract

test_contract = contract(
    SIFGSM(),
    refuses=[lambda: SIFGSM(scales=0), lambda: SIFGSM(at_once=0), lambda: SIFGSM(steps=-1), lambda: SIFGSM(decay=-1.0)],
)
test_contract_look_ahead = contract(SIFGSM(look_ahead=True, at_once=2))
test_contract_l2 = contract(SIFGSM(radius=0.5, norm="l2"))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).double().eval()


def pictures(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator).double(), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_with_a_look_ahead_it_is_torchattacks_sinifgsm(at_once, targeted):
    theirs = pytest.importorskip("torchattacks").SINIFGSM(model_of(), eps=8 / 255, alpha=2 / 255, steps=10)
    (x, y), goal = pictures(), reach if targeted else misclassify
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    attack = SIFGSM(radius=8 / 255, step_size=2 / 255, look_ahead=True, at_once=at_once)
    assert torch.allclose(attack.perturb(x, [goal(model_of(), y)]), theirs(x, y), rtol=0, atol=1e-12)


def test_one_by_one_it_gives_torchattacks_bits_in_float32():
    (x, y), model = pictures(), model_of().float()
    theirs = pytest.importorskip("torchattacks").SINIFGSM(model, eps=8 / 255, alpha=2 / 255, steps=10)
    attack = SIFGSM(radius=8 / 255, step_size=2 / 255, look_ahead=True, at_once=1)
    assert torch.equal(attack.perturb(x.float(), [misclassify(model, y)]), theirs(x.float(), y))


def test_one_scale_is_mifgsm_or_nifgsm():
    (x, y), model = pictures(), model_of()
    for ahead, plain in ((False, MIFGSM), (True, NIFGSM)):
        mine = SIFGSM(scales=1, look_ahead=ahead).perturb(x, [misclassify(model, y)])
        assert torch.equal(mine, plain().perturb(x, [misclassify(model, y)]))


def test_the_first_step_follows_the_mean_over_darker_copies():
    (x, y), model = pictures(), model_of()
    x = 0.2 + 0.6 * x
    slow = sum(goal_gradient([lambda a, k=k: misclassify(model, y)(a / 2**k)], x) for k in range(3)) / 3
    moved = SIFGSM(radius=0.1, steps=1, scales=3, norm="l2").perturb(x, [misclassify(model, y)])
    direction = slow / slow.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(moved - x, 0.1 * direction, rtol=0, atol=1e-9)


def test_goals_of_any_kind_are_asked_copy_by_copy():
    """A goal with a number of its own for each example cannot be asked for copies together."""
    x, own = torch.full((3, 2), 0.5), torch.tensor([1.0, -1.0, 0.0])
    moved = SIFGSM(radius=0.1).perturb(x, [lambda a: own * a[:, 0]])
    assert torch.allclose(moved, torch.tensor([[0.6, 0.5], [0.4, 0.5], [0.5, 0.5]]))
