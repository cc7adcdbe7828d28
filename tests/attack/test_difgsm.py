"""DI-FGSM: torchattacks' values for its draws, resizing as torch does it, draws that belong to their example."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import DIFGSM, MIFGSM
from headstart.attack.difgsm import resized
from headstart.attack.draws import generators
from headstart.core.ascent import misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

TRANSFORMED = {"optimum_of_a_linear_model": "It follows the gradient seen through random places, by design."}

test_contract = contract(
    DIFGSM(rate=0.75),
    known_failures=TRANSFORMED,
    refuses=[lambda: DIFGSM(rate=1.0), lambda: DIFGSM(rate=0.0), lambda: DIFGSM(rate=math.nan),
             lambda: DIFGSM(probability=1.5), lambda: DIFGSM(steps=-1), lambda: DIFGSM(decay=-1.0)],
)  # fmt: skip
test_contract_larger = contract(DIFGSM(rate=1.5, probability=1.0), known_failures=TRANSFORMED)
test_contract_l2 = contract(DIFGSM(radius=0.5, norm="l2", rate=0.75), known_failures=TRANSFORMED)


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 144, 10)).double().eval()


def pictures(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 14, 14, generator=generator).double(), torch.randint(10, (n,), generator=generator)


def replayed(uniforms: Iterator[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's draws become those numbers, in the order of torchattacks: size, top, left, whether at all."""

    def randint(low: int, high: int, **_: object) -> Tensor:
        return torch.tensor([low + int(next(uniforms) * (high - low))], dtype=torch.int32)

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(torch, "rand", lambda _: torch.tensor([next(uniforms)], dtype=torch.float64))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.0])
@pytest.mark.parametrize("rate", [0.6, 0.9])
def test_it_is_torchattacks_with_the_same_draws(monkeypatch, rate, decay, targeted):
    (x, y), model = pictures(), model_of()
    theirs = pytest.importorskip("torchattacks").DIFGSM(
        model, eps=8 / 255, alpha=2 / 255, steps=10, decay=decay, resize_rate=rate, diversity_prob=0.5
    )
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    attack = DIFGSM(radius=8 / 255, step_size=2 / 255, decay=decay, rate=rate, seed=4)
    moved = attack.perturb(x, [(reach if targeted else misclassify)(model, y)])
    draws = [torch.rand(10, 4, generator=g, dtype=torch.float64).flatten().tolist() for g in generators(4, 0, len(x))]
    for k in range(len(x)):
        with monkeypatch.context() as patch:
            replayed(iter(draws[k]), patch)
            expected = theirs(x[k : k + 1], y[k : k + 1])
        assert torch.allclose(moved[k : k + 1], expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(0.1, 2.0), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_resizing_is_torch_interpolate_and_pad(side, rate, size, place):
    low, high = sorted((side, int(rate * side)))
    if low == high or low == 0:
        return
    x = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(side)).double()
    length = low + int(size * (high - low))
    offset = int(place * (high - length))
    slow = F.interpolate(x, size=[length, length], mode="bilinear", align_corners=False)
    slow = F.pad(slow, [offset, high - length - offset] * 2)
    if rate > 1:
        slow = F.interpolate(slow, size=[side, side], mode="bilinear", align_corners=False)
    matrix = resized(side, rate, torch.tensor([size]).double(), torch.tensor([place]).double())
    assert torch.allclose(matrix @ x[0] @ matrix.mT, slow[0], rtol=0, atol=1e-12)


def test_draws_next_to_one_stay_inside():
    almost = torch.tensor([1 - 2.0**-53, 0.0]).double()
    for side, rate in ((224, 0.5), (8, 0.75), (9, 1.5)):
        assert resized(side, rate, almost, almost).isfinite().all()


def test_never_resized_is_mifgsm():
    (x, y), model = pictures(), model_of()
    mine = DIFGSM(probability=0.0).perturb(x, [misclassify(model, y)])
    assert torch.equal(mine, MIFGSM().perturb(x, [misclassify(model, y)]))


def test_the_gradient_is_that_through_the_resized_picture():
    (x, y), model = pictures(), model_of()
    x = 0.2 + 0.6 * x
    moved = DIFGSM(radius=0.1, steps=1, norm="l2", probability=1.0).perturb(x, [misclassify(model, y)])
    u = torch.stack([torch.rand(1, 4, generator=g, dtype=torch.float64)[0] for g in generators(0, 0, len(x))])
    matrices = [resized(14, 0.9, u[:, 0], u[:, k])[:, None] for k in (1, 2)]
    point = x.clone().requires_grad_()
    slow = torch.autograd.grad(misclassify(model, y)(matrices[0] @ point @ matrices[1].mT).sum(), point)[0]
    direction = slow / slow.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(moved - x, 0.1 * direction, rtol=0, atol=1e-9)


def test_batches_of_a_data_set_are_moved_as_the_whole_of_it_and_seeds_differ():
    (x, y), model, attack = pictures(), model_of(), DIFGSM(radius=0.1)
    whole = attack.perturb(x, [misclassify(model, y)])
    single = [replace(attack, first=k).perturb(x[k : k + 1], [misclassify(model, y[k : k + 1])]) for k in range(len(x))]
    assert torch.allclose(whole, torch.cat(single), rtol=0, atol=1e-12)
    assert not torch.equal(whole, replace(attack, seed=1).perturb(x, [misclassify(model, y)]))


def test_pictures_keep_their_shape():
    x = torch.rand(2, 1, 12, 20)
    assert DIFGSM(rate=1.5).perturb(x, [lambda a: a.flatten(1).sum(1)]).shape == x.shape


@pytest.mark.parametrize(
    ("shape", "rate"), [((1, 1, 8, 8), 1.1), ((1, 1, 20, 8), 1.1), ((1, 1, 2, 2), 0.4), ((1, 64), 0.9)]
)
def test_pictures_that_the_rate_leaves_as_they_are_and_rows_are_refused(shape, rate):
    with pytest.raises(Refused, match="DIFGSM needs"):
        DIFGSM(rate=rate).perturb(torch.full(shape, 0.5), [lambda a: a.flatten(1).sum(1)])
