"""CWA: its loop restated, closed forms of the sweep and the step back, and where examples depend on their batch."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import CWA, MIFGSM, fused
from headstart.core.ascent import Ball, misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

ALONE = "ignore:CWA was given one surrogate"
FUNCTIONS = "The step back needs the surrogates' logits and refuses plain functions."
REFUSES = [lambda: CWA(steps=-1), lambda: CWA(radius=8.0), lambda: CWA(norm="l1"), lambda: CWA(reverse=-1.0),
           lambda: CWA(reverse=math.nan), lambda: CWA(beta_rms=0.0), lambda: CWA(beta_rms=math.inf),
           lambda: CWA(decay=-1.0), lambda: CWA(step_size=2.0)]  # fmt: skip

test_contract = pytest.mark.filterwarnings(ALONE)(
    contract(
        CWA(),
        known_failures={"optimum_of_a_linear_model": FUNCTIONS, "all_surrogates_count": FUNCTIONS},
        refuses=REFUSES,
    )
)
test_contract_without_a_step_back = pytest.mark.filterwarnings(ALONE)(contract(CWA(reverse=0.0)))
test_contract_in_a_round_ball = pytest.mark.filterwarnings(ALONE)(contract(CWA(radius=0.5, norm="l2", reverse=0.0)))


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 10)).double().eval()


def pictures(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=generator)


MODELS = [model_of(k) for k in range(3)]


def restated(
    models: list[nn.Module],
    x: Tensor,
    y: Tensor,
    radius: float,
    alpha: float,
    steps: int,
    mu: float,
    r: float,
    beta: float,
) -> Tensor:
    """The algorithm of the paper's code for one example at a time, in the linf ball."""

    def into(a: Tensor) -> Tensor:
        return torch.min(torch.max(a, x - radius), x + radius).clamp(0, 1)

    def slope(logits: nn.Module | None, a: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        said = logits(a) if logits else sum(model(a) for model in models) / len(models)
        return torch.autograd.grad(F.cross_entropy(said, y), a)[0]

    o, inner, outer = x, torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(steps):
        b = into(o - r * slope(None, o).sign())
        for model in models:
            g = slope(model, b)
            inner = mu * inner + g / g.norm()
            b = into(b + beta * inner)
        d = b - o
        outer = mu * outer + d / d.abs().sum().clamp_min(1e-12)
        o = into(o + alpha * outer.sign())
    return o


@pytest.mark.parametrize("mu", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("rms", [0.3, 0.01])
def test_it_is_the_algorithm_restated(mu, rms):
    x, y = pictures(6)
    attack = CWA(radius=0.1, steps=5, step_size=0.04, decay=mu, reverse=0.02, beta_rms=rms)
    mine = attack.perturb(x, [misclassify(model, y) for model in MODELS])
    for i in range(len(x)):
        one = restated(MODELS, x[i : i + 1], y[i : i + 1], 0.1, 0.04, 5, mu, 0.02, 8 * rms)
        torch.testing.assert_close(mine[i : i + 1], one, atol=1e-12, rtol=0)


def test_the_usual_constants_are_the_codes():
    x, y = pictures(4)
    goals = [misclassify(model, y) for model in MODELS]
    beta_rms = 250 / math.sqrt(3 * 224 * 224)
    written = CWA(step_size=16 / 255 / 5, reverse=16 / 255 / 15, beta_rms=beta_rms)
    assert torch.equal(CWA().perturb(x, goals), written.perturb(x, goals))
    assert beta_rms == pytest.approx(0.644, abs=5e-4)


def test_targeted_turns_every_gradient_round():
    x, y = pictures(4)
    wanted, seen = (y + 1) % 10, []

    class Told(nn.Module):  # -log p becomes its negative: the same model, read the other way
        def forward(self, a: Tensor) -> Tensor:
            seen.append(a.detach())
            return MODELS[0](a)

    goals = [reach(Told(), wanted), reach(MODELS[1], wanted)]
    moved = CWA(radius=0.1).perturb(x, goals)
    with torch.no_grad():
        before, after = (torch.stack([goal(a) for goal in goals]).mean(0) for a in (x, moved))
        joint = fused([MODELS[0], MODELS[1]], wanted, targeted=True)
        first, back = seen[0], seen[1]
        assert torch.equal(first, x)
        assert (joint(back) < joint(first)).all()  # the worst case of a targeted attack is a less likely target
    assert (after > before).all()


# one step in a round ball shows the direction d / |d| that the step took: x + step_size · d / |d|
SHOW = CWA(radius=1.0, norm="l2", steps=1, step_size=0.01, decay=0.0, reverse=0.0)


def direction(attack: CWA, x: Tensor, goals: list) -> Tensor:
    moved = (attack.perturb(x, goals) - x).flatten(1)
    return moved / moved.norm(dim=1, keepdim=True)


def test_a_tiny_beta_adds_the_normalised_gradients_at_the_point():
    x, y = pictures(4)
    x = 0.25 + x / 2
    units = []
    for model in MODELS:
        a = x.clone().requires_grad_()
        g = torch.autograd.grad(misclassify(model, y)(a).sum(), a)[0].flatten(1)
        units.append(g / g.norm(dim=1, keepdim=True))
    total = sum(units)
    off = []
    for rms in (1e-5, 1e-6):
        attack = CWA(**{**SHOW.__dict__, "beta_rms": rms})
        found = direction(attack, x, [misclassify(model, y) for model in MODELS])
        off.append(float((found - total / total.norm(dim=1, keepdim=True)).norm(dim=1).max()))
    assert off[0] < 1e-3
    assert off[1] == pytest.approx(off[0] / 10, rel=0.2)  # what is missing is of first order in beta


def test_a_huge_beta_leaves_the_last_surrogate_the_say():
    x = torch.full((2, 6), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    goals = [partial(torch.matmul, other=row) for row in w]
    attack = CWA(radius=0.1, steps=1, step_size=0.01, decay=0.0, reverse=0.0, beta_rms=1e9)
    for order in itertools.permutations(range(3)):
        moved = attack.perturb(x, [goals[k] for k in order])
        torch.testing.assert_close(moved, (x + 0.01 * w[order[-1]].sign()).expand(2, 6))


def test_one_surrogate_without_a_step_back_takes_a_linear_model_to_its_worst_case():
    weight = torch.randn(12, generator=torch.Generator().manual_seed(1))
    x = torch.full((3, 12), 0.5)
    with pytest.warns(UserWarning, match="one surrogate"):
        moved = CWA(radius=0.1, reverse=0.0).perturb(x, [lambda a: a @ weight])
    torch.testing.assert_close(moved, x + 0.1 * weight.sign())


def test_identical_surrogates_have_no_order():
    x, y = pictures(4)
    twins = [misclassify(copy.deepcopy(MODELS[0]), y) for _ in range(3)]
    attack = CWA(radius=0.1, reverse=0.0)
    wanted = attack.perturb(x, twins)
    assert all(torch.equal(wanted, attack.perturb(x, list(order))) for order in itertools.permutations(twins))
    shuffled = CWA(radius=0.1, reverse=0.0, shuffle=True, seed=3)
    assert torch.equal(wanted, shuffled.perturb(x, twins))


def test_an_order_belongs_to_its_seed():
    x, y = pictures(4)
    goals = [misclassify(model, y) for model in MODELS]
    by_seed = [CWA(radius=0.1, shuffle=True, seed=s).perturb(x, goals) for s in (0, 0, 1)]
    assert torch.equal(by_seed[0], by_seed[1])
    assert not torch.equal(by_seed[0], by_seed[2])
    assert not torch.equal(by_seed[0], CWA(radius=0.1).perturb(x, goals))


@pytest.mark.parametrize("times", [4.0, 2.0**-20, 3.0])
def test_a_larger_loss_of_one_surrogate_changes_nothing(times):
    x, y = pictures(4)
    goals = [misclassify(model, y) for model in MODELS]
    louder = [goals[0], lambda a: times * goals[1](a), goals[2]]
    attack = CWA(radius=0.1, reverse=0.0)
    torch.testing.assert_close(attack.perturb(x, louder), attack.perturb(x, goals), atol=1e-12, rtol=0)
    assert not torch.equal(MIFGSM(radius=0.1).perturb(x, louder), MIFGSM(radius=0.1).perturb(x, goals))


class Seen(nn.Module):
    """A model that keeps the points it was asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.points = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.points.append(x.detach())
        return self.model(x)


def test_the_step_back_never_raises_the_loss_of_a_linear_model():
    with seeded(0):
        models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double() for _ in range(2)]
    x, y = pictures(16)
    y = y % 2
    seen = Seen(models[0])
    CWA(radius=0.3, steps=1, reverse=0.05).perturb(x, [misclassify(seen, y), misclassify(models[1], y)])
    joint = fused(models, y)
    assert torch.equal(seen.points[0], x)
    assert (joint(seen.points[1]) < joint(x)).all()
    assert float((seen.points[1] - x).abs().max()) <= 0.05 + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.5), st.integers(0, 3), st.floats(0, 2), st.sampled_from(["linf", "l2"]), st.floats(1e-3, 50),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def test_every_point_on_the_way_lies_in_the_ball_and_the_bounds(radius, steps, decay, norm, rms, sweep, seed):
    x, y = pictures(3, seed)
    models = [Seen(model) for model in MODELS[:2]]
    attack = CWA(radius=radius, steps=steps, decay=decay, norm=norm, beta_rms=rms, sweep=sweep, reverse=radius / 10)
    moved = attack.perturb(x, [misclassify(model, y) for model in models])
    for point in (moved, *models[0].points, *models[1].points):
        assert 0 <= float(point.min()) <= float(point.max()) <= 1
        away = (point - x).flatten(1)
        size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
        assert float(size.max()) <= radius + 1e-9
    if radius == 0 or steps == 0:
        assert torch.equal(moved, x)


def test_examples_depend_on_their_batch_only_if_its_norm_is_asked_for():
    x, y = pictures(64)
    for attack, alike in ((CWA(radius=0.1), True), (CWA(radius=0.1, whole_batch=True), False)):
        whole = attack.perturb(x, [misclassify(model, y) for model in MODELS[:2]])
        parts = zip(x.split(1), y.split(1), strict=True)
        single = torch.cat([attack.perturb(a, [misclassify(model, b) for model in MODELS[:2]]) for a, b in parts])
        assert torch.allclose(whole, single, atol=1e-10) == alike


def test_one_example_is_the_same_under_both_norms():
    x, y = pictures(1)
    goals = [misclassify(model, y) for model in MODELS]
    moved = [CWA(radius=0.1, whole_batch=whole).perturb(x, goals) for whole in (False, True)]
    torch.testing.assert_close(moved[0], moved[1], atol=1e-10, rtol=0)


def test_without_sweep_and_step_back_it_is_momentum_on_averaged_logits():
    x, y = pictures()
    goals = [misclassify(model, y) for model in MODELS]
    for norm in ("linf", "l2"):
        mine = CWA(radius=0.1, sweep=False, reverse=0.0, norm=norm).perturb(x, goals)
        theirs = MIFGSM(radius=0.1, step_size=0.02, norm=norm).perturb(x, [fused(MODELS, y)])
        assert torch.equal(mine, theirs)


def test_sam_alone_takes_the_gradient_where_the_step_back_leads():
    x, y = pictures(4)
    attack = CWA(radius=0.1, steps=1, step_size=0.01, sweep=False, reverse=0.03)
    joint = fused(MODELS, y)

    def slope(a: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        return torch.autograd.grad(joint(a).sum(), a)[0]

    back = Ball(0.1).clip(x, x - 0.03 * slope(x).sign(), (0.0, 1.0))
    wanted = (x + 0.01 * slope(back).sign()).clamp(0, 1)
    torch.testing.assert_close(attack.perturb(x, [misclassify(model, y) for model in MODELS]), wanted)


def test_a_silent_surrogate_is_passed_over():
    x, y = pictures(4)
    goals = [misclassify(model, y) for model in MODELS]
    attack = CWA(radius=0.1, reverse=0.0, decay=0.0)
    silent = [goals[0], lambda a: 0 * a.flatten(1).sum(1), *goals[1:]]
    assert torch.equal(attack.perturb(x, silent), attack.perturb(x, goals))
    still = attack.perturb(x, [lambda a: 0 * a.flatten(1).sum(1)] * 2)
    assert torch.equal(still, x)


def test_every_surrogate_counts():
    x, y = pictures(4)
    goals = [misclassify(model, y) for model in MODELS]
    whole = CWA(radius=0.1, beta_rms=0.05).perturb(x, goals)
    for k in range(3):
        others = goals[:k] + goals[k + 1 :]
        assert not torch.equal(whole, CWA(radius=0.1, beta_rms=0.05).perturb(x, others))


def test_bad_goals_are_refused():
    x, y = pictures(4)
    for attack in (CWA(), CWA(reverse=0.0, sweep=False)):
        with pytest.raises(Refused, match="goals of one model each"):
            attack.perturb(x, [misclassify(MODELS[0], y), lambda a: a.flatten(1).sum(1)])
    with pytest.raises(Refused, match="about the same labels"):
        CWA().perturb(x, [misclassify(MODELS[0], y), misclassify(MODELS[1], (y + 1) % 10)])
    with pytest.raises(Refused, match="gradient must be finite"):
        CWA(reverse=0.0).perturb(x, [lambda a: a.flatten(1).sum(1), lambda a: math.nan * a.flatten(1).sum(1)])
