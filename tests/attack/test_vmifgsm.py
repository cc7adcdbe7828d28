"""VMI- and VNI-FGSM: torchattacks' values for its draws, MI and NI at beta 0, whatever shares a pass."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from headstart.attack import MIFGSM, NIFGSM, VMIFGSM
from headstart.attack.draws import generators
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.testing import contract

test_contract = contract(
    VMIFGSM(neighbours=4),
    refuses=[lambda: VMIFGSM(neighbours=0), lambda: VMIFGSM(beta=-1.0), lambda: VMIFGSM(beta=math.nan),
             lambda: VMIFGSM(at_once=0), lambda: VMIFGSM(steps=-1), lambda: VMIFGSM(decay=-1.0)],
)  # fmt: skip
test_contract_look_ahead = contract(VMIFGSM(neighbours=3, look_ahead=True, at_once=2))
test_contract_l2 = contract(VMIFGSM(radius=0.5, norm="l2", neighbours=3))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).double().eval()


def pictures(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator).double(), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("at_once", [None, 1, 4])
def test_it_is_torchattacks_with_the_same_draws(monkeypatch, at_once, look_ahead, targeted):
    attacks, (x, y), model = pytest.importorskip("torchattacks"), pictures(), model_of()
    theirs = (attacks.VNIFGSM if look_ahead else attacks.VMIFGSM)(model, eps=8 / 255, alpha=2 / 255, steps=10, N=5)
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    attack = VMIFGSM(radius=8 / 255, step_size=2 / 255, neighbours=5, look_ahead=look_ahead, at_once=at_once, seed=2)
    moved = attack.perturb(x, [(reach if targeted else misclassify)(model, y)])
    monkeypatch.setattr(torch, "randn_like", torch.empty_like)  # normal numbers they draw and overwrite
    for k in range(len(x)):
        with seeded(generators(2, k, 1)[0].initial_seed()):
            expected = theirs(x[k : k + 1], y[k : k + 1])
        assert torch.allclose(moved[k : k + 1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("look_ahead", "plain"), [(False, MIFGSM), (True, NIFGSM)])
def test_neighbours_in_the_same_place_change_nothing(look_ahead, plain, norm):
    """v = ∇ - ∇ = 0; VNI's neighbours lie around the point, so only its first two steps have v = 0."""
    (x, y), model = pictures(), model_of()
    steps = 2 if look_ahead else 10
    mine = VMIFGSM(beta=0.0, neighbours=2, look_ahead=look_ahead, norm=norm, steps=steps)
    expected = plain(norm=norm, steps=steps).perturb(x, [misclassify(model, y)])
    assert torch.allclose(mine.perturb(x, [misclassify(model, y)]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_linear_model_has_no_variance(look_ahead, norm, dual):
    weight, x = torch.randn(12, generator=torch.Generator().manual_seed(1)).double(), torch.full((3, 12), 0.5).double()
    moved = VMIFGSM(radius=0.1, norm=norm, look_ahead=look_ahead).perturb(x, [lambda a: a @ weight])
    assert torch.allclose((moved - x) @ weight, 0.1 * weight.norm(p=dual).expand(3), rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batches_of_a_data_set_are_moved_as_the_whole_of_it_and_seeds_differ(norm):
    (x, y), model, attack = pictures(), model_of(), VMIFGSM(radius=0.1, neighbours=3, norm=norm)
    whole = attack.perturb(x, [misclassify(model, y)])
    single = [replace(attack, first=k).perturb(x[k : k + 1], [misclassify(model, y[k : k + 1])]) for k in range(len(x))]
    assert torch.allclose(whole, torch.cat(single), rtol=0, atol=1e-9)
    assert not torch.equal(whole, replace(attack, seed=1).perturb(x, [misclassify(model, y)]))


@pytest.mark.parametrize("at_once", [None, 2])
def test_passes_are_counted(at_once):
    """(neighbours + 1) points a step, one in the last, whose neighbours nobody would use."""
    (x, y), model, seen = pictures(4), model_of(), []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    VMIFGSM(steps=3, neighbours=4, at_once=at_once).perturb(x, [misclassify(model, y)])
    assert seen == ([20, 20, 4] if at_once is None else [8, 8, 4, 8, 8, 4, 4])
