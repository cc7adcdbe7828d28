"""NI-FGSM: torchattacks' bits, the look-ahead by hand, closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headstart.attack import MIFGSM, NIFGSM
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.testing import contract

test_contract = contract(
    NIFGSM(), refuses=[lambda: NIFGSM(steps=-1), lambda: NIFGSM(step_size=0.0), lambda: NIFGSM(decay=-1.0)]
)
test_contract_l2 = contract(NIFGSM(radius=0.5, norm="l2"))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).eval()


def pictures(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_it_gives_the_bits_of_the_installed_torchattacks(decay, targeted):
    theirs = pytest.importorskip("torchattacks").NIFGSM(model_of(), eps=8 / 255, alpha=2 / 255, steps=10, decay=decay)
    (x, y), goal = pictures(), reach if targeted else misclassify
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    mine = NIFGSM(radius=8 / 255, step_size=2 / 255, decay=decay).perturb(x, [goal(model_of(), y)])
    assert torch.equal(mine, theirs(x, y))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_momentum_there_is_nothing_ahead(norm):
    model, (x, y) = model_of(), pictures()
    mine, plain = (
        kind(radius=0.1, decay=0.0, norm=norm).perturb(x, [misclassify(model, y)]) for kind in (NIFGSM, MIFGSM)
    )
    assert torch.equal(mine, plain)


@pytest.mark.parametrize(("norm", "divisor"), [("linf", 1.0), ("l2", 2.0)])
def test_the_point_ahead_by_hand(norm, divisor):
    """The gradient (1, 1, 1, 1) makes g = 1, so the second look is step_size · decay beyond the first step."""
    asked: list[Tensor] = []

    def goal(a: Tensor) -> Tensor:
        asked.append(a.detach().clone())
        return a.sum(1)

    NIFGSM(radius=0.4, steps=2, step_size=0.1, decay=0.5, norm=norm).perturb(torch.full((1, 4), 0.5), [goal])
    step = 0.1 / divisor  # a step of length 0.1 in four dimensions
    assert torch.allclose(asked[0], torch.full((1, 4), 0.5))
    assert torch.allclose(asked[1], torch.full((1, 4), 0.5 + step + 0.05 / divisor))


def test_it_brakes_before_the_summit():
    """On -(a - 0.54)² momentum runs past the summit; looking ahead turns earlier."""
    x, far = torch.full((1, 1), 0.5).double(), {}
    for kind in (MIFGSM, NIFGSM):
        path: list[float] = []
        attack = kind(radius=0.4, steps=5, step_size=0.02)
        summit = lambda a, path=path: -((path.append(float(a.detach().sum())), a - 0.54)[1] ** 2).sum(1)  # noqa: E731
        attack.perturb(x, [summit])
        far[kind] = float(attack.perturb(x, [lambda a: -((a - 0.54) ** 2).sum(1)]))
    assert abs(far[NIFGSM] - 0.54) < abs(far[MIFGSM] - 0.54)
