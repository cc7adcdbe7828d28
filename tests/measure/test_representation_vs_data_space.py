"""Moved features against moved inputs: rotated copies, closed forms of linear heads, other libraries' alignments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import PGD
from headstart.core.ascent import Ball, Goal, ascend, goal_gradient, misclassify
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.measure.alignment import (
    Likeness,
    aligned_cosine,
    linear_cka,
    mapped,
    procrustes,
    procrustes_distance,
    ridge,
)
from headstart.measure.representation_vs_data_space import SpaceStudy, representation_vs_data_space
from headstart.measure.split import Split, displacement
from headstart.testing.material import digits
from headstart.testing.subject import difference, snapshot

WIDTH = 24


def attack(radius: float) -> Callable[[Tensor, Sequence[Goal]], Tensor]:
    return PGD(radius=radius, steps=5, random_start=False).perturb


@cache
def model_of(seed: int = 0) -> nn.Sequential:
    """Features "3" before a ReLU, in float64 so that copies agree in every decision."""
    x, y = digits()
    with seeded(seed):
        fresh = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )
    plan = Plan(model=fresh, stream=Batches(x=x[:1000], y=y[:1000], batch_size=64), steps=200, optimizer=adamw(3e-3))
    return fit(plan, device="cpu", seed=seed).model.double().eval()  # type: ignore[return-value]


def copy_of(model: nn.Sequential, matrix: Tensor) -> nn.Sequential:
    """h ∘ M⁻¹ on M e: the same function of x."""
    old, new, back = model[3], nn.Linear(48, WIDTH).double(), nn.Linear(WIDTH, WIDTH, bias=False).double()
    with torch.no_grad():
        new.weight.copy_(matrix @ old.weight)
        new.bias.copy_(matrix @ old.bias)
        back.weight.copy_(matrix.inverse())
    return nn.Sequential(*model[:3], new, back, *model[4:]).eval()


def rotation(d: int = WIDTH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def material(n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    x, y = digits()
    return x[1000 : 1000 + n].double(), y[1000 : 1000 + n], x[:600].double()


def study(source: nn.Module, layer: str = "3", relative: Sequence[float] = (0.4,), **targets: nn.Module) -> SpaceStudy:
    x, y, unlabelled = material()
    divided = {name: Split(model, layer) for name, model in targets.items()}
    return representation_vs_data_space(Split(source, layer), divided, x, y, unlabelled, attack, relative=relative)


def test_a_rotated_copy_is_the_same_to_inputs_and_another_model_to_features_until_it_is_aligned():
    model, turn = model_of(), rotation()
    copy, (x, _, unlabelled) = copy_of(model, turn), material()
    assert torch.allclose(model(x), copy(x), atol=1e-5)
    own, theirs = (Split(m, "3").encode(unlabelled)[0] for m in (model, copy))
    assert torch.allclose(procrustes(own, theirs), turn.T, atol=1e-4)
    found = study(model, copy=copy)
    (row,) = found.rows
    assert row.data == row.data_home  # sample by sample: both rates count the same examples
    assert row.procrustes == row.home > 0.5
    assert row.raw < 0.3 * row.home
    assert row.random < 0.3 * row.home
    likeness = found.likeness["copy"]
    assert likeness.cka == pytest.approx(1, abs=1e-9)
    assert likeness.distance == pytest.approx(0, abs=1e-6)
    assert likeness.cosine == pytest.approx(1, abs=1e-9)


def test_data_success_on_a_rotated_copy_is_identical_sample_by_sample():
    model, (x, y, _) = model_of(), material()
    moved = attack(0.15)(x, [misclassify(model, y)])
    copy = copy_of(model, rotation())
    assert torch.equal(model(moved).argmax(1), copy(moved).argmax(1))
    assert (model(moved).argmax(1) != y).float().mean() > 0.3
    split, other = Split(model, "3"), Split(copy, "3")
    delta = displacement(split, x, y, 2.0)
    turned = mapped(delta, procrustes(split.encode(x)[0], other.encode(x)[0]))
    assert torch.equal(split(x, delta).argmax(1), other(x, turned).argmax(1))


def test_a_model_transfers_to_itself():
    (row,) = study(model_of(), same=model_of()).rows
    assert row.home == row.raw == row.procrustes > 0.5
    assert row.data == row.data_home


def test_hidden_units_in_another_order_are_a_rotation_that_alignment_undoes():
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    (row,) = study(model_of(), copy=copy_of(model_of(), torch.eye(WIDTH, dtype=torch.float64)[order])).rows
    assert row.procrustes == row.home
    assert row.raw < row.home / 2


def test_rescaled_units_need_more_than_a_rotation():
    """Procrustes cannot undo a diagonal map; least squares does, exactly as its penalty goes to zero."""
    model, (x, y, unlabelled) = model_of(), material()
    scales = torch.logspace(-1.5, 1.5, WIDTH, dtype=torch.float64)
    copy = copy_of(model, scales.diag())
    source, target = Split(model, "3"), Split(copy, "3")
    own, theirs = source.encode(unlabelled)[0], target.encode(unlabelled)[0]
    assert torch.allclose(ridge(own, theirs, strength=1e-10), scales.diag(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(procrustes(own, theirs), torch.eye(WIDTH, dtype=torch.float64), atol=0.1)
    delta = displacement(source, x, y, 2.0)
    at_home, there = source(x, delta), target(x, mapped(delta, ridge(own, theirs, strength=1e-10)))
    assert torch.allclose(at_home, there, atol=1e-3)
    (row,) = study(model, copy=copy).rows
    assert row.ridge >= row.procrustes
    assert row.ridge == pytest.approx(row.home, abs=0.03)


def test_no_budget_does_nothing_anywhere():
    (row,) = study(model_of(), relative=[0.0], other=model_of(1)).rows
    assert (row.home, row.raw, row.procrustes, row.ridge, row.random, row.radius, row.data_home, row.data) == (0.0,) * 8
    assert row.matched


def linear_head(d: int = 6, seed: int = 0) -> tuple[Split, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Identity(), nn.Linear(d, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, d, generator=generator))
    x = torch.rand(40, d, generator=generator, dtype=torch.float64)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()
    return Split(model, "0"), x, model(x).argmax(1), weight


@pytest.mark.parametrize("radius", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("universal", [False, True])
def test_a_linear_head_is_taken_to_its_closed_form_in_five_steps(radius, universal):
    split, x, y, weight = linear_head()
    if universal:
        x, y = x[y == 0], y[y == 0]
    delta = displacement(split, x, y, radius, steps=5, universal=universal).expand(len(x), -1)
    sign = torch.where(y == 0, -1.0, 1.0).double()[:, None]
    assert torch.allclose(delta, radius * sign * weight / weight.norm(), atol=1e-9)
    said = split.model(x)
    margin = (said.gather(1, y[:, None]) - said.gather(1, 1 - y[:, None]))[:, 0]
    assert torch.equal(split(x, delta).argmax(1) != y, margin < radius * weight.norm())


def test_a_random_rotation_loses_the_root_of_the_dimension():
    """Effect w · Qᵀ δ of the best δ: mean 0, variance |w|² ρ² / d; Q δ restores all of |w| ρ."""
    d, rho, draws = 20, 0.7, 4000
    weight = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    delta = rho * weight / weight.norm()
    turns = torch.linalg.qr(torch.randn(draws, d, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    turn = turns[0] * turns[1].diagonal(dim1=1, dim2=2).sign()[:, None]  # makes the draw uniform
    effects = turn.mT @ delta @ weight
    expected = float(weight.norm()) ** 2 * rho**2 / d
    assert float(effects.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / draws))
    assert abs(float(effects.mean())) < 4 * math.sqrt(expected / draws)
    assert torch.allclose(turn.mT @ (turn @ delta)[..., None] - delta[:, None], torch.zeros(()).double(), atol=1e-9)


def test_with_the_inputs_as_features_both_spaces_coincide_and_transfer_alike():
    x, y, unlabelled = material()
    model, other = model_of(), model_of(1)
    source, target = Split(model, "1:input"), Split(other, "1:input")
    unlabelled = torch.rand(
        unlabelled.shape, generator=torch.Generator().manual_seed(0)
    ).double()  # in digits some pixels never vary, and a rotation may do as it likes there
    length = float(x.flatten(1).norm(dim=1).mean())
    goal = misclassify(model, y)
    moved = ascend(
        x,
        lambda a: goal_gradient([goal], a),
        ball=Ball(1.0, "l2"),
        steps=20,
        step_size=0.2,
        bounds=(-math.inf, math.inf),
    )
    delta = displacement(source, x, y, 1.0)
    assert torch.allclose(delta, (moved - x).flatten(1), atol=1e-6)
    (row,) = representation_vs_data_space(
        source, {"other": target}, x, y, unlabelled, attack, relative=[1 / length]
    ).rows
    right = other(x).argmax(1) == y
    assert row.raw == pytest.approx(float((other(moved).argmax(1) != y)[right].double().mean()), abs=1e-9)
    assert row.procrustes == row.raw > 0.1


def test_depths_where_models_share_a_basis_transfer_raw_and_those_between_do_not():
    found = {
        layer: study(model_of(), layer, relative=[0.3], other=model_of(1)).rows[0] for layer in ("1:input", "3", "")
    }
    shares = {layer: row.raw / row.home for layer, row in found.items()}
    assert shares["3"] < 0.5 * min(shares["1:input"], shares[""])


def test_home_strengths_are_matched_or_said_not_to_be():
    x, y, unlabelled = material()
    split = Split(model_of(), "3")
    row = study(model_of(), same=model_of()).rows[0]
    assert row.matched == (abs(row.home - row.data_home) <= 0.05) is True
    assert 0 < row.radius < 1
    (idle,) = representation_vs_data_space(
        split, {"same": split}, x, y, unlabelled, lambda _r: lambda x, _goals: x, relative=[0.4]
    ).rows
    assert idle.data_home == 0
    assert not idle.matched


def restated(source: nn.Sequential, target: nn.Sequential, relative: float) -> dict[str, float]:
    """The card's steps 1 to 3, 4 and 6 with the models cut by hand."""
    x, y, unlabelled = material()
    e1, h1, et, ht = source[:4], source[4:], target[:4], target[4:]
    z, there = e1(x).detach(), et(x).detach()
    rho, s = relative * z.norm(dim=1).mean(), there.norm(dim=1).mean() / z.norm(dim=1).mean()
    delta = torch.zeros_like(z)
    for _ in range(20):
        delta.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(h1(z + delta), y, reduction="sum"), delta)
        delta = delta.detach() + rho / 5 * g / (g.norm(dim=1, keepdim=True) + 1e-12)
        delta = delta * (rho / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    a, b = e1(unlabelled).detach().numpy(), et(unlabelled).detach().numpy()
    from scipy.linalg import orthogonal_procrustes
    from sklearn.linear_model import Ridge

    a, b = a - a.mean(0), b - b.mean(0)
    turn = torch.from_numpy(orthogonal_procrustes(a, b)[0])
    tilt = torch.from_numpy(Ridge(alpha=1e-3 * np.trace(a.T @ a) / a.shape[1], fit_intercept=False).fit(a, b).coef_.T)
    noise = F.normalize(torch.randn(there.shape, generator=torch.Generator().manual_seed(0)).double())
    right, own = target(x).argmax(1) == y, source(x).argmax(1) == y

    def rate(said: Tensor, counted: Tensor) -> float:
        return float((said.argmax(1) != y)[counted].double().mean())

    return {
        "home": rate(h1(z + delta), own),
        "raw": rate(ht(there + s * delta), right),
        "procrustes": rate(ht(there + s * delta @ turn), right),
        "ridge": rate(ht(there + delta @ tilt), right),
        "random": rate(ht(there + s * rho * noise), right),
        "counted": int(right.sum()),
    }


@pytest.mark.parametrize("relative", [0.25, 0.5, 1.5])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_agrees_with_models_cut_by_hand_and_with_scipy_and_scikit_learn(relative, scale):
    target = copy_of(model_of(1), scale * torch.eye(WIDTH, dtype=torch.float64))
    (row,) = study(model_of(), relative=[relative], other=target).rows
    for name, value in restated(model_of(), target, relative).items():
        assert getattr(row, name) == pytest.approx(value, abs=0.006), name  # one example in 200


def test_alignments_of_different_widths_and_their_parity():
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(80, d, generator=generator, dtype=torch.float64) for d in (5, 8))
    turn = procrustes(a, b)
    assert torch.allclose(turn @ turn.T, torch.eye(5).double(), atol=1e-9)
    assert torch.allclose(procrustes(b, a), turn.T, atol=1e-9)
    p, q = (z - z.mean(0) for z in (a, b))
    k, m = p @ p.T, q @ q.T
    assert linear_cka(a, b) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-9)
    from scipy.spatial import procrustes as disparity

    wide = torch.cat([a, a.new_zeros(80, 3)], 1)
    nuclear = 1 - procrustes_distance(wide, b) / 2
    assert 1 - nuclear**2 == pytest.approx(disparity(wide.numpy(), b.numpy())[2], rel=1e-9)
    assert aligned_cosine(a, b, turn) == pytest.approx(float(F.cosine_similarity(p @ turn, q).mean()))


def test_a_convolutional_layer_is_aligned_by_one_map_of_its_channels():
    with seeded(3):
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).double().eval()
    turn = rotation(6)
    copy = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1, bias=False), *model[1:]).double().eval()
    with torch.no_grad():
        copy[0].weight.copy_(torch.einsum("ab,bcij->acij", turn, model[0].weight))
        copy[0].bias.copy_(turn @ model[0].bias)
        copy[1].weight.copy_(turn.T[..., None, None])
    x, _, unlabelled = material()
    y = model(x).argmax(1)
    source, target = Split(model, "0"), Split(copy, "0")
    assert torch.allclose(procrustes(source.encode(unlabelled)[0], target.encode(unlabelled)[0]), turn.T, atol=1e-6)
    (row,) = representation_vs_data_space(source, {"copy": target}, x, y, unlabelled, attack, relative=[0.5]).rows
    assert row.procrustes == row.home > 0.3
    assert row.raw < row.home


def test_shapes_that_differ_have_no_raw_transfer_but_an_aligned_one():
    with seeded(4):
        narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).double().eval()
    x, y, unlabelled = material()
    found = representation_vs_data_space(
        Split(model_of(), "3"), {"narrow": Split(narrow, "1")}, x, y, unlabelled, attack, relative=[0.4]
    )
    assert found.rows[0].raw is None
    assert 0 <= found.rows[0].procrustes <= 1


def test_one_displacement_for_all_is_weaker_at_home():
    x, y, unlabelled = material()
    split = Split(model_of(), "3")
    each, one = (displacement(split, x, y, 2.0, universal=u, batch_size=64) for u in (False, True))
    assert each.shape == (200, WIDTH)
    assert one.shape == (1, WIDTH)
    assert torch.allclose(one, displacement(split, x, y, 2.0, universal=True), atol=1e-9)  # batches change nothing
    rows = [representation_vs_data_space(split, {"same": split}, x, y, unlabelled, attack, relative=[0.4], universal=u).rows[0]
            for u in (False, True)]  # fmt: skip
    assert rows[1].raw == rows[1].home < rows[0].home


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 99), st.floats(0.1, 10))
def test_likeness_stays_in_its_range_and_ignores_rotation_and_scale(d, e, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(30, width, generator=generator, dtype=torch.float64) for width in (d, e))
    turned = scale * b @ rotation(e, seed)
    one, two = Likeness.of(a, b, procrustes(a, b)), Likeness.of(a, turned, procrustes(a, turned))
    assert 0 <= one.cka <= 1
    assert 0 <= one.distance <= 2
    assert -1 <= one.cosine <= 1
    for name in ("cka", "distance", "cosine"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 20), st.integers(0, 6), st.booleans(), st.integers(1, 64))
def test_a_displacement_stays_in_its_ball(radius, steps, universal, batch_size):
    x, y, _ = material(40)
    delta = displacement(Split(model_of(), "3"), x, y, radius, steps=steps, universal=universal, batch_size=batch_size)
    assert delta.norm(dim=1).max() <= radius * (1 + 1e-9)
    if steps == 0 or radius == 0:
        assert not delta.any()


def test_models_hooks_modes_and_the_random_state_stay():
    model = model_of().train()
    before, state = snapshot(model), torch.get_rng_state()
    study(model, other=model_of(1))
    assert not difference(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(RuntimeError):
        Split(model, "3")(torch.zeros(2, 64).double(), torch.zeros(2, WIDTH + 1).double())
    assert not difference(before, snapshot(model))
    model.eval()


def test_the_same_seed_gives_the_same_study():
    assert study(model_of(), other=model_of(1)) == study(model_of(), other=model_of(1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(64, 64), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    ("layer", "says"),
    [("nine", "must exist"), ("layer", "called once"), ("idle", "no call"), ("layer:out", "NAME:input")],
)
def test_layers_that_cannot_be_divided_are_refused(layer, says):
    with pytest.raises(Refused, match=says):
        Split(Twice(), layer).encode(torch.zeros(3, 64))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"targets": {}}, "targets"),
        ({"relative": []}, "Budgets"),
        ({"relative": [-1.0]}, "Budgets"),
        ({"relative": [math.nan]}, "Budgets"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": -1}, "steps"),
        ({"x": torch.full((8, 1, 8, 8), 2.0).double()}, "Inputs must lie"),
        ({"x": torch.full((8, 1, 8, 8), math.nan).double()}, "finite"),
        ({"unlabelled": torch.zeros(0, 1, 8, 8).double()}, "batch"),
        ({"y": torch.zeros(8)}, "Labels"),
        ({"y": torch.full((8,), 77)}, "right on some x"),
        ({"unlabelled": torch.zeros(30, 1, 8, 8).double()}, "features that differ"),
    ],
)
def test_what_means_nothing_is_refused(wrong, says):
    x, y, unlabelled = material(8)
    split = Split(model_of(), "3")
    given = {"targets": {"same": split}, "x": x, "y": y, "unlabelled": unlabelled, **wrong}
    with pytest.raises(Refused, match=says):
        representation_vs_data_space(split, attack=attack, **given)


def test_features_without_common_positions_are_refused_and_few_rows_are_said_to_be_few():
    with pytest.raises(Refused, match="position by position"):
        procrustes(torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 3, 3))
    with pytest.raises(Refused, match="floats"):
        linear_cka(torch.zeros(4), torch.zeros(4))
    with pytest.raises(Refused, match="finite"):
        linear_cka(torch.full((4, 2), math.nan), torch.zeros(4, 2))
    with pytest.warns(UserWarning, match="do not determine"):
        procrustes(torch.randn(3, 5), torch.randn(3, 5))
    assert linear_cka(torch.ones(4, 2), torch.rand(4, 2)) == 0
    assert procrustes_distance(torch.ones(4, 2), torch.rand(4, 2)) == 2


def test_a_target_that_is_right_on_nothing_counts_nothing():
    wrong = nn.Sequential(*model_of()[:5], nn.Linear(WIDTH, 77).double())
    with torch.no_grad():
        wrong[5].weight.zero_()
        wrong[5].bias.copy_(F.one_hot(torch.tensor(76), 77))
    (row,) = study(model_of(), wrong=wrong).rows
    assert (row.counted, row.raw, row.data) == (0, 0.0, 0.0)
