"""BMTC: plain FGSM where nothing is mixed, the chain rule, agreement over time, and a policy that learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import BMTC, FGSM, MIFGSM
from headstart.attack.background_policy import BackgroundReward, FramePolicy, error, fall, learned_policy
from headstart.attack.clips import consistent_gradient, inconsistency, median_background, mixed, smoothed
from headstart.core.ascent import goal_gradient, misclassify, reach
from headstart.core.plan import Step
from headstart.core.rng import seeded
from headstart.core.stream import Batch
from headstart.core.validate import Refused
from headstart.testing import contract

BANK = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(9))

# The common checks work on pictures, which are attacked as clips of one frame.
test_contract = contract(
    lambda: BMTC(backgrounds=BANK),
    refuses=[
        lambda: BMTC(backgrounds=BANK[0]), lambda: BMTC(backgrounds=2 * BANK), lambda: BMTC(backgrounds=BANK[:0]),
        lambda: BMTC(backgrounds=BANK, gamma=0.0), lambda: BMTC(backgrounds=BANK, gamma=1.1),
        lambda: BMTC(backgrounds=BANK, selector="worst"), lambda: BMTC(backgrounds=BANK, sample=True),
        lambda: BMTC(backgrounds=BANK, guidance=0.5), lambda: BMTC(backgrounds=BANK, consistency=-1.0),
        lambda: BMTC(backgrounds=BANK, guidance=0.5, categories=torch.arange(4)), lambda: BMTC(backgrounds=BANK, steps=-1),
    ],
)  # fmt: skip
test_contract_l2_best = contract(lambda: BMTC(backgrounds=BANK, radius=0.5, norm="l2", selector="best", decay=1.0))


def model_of(seed: int = 0, classes: int = 4, frames: int = 4) -> nn.Module:
    with seeded(seed):
        layers = [nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * frames * 64, classes)]
    return nn.Sequential(*layers).eval()


class FrameWise(nn.Module):
    """The mean over frames of what a model of pictures says."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(3):
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(frame) for frame in x.unbind(2)]).mean(0)


def clips(n: int = 6, frames: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, frames, 8, 8, generator=generator), torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("selector", ["random", "best", lambda x: x.flatten(1)[:, :5]])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_with_gamma_1_every_selector_is_the_iterative_attack(selector, decay):
    model, (x, y) = model_of(), clips()
    attack = BMTC(backgrounds=BANK, gamma=1.0, smooth=False, selector=selector, decay=decay)
    assert torch.equal(
        attack.perturb(x, [misclassify(model, y)]), MIFGSM(decay=decay).perturb(x, [misclassify(model, y)])
    )


def test_the_first_step_is_fgsm_at_the_mixed_clip():
    model, (x, y) = model_of(), clips()
    attack, goal = BMTC(backgrounds=BANK, steps=1, smooth=False, radius=0.05), misclassify(model, y)
    shown = mixed(x, BANK[attack.choose(x, [goal])], 0.8)
    through = goal_gradient([lambda a: goal(mixed(a, BANK[attack.choose(x, [goal])], 0.8))], x)
    torch.testing.assert_close(through, 0.8 * goal_gradient([goal], shown))
    found, there = attack.perturb(x, [goal]), FGSM(radius=0.05).perturb(shown, [goal])
    free = (found > 0) & (found < 1) & (there > 0) & (there < 1)  # not cut by the bounds
    assert free.float().mean() > 0.8
    assert torch.equal((found - x).sign()[free], (there - shown).sign()[free])


def slowly(
    model: nn.Module, x: Tensor, y: Tensor, frames: Tensor, radius: float, strength: float, smooth: bool
) -> Tensor:
    """The card's ten steps, frame by frame and clip by clip."""
    found = []
    for clip, label, frame in zip(x, y, frames, strict=True):
        a = clip.clone()
        for _ in range(10):
            point = a.clone().requires_grad_()
            logits = model(torch.stack([0.8 * part + 0.2 * frame for part in point.unbind(1)], 1)[None])
            loss = F.cross_entropy(logits, label[None])
            g = torch.autograd.grad(loss, point, create_graph=True)[0]
            u = [part / (part.norm() + 1e-8) for part in g.unbind(1)]
            apart = sum((1 - (u[t] * u[t + 1]).sum() for t in range(len(u) - 1)), torch.zeros(()))
            g = torch.autograd.grad(loss - strength * apart, point)[0] if strength else g.detach()
            if smooth:
                last = g.shape[1] - 1
                g = torch.stack([sum(g[:, min(max(t + k, 0), last)] for k in (-1, 0, 1)) for t in range(last + 1)], 1)
            a = (clip + (a + radius / 10 * g.sign() - clip).clamp(-radius, radius)).clamp(0, 1)
        found.append(a)
    return torch.stack(found)


@pytest.mark.parametrize(("strength", "smooth"), [(0.0, False), (0.0, True), (0.1, False), (5.0, True)])
def test_it_is_the_attack_written_frame_by_frame(strength, smooth):
    model, (x, y) = model_of().double(), clips()
    x, attack = x.double(), BMTC(backgrounds=BANK, radius=0.1, consistency=strength, smooth=smooth)
    chosen = attack.choose(x, [misclassify(model, y)])
    assert len(chosen.unique()) > 1
    wanted = slowly(model, x, y, BANK.double()[chosen], 0.1, strength, smooth)
    found = attack.perturb(x, [misclassify(model, y)])
    assert (found - wanted).abs().gt(1e-6).double().mean() < 0.002  # signs of entries near zero


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.5), st.integers(1, 4), st.floats(0.05, 1), st.sampled_from(["linf", "l2"]), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def test_it_stays_around_the_original_clip(radius, frames, gamma, norm, consistent, seed):
    model, (x, y) = model_of(frames=frames), clips(3, frames, seed)
    attack = BMTC(backgrounds=BANK, radius=radius, norm=norm, steps=2, gamma=gamma, seed=seed,
                  consistency=0.1 * consistent)  # fmt: skip
    found = attack.perturb(x, [misclassify(model, y)])
    away = (found - x).flatten(1)
    assert (away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max() <= radius + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.floats(1e-30, 1e3))
def test_inconsistency_is_between_0_and_2_for_each_pair_of_frames_whatever_the_scale(frames, seed, scale):
    g = torch.randn(3, 2, frames, 2, 2, generator=torch.Generator().manual_seed(seed))
    found = inconsistency(g)
    assert (found >= -1e-5).all()
    assert (found <= 2 * (frames - 1) + 1e-5).all()
    torch.testing.assert_close(inconsistency(scale * g), found, rtol=1e-4, atol=1e-5)
    if frames == 1:
        assert found.tolist() == [0, 0, 0]


def test_inconsistency_of_known_gradients():
    g = torch.randn(2, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inconsistency(torch.cat([g, -g], 2)), torch.full((2,), 2.0))
    torch.testing.assert_close(inconsistency(torch.cat([g, 3 * g, g], 2)), torch.zeros(2), atol=1e-6, rtol=0)
    assert inconsistency(torch.cat([g, 0 * g], 2)).tolist() == [1, 1]  # no direction agrees with nothing


def test_a_static_clip_and_frame_wise_model_agree_over_time_and_smoothing_changes_nothing():
    (x, y), model = clips(frames=1), FrameWise()
    x = x.expand(-1, -1, 4, -1, -1)
    goal = misclassify(model, y)
    torch.testing.assert_close(inconsistency(goal_gradient([goal], x)), torch.zeros(len(x)), atol=1e-5, rtol=0)
    plain, smooth = (BMTC(backgrounds=BANK, smooth=s, radius=0.05).perturb(x, [goal]) for s in (False, True))
    assert torch.equal(plain, smooth)


def test_smoothing_is_a_mean_of_three_frames():
    g = torch.zeros(1, 1, 5, 1, 1)
    g[0, 0, 2] = 3
    assert smoothed(g).flatten().tolist() == [0, 1, 1, 1, 0]
    g = torch.randn(2, 3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = F.pad(g, (0, 0, 0, 0, 1, 1), mode="replicate")
    torch.testing.assert_close(smoothed(g), F.avg_pool3d(wide, (3, 1, 1), stride=1))
    torch.testing.assert_close(smoothed(g[:, :, :1].expand(-1, -1, 6, -1, -1)), g[:, :, :1].expand(-1, -1, 6, -1, -1))


def test_consistency_0_is_the_first_order_gradient_and_more_of_it_brings_frames_together():
    model, (x, y) = model_of(), clips()
    goal = misclassify(model, y)
    assert torch.equal(consistent_gradient([goal], x, 0.0), goal_gradient([goal], x))
    before = inconsistency(goal_gradient([goal], x))
    turn = consistent_gradient([goal], x, 1.0) - goal_gradient([goal], x)  # minus the slope of the inconsistency
    after = inconsistency(goal_gradient([goal], x + 1e-2 * turn / turn.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)))
    assert (after < before).all()


def test_consistency_matches_finite_differences():
    model, (x, y) = model_of().double(), clips(2)
    x, goal = x.double(), misclassify(model, y)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    slope = ((goal_gradient([goal], x) - consistent_gradient([goal], x, 1.0)) * along).sum()
    up, down = (inconsistency(goal_gradient([goal], x + h * along)).sum() for h in (1e-5, -1e-5))
    torch.testing.assert_close((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-8)


def test_a_linear_goal_has_no_second_derivative_and_is_taken_to_its_worst_case():
    x, w = torch.full((2, 1, 3, 8, 8), 0.5), torch.linspace(-1, 1, 3 * 64)
    found = BMTC(backgrounds=BANK, radius=0.1, smooth=False, consistency=0.1).perturb(x, [lambda a: a.flatten(1) @ w])
    torch.testing.assert_close(found, x + 0.1 * w.sign().view(1, 1, 3, 8, 8))


def test_a_clip_of_one_frame_is_a_picture():
    (x, y), model = clips(frames=1), FrameWise()
    flat = nn.Sequential(nn.Unflatten(1, (1, 1)), model)
    film = BMTC(backgrounds=BANK, consistency=0.1).perturb(x, [misclassify(model, y)])
    assert torch.equal(film[:, :, 0], BMTC(backgrounds=BANK).perturb(x[:, :, 0], [misclassify(flat, y)]))


def test_best_is_the_background_of_the_highest_loss():
    model, (x, y) = model_of(), clips()
    goals = [misclassify(model, y), misclassify(model_of(1), y)]
    chosen = BMTC(backgrounds=BANK, selector="best").choose(x, goals)
    table = torch.stack([sum(goal(0.8 * x + 0.2 * b[None, :, None]) for goal in goals) for b in BANK])
    assert torch.equal(chosen, table.argmax(0))
    assert len(chosen.unique()) > 1
    alone = [BMTC(backgrounds=BANK[:1], selector=s).perturb(x, goals) for s in ("best", "random")]
    assert torch.equal(*alone)


def test_random_choices_belong_to_the_example_and_are_even():
    x, goals = torch.rand(1000, 1, 8, 8), [lambda a: a.flatten(1).sum(1)]
    whole = BMTC(backgrounds=BANK).choose(x, goals)
    assert torch.equal(whole[600:], BMTC(backgrounds=BANK, first=600).choose(x[600:], goals))
    assert whole.bincount(minlength=5).min() > 150
    assert not torch.equal(whole, BMTC(backgrounds=BANK, seed=1).choose(x, goals))


def test_a_policy_picks_its_highest_score_or_draws():
    shares = torch.tensor([0.1, 0.0, 0.6, 0.0, 0.3])
    policy, goals = lambda x: shares.log().expand(len(x), -1).nan_to_num(neginf=-1e9), [lambda a: a.flatten(1).sum(1)]
    x = torch.rand(1000, 1, 8, 8)
    assert BMTC(backgrounds=BANK, selector=policy).choose(x, goals).unique().tolist() == [2]
    drawn = BMTC(backgrounds=BANK, selector=policy, sample=True).choose(x, goals)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 1000, shares, atol=0.05, rtol=0)
    for scores in (torch.zeros(len(x), 4), torch.full((len(x), 5), math.nan)):
        with pytest.raises(Refused):
            BMTC(backgrounds=BANK, selector=lambda x, scores=scores: scores).choose(x, goals)


def test_guidance_leaves_the_label_for_the_background():
    model, (x, y) = model_of(classes=9), clips()  # four actions, five backgrounds
    categories, goal = torch.arange(4, 9), misclassify(model, y)
    settings = {"backgrounds": BANK, "radius": 0.1, "smooth": False}
    plain = BMTC(**settings)
    guided = BMTC(**settings, guidance=0.5, categories=categories)
    aims = categories[plain.choose(x, [goal])]
    slope = [goal_gradient([lambda a, f=f: f(mixed(a, BANK[aims - 4], 0.8))], x) for f in (goal, reach(model, aims))]
    step = BMTC(**settings, guidance=0.5, categories=categories, steps=1).perturb(x, [goal])
    moved = (step != x) & (step > 0) & (step < 1)
    assert torch.equal((step - x).sign()[moved], (slope[0] + 0.5 * slope[1]).sign()[moved])
    said = [model(attack.perturb(x, [goal])).log_softmax(1)[torch.arange(len(x)), aims] for attack in (plain, guided)]
    assert said[1].mean() > said[0].mean() + 0.1
    with pytest.raises(Refused, match="a target of its own"):
        guided.perturb(x, [reach(model, y)])
    with pytest.raises(Refused, match="one model each"):
        guided.perturb(x, [lambda a: a.flatten(1).sum(1)])
    with pytest.raises(Refused, match="of 4 classes"):
        guided.perturb(x, [misclassify(model_of(), y)])


@pytest.mark.parametrize("swapped", [clips(frames=3)[0].transpose(1, 2), clips()[0][..., :4], torch.rand(2, 64)])
def test_axes_in_another_order_are_refused(swapped):
    with pytest.raises(Refused, match="Turn the axes"):
        BMTC(backgrounds=BANK).perturb(swapped, [lambda a: a.flatten(1).sum(1)])


@pytest.mark.parametrize("frames", [5, 8])
def test_the_median_over_time_is_numpys_and_forgets_what_moves(frames):
    still = torch.rand(3, 2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    film = still.expand(-1, -1, frames, -1, -1).clone()
    for t in range(frames):
        film[:, :, t, 2, t % 6] = 1
    assert torch.equal(median_background(film), still[:, :, 0])
    x = clips(frames=frames)[0]
    torch.testing.assert_close(median_background(x), torch.as_tensor(np.median(x.numpy(), 2)))


def test_rewards_are_falls_of_the_logit_and_margins_of_errors():
    x, y = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 5.0]]), torch.tensor([0, 1])
    shown = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 2.0]])
    assert fall(nn.Identity(), x, shown, y).tolist() == [2, -2]
    assert error([nn.Identity(), nn.Flatten()], shown, y).tolist() == [1, -1]


def reward_of(bank: Tensor, model: nn.Module, **settings: float) -> BackgroundReward:
    return BackgroundReward(bank, model, [model], **settings)


def test_a_reward_of_0_moves_nothing_and_a_positive_one_makes_the_draw_likelier():
    for still, rises in ((torch.full((1, 1, 8, 8), 0.5), False), (torch.zeros(1, 1, 8, 8), True)):
        x, y, policy = (
            torch.full((1, 1, 8, 8), 0.5),
            torch.zeros(1).long(),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        nn.init.ones_(model[1].weight)  # a darker picture has lower logits
        term = reward_of(still.expand(3, -1, -1, -1), model, transfer=0.0)
        with seeded(0):
            drawn = int(torch.multinomial(policy(x).softmax(1), 1))
        with seeded(0):
            loss = term(Step(model=policy, batch=Batch(x, y)))
        slope = torch.autograd.grad(loss, policy[1].bias)[0]
        assert (slope[drawn] < 0) == rises
        assert bool((slope != 0).any()) == rises


def test_the_running_mean_of_each_part_is_subtracted():
    x, y, policy = torch.rand(4, 1, 8, 8), torch.zeros(4).long(), nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    term = reward_of(torch.zeros(1, 1, 8, 8), model, every=2)
    first, second = (term._above(0, torch.tensor(rewards)) for rewards in ([1.0, 3.0], [5.0, 5.0]))
    assert first.tolist() == [1, 3]
    assert second.tolist() == pytest.approx([3, 3])
    assert term._above(0, torch.zeros(1)).item() == pytest.approx(-(0.9 * 2 + 5) / 1.9)
    for _ in range(3):
        term(Step(model=policy, batch=Batch(x, y)))
    assert term.weight[1] == pytest.approx(1 - 0.9**2)  # asked in batches 0 and 2


def test_a_policy_learns_the_background_that_hurts():
    """Class 0 is dark, class 1 bright: what hurts is the background of the other class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 2
    x = (0.3 + 0.4 * y.view(-1, 1, 1, 1, 1) + 0.1 * torch.rand(32, 1, 3, 8, 8, generator=generator)).clamp(0, 1)
    bank = torch.stack([torch.full((1, 8, 8), value) for value in (0.5, 0.0, 1.0)])
    model = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-10.0], [10.0]]))
        model[2].bias.copy_(torch.tensor([5.0, -5.0]))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with seeded(0):
        start = FramePolicy(pool, 1, 3)
    kept = [p.clone() for p in start.parameters()]
    policy = learned_policy(start, x, y, reward_of(bank, model), epochs=100, learning_rate=0.2, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(kept, start.parameters(), strict=True))
    chosen = BMTC(backgrounds=bank, selector=policy).choose(x, [misclassify(model, y)])
    assert torch.equal(chosen, 2 - y)
    assert torch.equal(chosen, BMTC(backgrounds=bank, selector="best").choose(x, [misclassify(model, y)]))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.0}, {"attack": -1.0}, {"transfer": math.nan}, {"every": 0}, {"memory": 1.0}]
)
def test_rewards_that_mean_nothing_are_refused(settings):
    with pytest.raises(Refused):
        BackgroundReward(BANK, model_of(), **settings)
    policy = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for batch in (Batch(BANK), Batch(BANK, torch.zeros(5).long())):  # no labels; three scores for five backgrounds
        with pytest.raises(Refused):
            reward_of(BANK, model_of())(Step(model=policy, batch=batch))
