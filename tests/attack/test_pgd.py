"""PGD: torchattacks' values from the same start, starts that belong to their example, closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import MIFGSM, PGD
from headstart.attack.draws import generators, noise
from headstart.core.ascent import Ball, misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

test_contract = contract(
    PGD(),
    refuses=[lambda: PGD(steps=-1), lambda: PGD(step_size=0.0), lambda: PGD(step_size=2.0), lambda: PGD(radius=8.0),
             lambda: PGD(step_size=math.nan), lambda: PGD(norm="l1")],
)  # fmt: skip
test_contract_l2 = contract(
    PGD(radius=0.5, norm="l2"),
    known_failures={"optimum_of_a_linear_model": "Ten steps of a quarter radius leave 0.8 ** 10 of the random start."},
)
test_contract_without_a_start = contract(PGD(random_start=False))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).double().eval()


def pictures(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator).double(), torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_torchattacks_from_the_same_starts(norm, targeted):
    attacks, (x, y) = pytest.importorskip("torchattacks"), pictures()
    radius, alpha = (8 / 255, 2 / 255) if norm == "linf" else (0.5, 0.1)
    theirs = (attacks.PGD if norm == "linf" else attacks.PGDL2)(model_of(), eps=radius, alpha=alpha, steps=10)
    if targeted:
        theirs.set_mode_targeted_by_label(quiet=True)
    mine = PGD(radius=radius, step_size=alpha, norm=norm, seed=3)
    moved = mine.perturb(x, [(reach if targeted else misclassify)(model_of(), y)])
    for k in range(len(x)):  # one by one, as their start depends on the batch
        with seeded(generators(3, k, 1)[0].initial_seed()):
            assert torch.allclose(moved[k : k + 1], theirs(x[k : k + 1], y[k : k + 1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_model_is_taken_to_its_worst_case_from_every_start(norm, dual):
    weight, x = torch.randn(12, generator=torch.Generator().manual_seed(1)).double(), torch.full((9, 12), 0.5).double()
    moved = PGD(radius=0.1, step_size=0.1, steps=40, norm=norm).perturb(x, [lambda a: a @ weight])
    assert torch.allclose((moved - x) @ weight, 0.1 * weight.norm(p=dual).expand(9), rtol=1e-9)


def test_without_a_start_it_is_torchattacks_bim_and_mifgsm_without_momentum():
    attacks, (x, y), model = pytest.importorskip("torchattacks"), pictures(), model_of()
    mine = PGD(step_size=2 / 255, random_start=False).perturb(x, [misclassify(model, y)])
    assert torch.allclose(mine, attacks.BIM(model, eps=8 / 255, alpha=2 / 255, steps=10)(x, y), rtol=0, atol=1e-12)
    plain = MIFGSM(radius=8 / 255, step_size=2 / 255, decay=0.0).perturb(x, [misclassify(model, y)])
    assert torch.equal(mine, plain)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batches_of_a_data_set_are_moved_as_the_whole_of_it(norm):
    model, (x, y) = model_of(), pictures()
    attack = PGD(radius=0.1, norm=norm, steps=3)
    whole = attack.perturb(x, [misclassify(model, y)])
    single = [replace(attack, first=k).perturb(x[k : k + 1], [misclassify(model, y[k : k + 1])]) for k in range(len(x))]
    assert torch.allclose(whole, torch.cat(single), rtol=0, atol=1e-12)
    assert not torch.allclose(whole[1:2], attack.perturb(x[1:2], [misclassify(model, y[1:2])]), rtol=0, atol=1e-3)


def test_the_start_follows_the_seed_and_is_all_there_is_without_steps():
    x = torch.full((2, 4), 0.5)
    one, same, other = (PGD(radius=0.1, steps=0, seed=seed).perturb(x, [lambda a: a.sum(1)]) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(PGD(steps=0, random_start=False).perturb(x, [lambda a: a.sum(1)]), x)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["linf", "l2"]), st.floats(0, 3), st.integers(0, 99), st.booleans())
def test_noise_keeps_its_size(radius, norm, times, seed, double):
    x = torch.zeros(3, 2, 5, 5, dtype=torch.float64 if double else torch.float32)
    found = noise(x, Ball(radius, norm), generators(seed, 0, 3), copies=2, times=times)
    assert found.shape == (2, *x.shape)
    assert found.dtype == x.dtype
    sizes = found.flatten(2).abs().amax(2) if norm == "linf" else found.flatten(2).norm(dim=2)
    assert float(sizes.max()) <= times * radius * (1 + 1e-6)


def test_noise_is_uniform():
    x = torch.zeros(1, 20_000)
    cube = noise(x, Ball(0.5), generators(0, 0, 1), copies=1)[0, 0]
    assert float(cube.mean()) == pytest.approx(0, abs=4 * 0.5 / math.sqrt(3 * 20_000))
    assert float(cube.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.02)
    lengths = noise(torch.zeros(5000, 3), Ball(0.5, "l2"), generators(0, 0, 5000), copies=1)[0].norm(dim=1)
    assert torch.allclose(lengths.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.05, 0.25, 0.45]), atol=0.015)


def test_no_two_of_a_million_examples_share_a_generator():
    seeds = {(0x9E3779B1 * 5 + 0x85EBCA77 * k) % 2**32 for k in range(10**6)}
    assert len(seeds) == 10**6
    assert {g.initial_seed() for g in generators(5, 0, 100)} < seeds


def test_inputs_that_mean_nothing_are_refused_before_starts_are_drawn():
    for x in (torch.zeros(0, 2), torch.full((1, 2), 1.5), torch.tensor(0.5), torch.ones(1, 2).int()):
        with pytest.raises(Refused):
            PGD().perturb(x, [lambda a: a.sum(1)])


def test_an_l2_ball_wider_than_one_is_torchattacks_too():
    attacks, (x, y), model, radius = pytest.importorskip("torchattacks"), pictures(), model_of(), 3.0
    theirs = attacks.PGDL2(model, eps=radius, alpha=radius / 5, steps=10, random_start=False)(x, y)
    mine = PGD(radius=radius, step_size=radius / 5, norm="l2", random_start=False).perturb(x, [misclassify(model, y)])
    assert float((theirs - x).flatten(1).norm(dim=1).min()) > 0.3 * radius
    assert torch.allclose(mine, theirs, atol=1e-5)
