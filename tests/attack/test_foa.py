"""FOA: transport against POT and assignments, clusters against scikit-learn, gradients with frozen plans, own weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from headstart.attack import FOA, foa_loss, held_out, ot_similarity
from headstart.attack.alignment import Seen, see
from headstart.attack.clusters import cluster_means, coupling
from headstart.attack.crops import boxes, cropped
from headstart.attack.draws import generators
from headstart.attack.foa import LARGEST_GROWTH, member_weights
from headstart.core.ascent import misclassify
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import digits
from headstart.testing.subject import difference, snapshot


class Patches(nn.Module):
    """Pictures (n, 1, 8, 8): four rows of pixels are tokens, their mean the feature."""

    def __init__(self, width: int = 6, size: int = 16) -> None:
        super().__init__()
        self.size = size
        self.enter, self.leave = nn.Linear(size, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.leave(torch.tanh(6 * self.enter(x.reshape(len(x), -1, self.size) - 0.3)))
        return tokens.mean(1), tokens


def encoders(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ...]:
    with seeded(0):
        return tuple(m.to(dtype).eval() for m in (Patches(6, 16), Patches(9, 8)))


def attack(n: int = 8, dtype: torch.dtype = torch.float32, **settings) -> FOA:
    given = {"radius": 0.1, "steps": 6, "clusters": 3, "crop": None, **settings}
    return FOA(encoders=encoders(dtype), reference=digits()[0][100 : 100 + n].to(dtype), **given)


SHORT = FOA(radius=0.1, steps=20, crop=None)
test_contract = contract(
    SHORT,
    refuses=[lambda: FOA(clusters=0), lambda: FOA(local=-1.0), lambda: FOA(temperature=0.0), lambda: FOA(steps=-1),
             lambda: FOA(regularisation=0.0), lambda: FOA(crop=(0.0, 0.5)), lambda: FOA(crop=(0.9, 0.5)),
             lambda: FOA(crop=(0.5, 1.1)), lambda: FOA(normalise="tokens"), lambda: FOA(encoders=encoders()),
             lambda: FOA(reference=torch.zeros(1, 2)), lambda: FOA(norm="l1")],
)  # fmt: skip
test_contract_l2 = contract(replace(SHORT, radius=0.5, norm="l2"))
test_contract_with_crops = contract(
    replace(SHORT, crop=(0.5, 0.9)), known_failures={"optimum_of_a_linear_model": "steps see random parts of a picture"}
)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def exact(a: Tensor, b: Tensor, regularisation: float) -> Tensor:
    return ot_similarity(a, b, regularisation=regularisation, tolerance=1e-12, rounds=2000)


def test_orthogonal_rows_are_wholly_like_themselves_as_the_regularisation_vanishes():
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(coupling(eye, regularisation=0.01), eye / 5, atol=1e-12)
    assert float(ot_similarity(3 * eye, eye, regularisation=0.01)) == pytest.approx(1, abs=1e-12)
    share = math.exp(-10)
    assert float(ot_similarity(eye, eye)) == pytest.approx(1 / (1 + 4 * share), abs=1e-12)  # 1 - O(n e^-10)


@pytest.mark.parametrize("regularisation", [0.01, 0.1, 10.0])
def test_single_and_equal_rows_give_their_cosine(regularisation):
    a, b = rows(1, 7), rows(1, 7, seed=1)
    cosine = F.cosine_similarity(a, b)[0]
    one = ot_similarity(a, b, regularisation=regularisation)
    many = ot_similarity(a.expand(4, -1), b.expand(3, -1), regularisation=regularisation)
    assert torch.allclose(torch.stack([one, many]), cosine, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99), st.sampled_from([0.05, 0.1, 1.0]))
def test_order_and_lengths_of_rows_do_not_count_and_values_are_cosines(n, m, d, seed, regularisation):
    a, b = rows(n, d, seed=seed), rows(m, d, seed=seed + 100)
    value = ot_similarity(a, b, regularisation=regularisation)
    assert -1 - 1e-9 <= value <= 1 + 1e-9
    order, other = (torch.randperm(k, generator=Generator().manual_seed(seed)) for k in (n, m))
    scales = torch.rand(n, 1, generator=Generator().manual_seed(seed)).double() + 0.1
    assert torch.allclose(ot_similarity((a * scales)[order], b[other], regularisation=regularisation), value, atol=1e-9)
    plan = coupling(F.normalize(a) @ F.normalize(b).T, regularisation=regularisation)
    assert torch.allclose(plan.sum(0), torch.full((m,), 1 / m).double(), atol=1e-12)
    assert float(plan.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((plan >= 0).all())


@pytest.mark.parametrize("regularisation", [0.1, 0.3])
def test_the_arguments_may_change_places_and_rows_sum_as_nearly_as_asked(regularisation):
    a, b = rows(5, 8), rows(4, 8, seed=1)
    assert torch.allclose(exact(a, b, regularisation), exact(b, a, regularisation), atol=1e-9)
    assert float(ot_similarity(a, b)) == pytest.approx(float(ot_similarity(b, a)), abs=1e-2)
    plan = coupling(F.normalize(a) @ F.normalize(b).T, regularisation=regularisation, tolerance=1e-13, rounds=9999)
    assert torch.allclose(plan.sum(1), torch.full((5,), 0.2).double(), atol=1e-9)
    loose = coupling(F.normalize(a) @ F.normalize(b).T, regularisation=regularisation)
    assert float((loose.sum(1) - 0.2).abs().max()) < 1e-2


def test_much_regularisation_spreads_everything_evenly():
    a, b = rows(5, 8), rows(4, 8, seed=1)
    cosines = F.normalize(a) @ F.normalize(b).T
    assert torch.allclose(coupling(cosines, regularisation=1e6), torch.full((5, 4), 1 / 20).double(), atol=1e-6)
    assert float(ot_similarity(a, b, regularisation=1e6)) == pytest.approx(float(cosines.mean()), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_best_assignment_is_the_limit_from_below(n):
    from scipy.optimize import linear_sum_assignment

    a, b = rows(n, 3, seed=n), rows(n, 3, seed=n + 50)
    cosines = (F.normalize(a) @ F.normalize(b).T).numpy()
    best = cosines[linear_sum_assignment(cosines, maximize=True)].mean()
    for regularisation in (1.0, 0.1, 0.01):  # entropy is at most log n, and so is what it can cost in its own units
        value = float(exact(a, b, regularisation))
        assert best - regularisation * math.log(n) - 1e-9 <= value <= best + 1e-6


@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_solved_to_the_end_the_plan_is_that_of_pot(shape):
    ot = pytest.importorskip("ot")
    cosines = (F.normalize(rows(shape[0], 6)) @ F.normalize(rows(shape[1], 6, seed=1)).T).numpy()
    shares = [np.full(k, 1 / k) for k in shape]
    theirs = ot.bregman.sinkhorn(*shares, 1 - cosines, reg=0.1, stopThr=1e-12, numItermax=20000)
    mine = coupling(torch.from_numpy(cosines), tolerance=1e-12, rounds=2000)
    assert torch.allclose(mine, torch.from_numpy(theirs), atol=1e-10)


def restated_plan(cosines: Tensor, regularisation: float = 0.1) -> Tensor:
    """The published rounds for one pair, in numbers rather than logarithms."""
    n, m = cosines.shape
    kernel, r, c = torch.exp(-(1 - cosines) / regularisation), torch.ones(n).double(), torch.ones(m).double()
    for _ in range(100):
        old, r = r, 1 / n / (kernel @ c)
        c = 1 / m / (kernel.T @ r)
        if (r - old).abs().mean() < 1e-2:
            break
    return r[:, None] * kernel * c


def test_each_problem_of_a_batch_stops_by_the_published_rule():
    a, b = F.normalize(rows(40, 5, 3), dim=2), F.normalize(rows(40, 4, 3, seed=1), dim=2)
    cosines = a @ b.mT
    wanted = torch.stack([restated_plan(c) for c in cosines])
    assert torch.allclose(coupling(cosines), wanted, atol=1e-12)
    assert not torch.allclose(coupling(cosines, tolerance=1e-12), wanted, atol=1e-6)  # the rule does stop early


def test_the_gradient_is_that_of_the_cosines_under_a_frozen_plan():
    a, b = rows(4, 5).requires_grad_(), rows(3, 5, seed=1)
    (found,) = torch.autograd.grad(ot_similarity(a, b), a)
    plan = coupling(F.normalize(a) @ F.normalize(b).T)

    def frozen(at: Tensor) -> Tensor:
        return (plan * (F.normalize(at) @ F.normalize(b).T)).sum()

    slopes = torch.zeros_like(found)
    for k in range(a.numel()):
        step = torch.zeros(a.numel()).double()
        step[k] = 1e-6
        step = step.view_as(a)
        slopes.view(-1)[k] = (frozen(a.detach() + step) - frozen(a.detach() - step)) / 2e-6
    assert torch.allclose(found, slopes, atol=1e-8)


def test_a_tiny_regularisation_gives_numbers():
    assert torch.isfinite(ot_similarity(rows(6, 3), rows(6, 3, seed=1), regularisation=1e-5))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((4,), (4,)), ((2, 3, 4), (1, 3, 4)), ((0, 4), (3, 4))])
def test_rows_that_do_not_fit_are_refused(shapes):
    with pytest.raises(Refused, match="rows"):
        ot_similarity(*(torch.ones(s) for s in shapes))


def test_rows_with_nan_are_refused():
    with pytest.raises(Refused, match="finite"):
        ot_similarity(torch.full((2, 2), math.nan), torch.ones(2, 2))


@pytest.mark.parametrize("seed", range(5))
def test_as_many_clusters_as_different_tokens_are_the_tokens(seed):
    different = rows(4, 3)
    tokens = different[torch.tensor([0, 1, 0, 2, 3, 0, 0, 2])][None]
    means = cluster_means(tokens, 4, generators(seed, 0, 1))[0]
    assert torch.allclose(torch.cdist(different, means).amin(1), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(cluster_means(tokens, 1, generators(seed, 0, 1))[0, 0], tokens[0].mean(0))


def test_one_cluster_makes_the_local_term_the_cosine_of_mean_tokens():
    x, y = digits()[0][:5], digits()[0][5:10]
    encoder = encoders()[0]
    a, b = (see(encoder, z, 1, generators(0, 0, 5)) for z in (x, y))
    means = [F.normalize(encoder(z)[1], dim=2).mean(1) for z in (x, y)]
    wanted = -F.cosine_similarity(encoder(x)[0], encoder(y)[0]) - 0.2 * F.cosine_similarity(*means)
    assert torch.allclose(foa_loss(a, b), wanted, atol=1e-6)


def test_clusters_are_those_of_scikit_learn_from_the_same_start():
    from sklearn.cluster import KMeans

    tokens = rows(6, 30, 4)
    mine = cluster_means(tokens, 5, generators(3, 0, 6), tolerance=0.0)
    for k, generator in enumerate(generators(3, 0, 6)):
        start = tokens[k][torch.randperm(30, generator=generator)[:5]]
        theirs = KMeans(5, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(tokens[k].numpy())
        assert torch.allclose(mine[k], torch.from_numpy(theirs.cluster_centers_), atol=1e-9)


def test_empty_clusters_keep_their_place_and_give_no_nan():
    tokens = torch.ones(2, 6, 3).requires_grad_()
    means = cluster_means(tokens, 4, generators(0, 0, 2))
    assert torch.equal(means, torch.ones(2, 4, 3))
    (slope,) = torch.autograd.grad(means.sum(), tokens)
    assert torch.allclose(slope, torch.full_like(slope, 1 / 6))  # one cluster has them all, the others none


def test_the_gradient_reaches_each_token_through_its_mean_only():
    tokens = torch.tensor([[[0.0], [1.0], [9.0], [11.0], [10.0]]]).requires_grad_()
    means = cluster_means(tokens, 2, generators(0, 0, 1))
    high = means[0, :, 0].argmax()
    (slope,) = torch.autograd.grad(means[0, high, 0], tokens)
    assert torch.allclose(slope.flatten(), torch.tensor([0, 0, 1 / 3, 1 / 3, 1 / 3]))


def test_a_picture_is_clustered_alike_in_any_batch():
    tokens = rows(5, 12, 4)
    whole = cluster_means(tokens, 3, generators(1, 0, 5))
    single = [cluster_means(tokens[k : k + 1], 3, generators(1, k, 1)) for k in range(5)]
    assert torch.allclose(whole, torch.cat(single), atol=1e-12)


@pytest.mark.parametrize("wrong", [{"clusters": 0}, {"clusters": 7}, {"draws": generators(0, 0, 1)}, {"rounds": 0}])
def test_clusters_that_cannot_be_are_refused(wrong):
    with pytest.raises(Refused, match="k-means"):
        cluster_means(rows(2, 6, 3), **{"clusters": 2, "draws": generators(0, 0, 2), **wrong})


def test_boxes_fit_have_their_area_and_are_cut_out_exactly():
    draws = generators(0, 0, 200)
    box = boxes(draws, (0.5, 0.9))
    left, top, width, height = box.unbind(1)
    area, aspect = width * height, width / height
    assert bool((box >= 0).all() and (left + width <= 1 + 1e-12).all() and (top + height <= 1 + 1e-12).all())
    assert 0.5 <= area.min() < 0.52 < 0.88 < area.max() <= 0.9 + 1e-12
    assert 0.74 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.34
    ramp = (torch.arange(16.0) + 0.5).expand(1, 1, 16, 16) / 16  # a pixel says how far right its middle is
    inside = cropped(ramp, torch.tensor([[0.25, 0.0, 0.5, 1.0]]).double())
    assert torch.allclose(inside[0, 0, 0], 0.25 + 0.5 * (torch.arange(16.0) + 0.5) / 16, atol=1e-6)
    assert torch.allclose(cropped(ramp.mT, torch.tensor([[0.0, 0.25, 1.0, 0.5]]).double()), inside.mT, atol=1e-6)
    x = digits()[0][:3]
    assert torch.allclose(cropped(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4).double()), x, atol=1e-5)


def test_weights_sum_to_the_members_and_favour_those_that_grow():
    before, now = torch.tensor([[0.2], [0.4], [-0.1]]), torch.tensor([[0.4], [0.8], [-0.2]])
    assert torch.equal(member_weights(now, None), torch.ones(3, 1))
    assert torch.allclose(member_weights(now, before), torch.ones(3, 1))
    uneven = member_weights(torch.tensor([[0.4], [0.4], [-0.1]]), before)
    assert float(uneven.sum()) == pytest.approx(3)
    assert uneven[0] > uneven[1]
    assert torch.allclose(uneven[1], uneven[2])
    assert torch.equal(member_weights(torch.tensor([[0.4], [0.4], [-0.1]]), before, math.inf), torch.ones(3, 1))
    wild = member_weights(torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([[-1e-8], [-1e-8], [-0.5]]))
    limits = 3 * torch.tensor([LARGEST_GROWTH, 1.0, 0.0]).softmax(0)  # 1 / 0, 0 / 0 and a change of sign
    assert torch.allclose(wild[:, 0], limits)


def restated(given: FOA, x: Tensor) -> Tensor:
    """The attack for one picture at a time, with the parts tested above."""
    found = []
    for k in range(len(x)):
        (draw,) = generators(given.seed, k, 1)
        delta, before = torch.zeros_like(x[k : k + 1]), None
        aims = [see(e, given.reference[k : k + 1], given.clusters, [draw]) for e in given.encoders]
        for _ in range(given.steps):
            delta.requires_grad_()
            losses = []
            for encoder, aim in zip(given.encoders, aims, strict=True):
                seen = see(encoder, x[k : k + 1] + delta, given.clusters, [draw])
                cosines = F.normalize(seen.parts[0]) @ F.normalize(aim.parts[0]).T
                local = (restated_plan(cosines.detach()) * cosines).sum()
                losses.append(F.cosine_similarity(seen.whole, aim.whole)[0] + given.local * local)
            now = torch.stack(losses)
            weights = torch.ones(2).double()
            if before is not None:
                weights = 2 * ((now / (before + 1e-8)).clamp(0, 5) / given.temperature).softmax(0).detach()
            (slope,) = torch.autograd.grad((weights * now).sum(), delta)
            before, delta = (
                now.detach(),
                (delta.detach() + given.radius / 16 * slope.sign()).clamp(-given.radius, given.radius),
            )
            delta = (x[k : k + 1] + delta).clamp(0, 1) - x[k : k + 1]
        found.append(x[k : k + 1] + delta)
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_it_is_the_published_attack_on_one_picture_at_a_time(temperature):
    given = attack(4, torch.float64, temperature=temperature)
    x = digits()[0][:4].double()
    moved = given.perturb(x)
    assert torch.allclose(moved, restated(given, x), atol=1e-9)
    assert torch.equal(moved, given.perturb(x)), "a second run differs"
    assert not torch.equal(moved, replace(given, temperature=math.inf).perturb(x)) or temperature == 1.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("crop", [None, (0.5, 0.9)])
def test_it_moves_features_towards_the_reference(norm, crop):
    given = attack(norm=norm, crop=crop, radius=0.3 if norm == "linf" else 1.0, steps=15)
    x = digits()[0][:8]
    moved = given.perturb(x)
    for encoder in given.encoders:
        aim = see(encoder, given.reference, 3, generators(0, 0, 8))
        before, after = (foa_loss(see(encoder, z, 3, generators(0, 0, 8)), aim).mean() for z in (x, moved))
        assert after < before - 0.02
    away = (moved - x).flatten(1)
    size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert size.max() <= given.radius + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1


@pytest.mark.parametrize("crop", [None, (0.5, 0.9)])
def test_a_batch_is_its_pictures_one_by_one(crop):
    given = attack(5, torch.float64, crop=crop)
    x = digits()[0][:5].double()
    single = [replace(given, first=k, reference=given.reference[k : k + 1]).perturb(x[k : k + 1]) for k in range(5)]
    assert torch.allclose(given.perturb(x), torch.cat(single), atol=1e-12)


def test_one_reference_serves_all_and_the_column_norm_is_another_attack():
    x, given = digits()[0][:3], attack(3)
    one = replace(given, reference=given.reference[:1])
    assert torch.equal(one.perturb(x), replace(given, reference=given.reference[:1].repeat(3, 1, 1, 1)).perturb(x))
    assert not torch.equal(given.perturb(x), replace(given, normalise="columns").perturb(x))
    tokens = given.encoders[0](x)[1]
    seen = see(given.encoders[0], x, 4, generators(0, 0, 3), "columns").parts  # as many clusters as tokens
    assert torch.allclose(seen.sum(1), (tokens / tokens.norm(dim=1, keepdim=True)).sum(1), atol=1e-5)


def test_without_the_local_term_tokens_do_not_count_and_goals_join_as_members():
    x, given = digits()[0][:4], attack(4, local=0.0)
    assert torch.equal(given.perturb(x), replace(given, clusters=2, regularisation=1.0).perturb(x))
    assert not torch.equal(given.perturb(x), replace(given, local=1.0).perturb(x))
    y, model = torch.tensor([1, 2, 3, 4]), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    goal = misclassify(model, y)
    with_goal = given.perturb(x, [goal])
    assert goal(with_goal).mean() > goal(given.perturb(x)).mean()
    assert not torch.equal(with_goal, replace(given, encoders=(), reference=None).perturb(x, [goal]))


def test_encoders_keep_their_modes_weights_and_gradients_also_when_one_fails():
    given, x = attack(4), digits()[0][:4]
    given.encoders[0].train()
    before = [snapshot(e) for e in given.encoders]
    given.perturb(x)
    assert not any(difference(b, snapshot(e)) for b, e in zip(before, given.encoders, strict=True))
    broken = replace(given, encoders=(given.encoders[0], nn.Linear(3, 3)))
    with pytest.raises(RuntimeError):
        broken.perturb(x)
    assert not difference(before[0], snapshot(given.encoders[0]))


def test_other_encoders_are_looked_at_beside_noise_of_the_same_size():
    given, x = attack(radius=0.3, steps=15), digits()[0][:8]
    moved = given.perturb(x)
    found = held_out({"own": given.encoders[0], "self": given.encoders[1]}, given.reference, x, moved, clusters=3)
    own = found["own"]
    assert own.whole["after"].mean() > own.whole["before"].mean() + 0.02
    assert own.whole["after"].mean() > own.whole["noise"].mean() + 0.02
    wanted = F.cosine_similarity(given.encoders[0](moved)[0], given.encoders[0](given.reference)[0])
    assert torch.allclose(own.whole["after"], wanted.detach(), atol=1e-6)
    same = held_out({"own": given.encoders[0]}, moved, x, moved, clusters=1)["own"]
    assert torch.allclose(same.parts["after"], torch.ones(8), atol=1e-5)
    assert own.parts["before"].shape == (8,)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FOA(encoders=("https://a.b",), reference=torch.zeros(1, 2)), "modules in this process"),
        (lambda: FOA(encoders=(lambda x: (x, x),), reference=torch.zeros(1, 2)), "modules in this process"),
        (lambda: held_out({"a": lambda x: x}, *[torch.zeros(1, 1, 8, 8)] * 3), "module in this process"),
        (lambda: held_out({}, torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(2, 2)), "Pictures before"),
        (lambda: attack(3).perturb(torch.zeros(4, 1, 8, 8)), "reference of shape"),
        (lambda: attack(1).perturb(torch.zeros(1, 1, 16, 4)), "reference of shape"),
        (lambda: attack(1, crop=(0.5, 0.9)).perturb(torch.zeros(1, 64)), "Crops need"),
        (lambda: attack(1, clusters=5).perturb(torch.zeros(1, 1, 8, 8)), "k-means needs"),
        (lambda: replace(attack(1), encoders=(nn.Flatten(),)).perturb(torch.zeros(1, 1, 8, 8)), "features"),
        (
            lambda: replace(attack(1), reference=torch.full((1, 1, 8, 8), math.nan)).perturb(torch.zeros(1, 1, 8, 8)),
            "finite",
        ),
    ],
)
def test_what_means_nothing_is_refused(call, says):
    with pytest.raises(Refused, match=says):
        call()


def test_pictures_without_parts_are_compared_as_a_whole():
    a, b = Seen(rows(3, 4)), Seen(rows(3, 4, seed=1))
    assert torch.allclose(foa_loss(a, b), -F.cosine_similarity(a.whole, b.whole))
