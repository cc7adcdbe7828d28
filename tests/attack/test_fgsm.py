"""FGSM: torchattacks' values, and the exact worst case of linear models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from headstart.attack import FGSM, MIFGSM
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.testing import contract

test_contract = contract(
    FGSM(), refuses=[lambda: FGSM(norm="l1"), lambda: FGSM(radius=8.0), lambda: FGSM(radius=math.nan)]
)
test_contract_l2 = contract(FGSM(radius=0.5, norm="l2"))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).eval()


def pictures(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_torchattacks_to_the_last_place(targeted):
    theirs = pytest.importorskip("torchattacks").FGSM(model_of(), eps=8 / 255)
    (x, y), goal = pictures(), reach if targeted else misclassify
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    mine = FGSM(radius=8 / 255).perturb(x, [goal(model_of(), y)])
    assert torch.allclose(mine, theirs(x, y), rtol=0, atol=2**-23)  # (x + r) - x rounds once more


def test_a_two_class_linear_model_is_taken_to_its_worst_case():
    """min over the ball of the margin: w·x - r |w|₁, or - r |w|₂."""
    weight = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    model = nn.Linear(12, 2, bias=False).double()
    model.weight.data = torch.stack([weight, torch.zeros_like(weight)])
    x, y = torch.full((3, 12), 0.5).double(), torch.zeros(3).long()
    for norm, dual in (("linf", 1), ("l2", 2)):
        moved = FGSM(radius=0.1, norm=norm).perturb(x, [misclassify(model, y)])
        worst = x @ weight - 0.1 * weight.norm(p=dual)
        assert torch.allclose(moved @ weight, worst, atol=1e-12)


def test_it_is_the_iterative_attack_of_one_step():
    model, (x, y) = model_of(), pictures()
    for norm in ("linf", "l2"):
        mine = FGSM(radius=0.1, norm=norm).perturb(x, [misclassify(model, y)])
        assert torch.equal(mine, MIFGSM(radius=0.1, steps=1, norm=norm).perturb(x, [misclassify(model, y)]))
