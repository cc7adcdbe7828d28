"""AdaEA: its loop restated, the weights and the filter by hand, and what depends on the batch."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import MIFGSM, AdaEA, adaptive_weights, consensus, fused
from headstart.attack.draws import generators
from headstart.core.ascent import Ball, ascend, goal_gradient, misclassify, reach
from headstart.core.rng import seeded
from headstart.core.validate import Refused
from headstart.testing import contract

ALONE = "ignore:AdaEA was given one surrogate"
FUNCTIONS = "AdaEA weighs the surrogates' logits and refuses plain functions."
KNOWN = {"optimum_of_a_linear_model": FUNCTIONS, "all_surrogates_count": FUNCTIONS}
test_contract = pytest.mark.filterwarnings(ALONE)(
    contract(
        AdaEA(),
        known_failures=KNOWN,
        refuses=[lambda: AdaEA(steps=-1), lambda: AdaEA(radius=8.0), lambda: AdaEA(norm="l1"), lambda: AdaEA(beta=-1.0),
                 lambda: AdaEA(beta=math.inf), lambda: AdaEA(eta=1.5), lambda: AdaEA(eta=math.nan),
                 lambda: AdaEA(reduce="max"), lambda: AdaEA(drf="half"), lambda: AdaEA(noise=-1.0),
                 lambda: AdaEA(noise=math.nan), lambda: AdaEA(decay=-1.0), lambda: AdaEA(step_size=2.0)],
    )
)  # fmt: skip
test_contract_in_a_round_ball = pytest.mark.filterwarnings(ALONE)(
    contract(AdaEA(radius=0.5, norm="l2", drf=None), known_failures=KNOWN)
)


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 10)).double().eval()


def pictures(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=generator)


MODELS = [model_of(k) for k in range(3)]


def goals_of(y: Tensor, models: list[nn.Module] = MODELS) -> list:
    return [misclassify(model, y) for model in models]


def noisy(x: Tensor, seed: int = 0) -> Tensor:
    draws = generators(seed, 0, len(x))
    return x + 0.001 * torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=draw) for draw in draws])


def restated(models: list[nn.Module], x: Tensor, y: Tensor, *, radius: float, alpha: float, mu: float, steps: int,
             eta: float, beta: float) -> Tensor:  # fmt: skip
    """The algorithm of the paper's code with batch weights, written out pair by pair; the filter symmetric."""
    k = len(models)

    def into(a: Tensor) -> Tensor:
        return torch.min(torch.max(a, x - radius), x + radius).clamp(0, 1)

    def slope(loss, a: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        return torch.autograd.grad(loss(a), a)[0]

    a, momentum = into(noisy(x)), torch.zeros_like(x)
    for _ in range(steps):
        slopes = [slope(lambda b, m=m: F.cross_entropy(m(b), y, reduction="sum"), a) for m in models]
        tried = [into(a + alpha * g.sign()) for g in slopes]
        with torch.no_grad():
            losses = [[float(F.cross_entropy(models[i](tried[j]), y)) for j in range(k)] for i in range(k)]
        scores = [sum(losses[i][j] / losses[i][i] for i in range(k) if i != j) for j in range(k)]
        w = torch.tensor([beta * s for s in scores], dtype=x.dtype).softmax(0)
        per_model = [
            torch.stack([torch.cosine_similarity(slopes[i], slopes[j], dim=1, eps=1e-30) for j in range(k) if j != i])
            for i in range(k)
        ]
        mask = torch.stack([c.mean(0) for c in per_model]).mean(0) >= eta
        g = slope(lambda b, w=w: F.cross_entropy(sum(v * m(b) for v, m in zip(w, models, strict=True)), y,
                                                  reduction="sum"), a)  # fmt: skip
        g = g * mask[:, None]
        momentum = g / g.abs().mean((1, 2, 3), keepdim=True) + mu * momentum
        a = into(a + alpha * momentum.sign())
    return a


@pytest.mark.parametrize("eta", [-0.3, 0.0, -2.0])
@pytest.mark.parametrize("mu", [0.9, 0.0])
def test_it_is_the_algorithm_restated(eta, mu):
    x, y = pictures()
    attack = AdaEA(radius=0.1, steps=4, decay=mu, eta=eta, per_sample=False)
    mine = attack.perturb(x, goals_of(y))
    wanted = restated(MODELS, x, y, radius=0.1, alpha=0.025, mu=mu, steps=4, eta=eta, beta=10.0)
    torch.testing.assert_close(mine, wanted, atol=1e-12, rtol=0)


def test_the_weights_by_hand():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    wanted = torch.tensor([7.5, 20.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(adaptive_weights(losses), wanted)
    assert wanted.tolist() == pytest.approx([3.7e-6, 0.9999963], rel=0.01)
    torch.testing.assert_close(adaptive_weights(losses[..., None].expand(2, 2, 5)), wanted[:, None].expand(2, 5))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 99), st.floats(0.01, 100), st.sampled_from(["sum", "mean"]))
def test_the_scale_of_a_models_loss_and_a_common_constant_cancel(k, seed, times, reduce):
    losses = 0.5 + torch.rand(k, k, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = adaptive_weights(losses, reduce=reduce)
    torch.testing.assert_close(w.sum(0), torch.ones(3, dtype=torch.float64))
    scaled = losses.clone()
    scaled[0] *= times
    torch.testing.assert_close(adaptive_weights(scaled, reduce=reduce), w)
    diagonal = losses.diagonal().movedim(-1, 0)[:, None]
    more = torch.where(torch.eye(k, dtype=torch.bool)[..., None], losses, losses + 0.7 * diagonal)  # ratios + 0.7
    torch.testing.assert_close(adaptive_weights(more, reduce=reduce), w)
    if reduce == "mean":
        torch.testing.assert_close(adaptive_weights(losses, beta=10.0 / (k - 1)), w)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(adaptive_weights(losses[order][:, order], reduce=reduce), w[order])


def test_vanishing_losses_give_no_nan_and_no_explosion():
    losses = torch.tensor([[0.0, 5.0], [1.0, 1.0]])
    assert adaptive_weights(losses).isfinite().all()
    capped = torch.tensor([[1e-9, 1.0], [900.0, 1.0]])  # a ratio of a million counts as a thousand
    torch.testing.assert_close(adaptive_weights(capped, beta=0.01), torch.tensor([9.0, 10.0]).softmax(0))
    assert adaptive_weights(torch.zeros(3, 3)).tolist() == pytest.approx([1 / 3] * 3)


def test_a_target_is_reached_by_small_losses():
    losses = torch.tensor([[1.0, 2.0], [0.5, 1.0]])  # member 0's step halves the other's loss, member 1's doubles it
    left, reached = adaptive_weights(losses), adaptive_weights(losses, targeted=True)
    assert left[1] > left[0]
    assert reached[0] > reached[1]
    torch.testing.assert_close(reached, torch.tensor([20.0, 5.0]).softmax(0))


def test_the_filter_by_hand_and_with_one_channel():
    u = torch.randn(3, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair = [[torch.cosine_similarity(u[i], u[j], dim=1) for j in range(3)] for i in range(3)]
    s = [(pair[0][1] + pair[0][2]) / 2, (pair[1][0] + pair[1][2]) / 2, (pair[2][0] + pair[2][1]) / 2]
    torch.testing.assert_close(consensus(u), (s[0] + s[1] + s[2]) / 3)
    torch.testing.assert_close(consensus(u, drf="official"), (s[0] + s[1]) / 3)
    torch.testing.assert_close(consensus(u[:2], drf="official"), 0.5 * consensus(u[:2]))
    torch.testing.assert_close(consensus(1e-9 * u), consensus(u))  # tiny gradients are not shrunk
    grey = u[:2, :, :1]
    assert torch.equal(consensus(grey), (grey[0] * grey[1]).sign()[:, 0])
    torch.testing.assert_close(consensus(u[[2, 0, 1]]), consensus(u))


def base(x: Tensor, goal, attack: AdaEA) -> Tensor:
    """Momentum from the same noisy start."""
    return ascend(x, lambda a: goal_gradient([goal], a), ball=Ball(attack.radius, attack.norm), steps=attack.steps,
                  step_size=attack.radius / 4, decay=attack.decay, start=noisy(x))  # fmt: skip


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_identical_surrogates_are_one(per_sample, norm):
    x, y = pictures()
    attack = AdaEA(radius=0.1, per_sample=per_sample, norm=norm)
    moved, fusion = attack.traced(x, goals_of(y, [copy.deepcopy(MODELS[0]) for _ in range(3)]))
    torch.testing.assert_close(fusion.weights, torch.full_like(fusion.weights, 1 / 3), atol=1e-12, rtol=0)
    assert (fusion.kept == 1).all()
    assert fusion.entropy == pytest.approx(math.log(3))
    torch.testing.assert_close(moved, base(x, misclassify(MODELS[0], y), attack), atol=1e-10, rtol=0)


def test_beta_zero_averages_logits():
    x, y = pictures()
    attack = AdaEA(radius=0.1, beta=0.0, drf=None)
    torch.testing.assert_close(attack.perturb(x, goals_of(y)), base(x, fused(MODELS, y), attack), atol=1e-10, rtol=0)
    exact = AdaEA(radius=0.1, beta=0.0, drf=None, noise=0.0, decay=1.0)
    wanted = MIFGSM(radius=0.1, step_size=0.025).perturb(x, [fused(MODELS, y)])
    torch.testing.assert_close(exact.perturb(x, goals_of(y)), wanted, atol=1e-10, rtol=0)


def test_eta_below_minus_one_keeps_everything_and_one_falls_back():
    x, y = pictures()
    unfiltered = AdaEA(radius=0.1, drf=None).perturb(x, goals_of(y))
    assert torch.equal(AdaEA(radius=0.1, eta=-1.1).perturb(x, goals_of(y)), unfiltered)
    moved, fusion = AdaEA(radius=0.1, eta=1.0).traced(x, goals_of(y))  # three random models agree fully nowhere
    assert torch.equal(moved, unfiltered)
    assert (fusion.kept == 0).all()
    assert not torch.equal(AdaEA(radius=0.1, eta=0.0).perturb(x, goals_of(y)), unfiltered)
    with pytest.raises(Refused, match="eta <= 1"):
        AdaEA(eta=1.01)


@pytest.mark.parametrize("drf", ["full", "official"])
def test_the_order_of_surrogates_is_no_matter_but_to_the_official_filter(drf):
    x, y = pictures()
    attack, order = AdaEA(radius=0.1, drf=drf, eta=0.0), [2, 0, 1]
    moved, fusion = attack.traced(x, goals_of(y))
    other, permuted = attack.traced(x, goals_of(y, [MODELS[k] for k in order]))
    assert torch.allclose(moved, other, atol=1e-10) == (drf == "full")
    if drf == "full":
        torch.testing.assert_close(permuted.weights, fusion.weights[:, order])
        torch.testing.assert_close(permuted.losses, fusion.losses[:, order][:, :, order])


def test_examples_depend_on_their_batch_only_by_batch_weights():
    x, y = pictures(12)
    for per_sample in (True, False):
        attack = AdaEA(radius=0.1, steps=4, per_sample=per_sample)
        whole = attack.perturb(x, goals_of(y))
        single = [replace(attack, first=i).perturb(x[i : i + 1], goals_of(y[i : i + 1])) for i in range(len(x))]
        assert torch.allclose(whole, torch.cat(single), atol=1e-10) == per_sample


def test_one_example_has_its_batchs_weights():
    x, y = pictures(1)
    found = [AdaEA(radius=0.1, per_sample=per).perturb(x, goals_of(y)) for per in (True, False)]
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_models_are_taken_to_their_exact_worst_case(norm):
    with seeded(1):
        models = [nn.Linear(12, 2).double() for _ in range(2)]
    models[1].weight.data.copy_(models[0].weight.data)  # like weights, unlike biases: one worst case for any weighing
    x, y = torch.full((3, 12), 0.5, dtype=torch.float64), torch.zeros(3).long()
    w = (models[0].weight[1] - models[0].weight[0]).detach()
    attack = AdaEA(radius=0.1, steps=100, drf=None, norm=norm, decay=0.0)
    wanted = x + 0.1 * (w.sign() if norm == "linf" else w / w.norm())
    torch.testing.assert_close(attack.perturb(x, goals_of(y, models)), wanted, atol=1e-6, rtol=0)


def test_the_member_whose_steps_harm_nobody_gets_the_least_weight():
    # two models read the left half, the third the right one, which tells the others nothing
    def reading(columns: slice, seed: int) -> nn.Module:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                with seeded(seed):
                    self.layer = nn.Linear(54, 10).double()

            def forward(self, a: Tensor) -> Tensor:
                return 3 * self.layer(a[..., columns].flatten(1))

        return Half()

    first = reading(slice(0, 3), 0)
    models = [first, reading(slice(3, 6), 1), copy.deepcopy(first)]
    x, y = pictures()
    fusion = AdaEA(radius=0.1, drf=None).traced(x, goals_of(y, models))[1]
    mean = fusion.weights.mean((0, 2))
    assert mean.argmin() == 1
    start = Ball(0.1).clip(x, noisy(x), (0.0, 1.0))
    losses = fusion.losses[0]
    torch.testing.assert_close(losses[0, 1], F.cross_entropy(first(start), y, reduction="none").detach())  # unharmed
    torch.testing.assert_close(losses[0, 2], losses[0, 0])
    assert fusion.entropy < math.log(3)


def test_every_surrogate_counts_and_the_target_comes_nearer():
    x, y = pictures()
    whole = AdaEA(radius=0.1).perturb(x, goals_of(y))
    for k in range(3):
        others = MODELS[:k] + MODELS[k + 1 :]
        assert not torch.equal(whole, AdaEA(radius=0.1).perturb(x, goals_of(y, others)))
    goals = [reach(model, (y + 1) % 10) for model in MODELS]
    moved = AdaEA(radius=0.1).perturb(x, goals)
    with torch.no_grad():
        assert all((goal(moved) > goal(x)).all() for goal in goals)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.5), st.integers(0, 3), st.sampled_from(["linf", "l2"]), st.floats(0, 100), st.booleans(),
       st.sampled_from(["full", "official", None]), st.integers(0, 99))  # fmt: skip
def test_it_stays_in_the_ball_and_the_bounds(radius, steps, norm, beta, per_sample, drf, seed):
    x, y = pictures(3, seed)
    attack = AdaEA(radius=radius, steps=steps, norm=norm, beta=beta, per_sample=per_sample, drf=drf, eta=0.0, noise=0.5)
    moved, fusion = attack.traced(x, goals_of(y))
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    away = (moved - x).flatten(1)
    assert float((away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max()) <= radius + 1e-9
    assert not moved.requires_grad
    assert fusion.weights.shape == (steps, 3, 3)
    assert not fusion.weights.requires_grad
    torch.testing.assert_close(fusion.weights.sum(1), torch.ones(steps, 3, dtype=torch.float64))
    if radius == 0 or steps == 0:
        assert torch.equal(moved, x)


def test_it_warns_where_there_is_nothing_to_weigh_or_filter():
    x, y = pictures(2)
    with pytest.warns(UserWarning, match="one surrogate"):
        AdaEA(steps=1).perturb(x, goals_of(y, MODELS[:1]))
    grey = [nn.Sequential(nn.Flatten(), nn.Linear(36, 10)).double() for _ in range(2)]
    with pytest.warns(UserWarning, match="pass drf=None"):
        filtered = AdaEA(steps=2).perturb(x[:, :1], goals_of(y, grey))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(filtered, AdaEA(steps=2, drf=None).perturb(x[:, :1], goals_of(y, grey)))


def test_bad_goals_are_refused():
    x, y = pictures(2)
    with pytest.raises(Refused, match="AdaEA needs goals of one model each"):
        AdaEA().perturb(x, [fused(MODELS, y)])
    broken = copy.deepcopy(MODELS[0])
    broken[0].bias.data.fill_(math.nan)
    with pytest.raises(Refused, match="gradient must be finite"):
        AdaEA().perturb(x, goals_of(y, [MODELS[0], broken]))
