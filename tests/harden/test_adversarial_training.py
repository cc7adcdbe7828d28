"""Adversarial training: closed forms of a linear model, equality with a loop written out, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.align import DANN
from headstart.attack import MIFGSM
from headstart.core.ascent import Goal, misclassify
from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, Plan, Step, Term, adamw, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batch, Batches
from headstart.core.validate import Refused
from headstart.distill import SoftTargets
from headstart.harden import AdversarialTraining
from headstart.testing import contract
from headstart.testing.material import digits, small_model

test_contract = contract(
    AdversarialTraining(radius=0.1, steps=2),
    refuses=[lambda: AdversarialTraining(radius=8), lambda: AdversarialTraining(steps=0)],
)
test_contract_of_a_share_in_l2 = contract(AdversarialTraining(radius=0.5, steps=2, share=0.5, norm="l2"))


def model_of(seed: int = 0) -> nn.Module:
    """With everything whose behaviour depends on the mode."""
    with seeded(seed):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 10)
        )


def plan_of(model: nn.Module, steps: int = 5) -> Plan:
    x, y = digits()
    stream = Batches(x=x[:256], y=y[:256], batch_size=32)
    return Plan(model=model, stream=stream, steps=steps, optimizer=sgd(0.05))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())


@pytest.mark.parametrize("still", [{"radius": 0.0}, {"share": 0.0}])
def test_nothing_moved_is_plain_training_bit_for_bit(still):
    plan = plan_of(model_of())
    assert same(fit(AdversarialTraining(**still)(plan), device="cpu").model, fit(plan, device="cpu").model)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_learns_from_its_exact_worst_case(norm):
    """Two classes, w = w₁ - w₀: the robust loss is log(1 + exp(-s(w·x + b) + radius ‖w‖*)), and so its gradient."""
    generator = torch.Generator().manual_seed(0)
    x, y = 0.3 + 0.4 * torch.rand(64, 6, generator=generator).double(), torch.arange(64) % 2
    with seeded(0):
        model = nn.Linear(6, 2).double()
    tactic = AdversarialTraining(radius=0.1, steps=20, norm=norm, random_start=False)
    plan = Plan(model=model, stream=[Batch(x, y)], steps=1, optimizer=sgd(0.5, momentum=0.0))
    fitted = fit(tactic(plan), device="cpu")

    w, b = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
    dual = w.norm(p=1 if norm == "linf" else 2)
    robust = F.softplus(-(2 * y - 1) * (x @ w + b) + 0.1 * dual).mean()
    slopes = torch.autograd.grad(robust, [model.weight, model.bias])
    assert fitted.history["task"][0] == pytest.approx(robust.item(), rel=1e-6)
    for new, old, slope in zip(fitted.model.parameters(), model.parameters(), slopes, strict=True):
        torch.testing.assert_close(new, old - 0.5 * slope, rtol=1e-9, atol=1e-12)


def by_hand(plan: Plan, radius: float, alpha: float, steps: int, count: int) -> nn.Module:
    """Madry's loop written out, crafting in eval mode."""
    with seeded(0):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for (_, batch), _ in zip(enumerate(plan.stream), range(plan.steps), strict=False):
            model.eval()
            x, y = batch.x[:count], batch.y[:count]
            moved = x + radius * (2 * torch.rand_like(x) - 1)
            moved = (x + (moved - x).clamp(-radius, radius)).clamp(0, 1)
            for _ in range(steps):
                moved.requires_grad_()
                slope = torch.autograd.grad(F.cross_entropy(model(moved), y, reduction="sum"), moved)[0]
                moved = moved.detach() + alpha * slope.sign()
                moved = (x + (moved - x).clamp(-radius, radius)).clamp(0, 1)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(torch.cat([moved, batch.x[count:]])), batch.y).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(("share", "count"), [(1.0, 32), (0.25, 8)])
def test_it_is_the_loop_written_out(share, count):
    plan = plan_of(model_of())
    tactic = AdversarialTraining(radius=0.1, steps=7, share=share)
    fitted = fit(tactic(plan), device="cpu").model
    assert same(fitted, by_hand(plan, 0.1, 1.75 * 0.1 / 7, 7, count))
    assert not same(fitted, fit(plan, device="cpu").model)


def test_the_default_step_is_the_papers_on_cifar():
    plan = plan_of(model_of(), steps=2)
    default, paper = AdversarialTraining(), AdversarialTraining(step_size=2 / 255)
    a, b = (fit(tactic(plan), device="cpu").model.state_dict() for tactic in (default, paper))
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def test_batch_statistics_and_modes_are_those_of_one_training_pass_a_step():
    model = model_of()
    model[2].requires_grad_(False)  # fit keeps a frozen BatchNorm in eval mode
    modes: list[list[bool]] = []
    plan = replace(plan_of(model), after_step=(lambda step: modes.append([m.training for m in step.model.modules()]),))
    tactic = AdversarialTraining(steps=3)
    assert fit(tactic(plan), device="cpu").model[2].num_batches_tracked == 0
    assert modes == [[True, True, True, False, True, True, True]] * 5
    assert fit(tactic(plan_of(model_of())), device="cpu").model[2].num_batches_tracked == 5


def test_a_model_that_raises_gets_its_modes_back():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model = nn.Sequential(nn.Dropout(), Broken())
    with pytest.raises(RuntimeError, match="broken"):
        AdversarialTraining().moved(model, Batch(torch.rand(2, 3), torch.zeros(2).long()))
    assert all(module.training for module in model.modules())


class Seen(Term):
    def __init__(self) -> None:
        super().__init__()
        self.x: list[Tensor] = []

    def forward(self, step: Step) -> Tensor:
        self.x.append(step.batch.x)
        return 0.0 * step.run(step.batch.x).output.sum()


def test_all_terms_share_one_search_and_later_terms_see_clean_inputs():
    calls: list[int] = []
    model = small_model()
    model.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    plan = plan_of(model, steps=2).plus(kd=SoftTargets(small_model()), before=Seen())
    fitted = fit(AdversarialTraining(radius=0.1, steps=3)(plan).plus(later=Seen()), device="cpu")
    assert calls == [32] * 2 * (3 + 1 + 1)  # three of the search, one on moved inputs, one on clean inputs
    moved, clean = fitted.terms["before"].term.x, fitted.terms["later"].x
    for a, b, batch in zip(moved, clean, plan.stream, strict=False):
        assert torch.equal(b, batch.x)
        assert 0.05 < (a - b).abs().max() <= 0.1 + 1e-7


def test_it_composes_with_a_tactic_of_parts_when_it_comes_first():
    x, _ = digits()
    plan, target = plan_of(small_model(), steps=2), Batches(x=x[256:512].flip(3))
    fitted = fit(DANN(target)(AdversarialTraining(steps=2)(plan)), device="cpu")
    assert list(fitted.history) == ["task", "domain"]
    with pytest.raises(Refused, match=r"parts \['source', 'target'\]. Apply it before"):
        fit(AdversarialTraining(steps=2)(DANN(target)(plan)), device="cpu")


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(1, 3), st.floats(0, 1), st.sampled_from(["linf", "l2"]), st.booleans())
def test_moved_inputs_stay_in_the_ball_and_the_bounds(radius, steps, share, norm, random_start):
    x, y = digits()
    tactic = AdversarialTraining(radius=radius, steps=steps, share=share, norm=norm, random_start=random_start)
    with seeded(0):
        moved = tactic.moved(small_model(), Batch(x[:9], y[:9])).x
    away = (moved - x[:9]).flatten(1)
    size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert size.max() <= radius * (1 + 1e-6) + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not moved.requires_grad
    assert torch.equal(moved[round(share * 9) :], x[:9][round(share * 9) :])


@dataclass(frozen=True)
class Shifted:
    """Moves up by its seed, on the far side of what the goals could say."""

    seed: int = 0

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        assert len(goals) == 1
        return (x + self.seed / 2**31).clamp(0, 1)


def test_an_attack_takes_the_place_of_the_search_and_draws_anew_each_time():
    x, y = digits()
    batch, model = Batch(x[:8], y[:8]), model_of()
    tactic = AdversarialTraining(attack=Shifted(), share=0.5)
    with seeded(0):
        one, two = (tactic.moved(model, batch).x for _ in range(2))
    with seeded(0):
        seeds = [int(torch.randint(2**31, ())) for _ in range(2)]
    for found, seed in zip((one, two), seeds, strict=True):
        assert torch.equal(found[:4], Shifted(seed).perturb(x[:4], [0]))
        assert torch.equal(found[4:], x[4:8])
    assert model.training


def test_an_attack_that_is_the_search_trains_the_same_model():
    plan = plan_of(model_of())
    attack = MIFGSM(radius=0.1, steps=4, step_size=0.03, decay=0.0)
    own = AdversarialTraining(radius=0.1, steps=4, step_size=0.03, random_start=False)
    assert same(fit(AdversarialTraining(attack=attack)(plan), device="cpu").model, fit(own(plan), device="cpu").model)


@pytest.mark.parametrize("own", [{"radius": 0.1}, {"steps": 3}, {"random_start": False}, {"norm": "l2"}])
def test_settings_of_the_search_beside_an_attack_are_refused(own):
    with pytest.raises(Refused, match="leaves radius"):
        AdversarialTraining(attack=MIFGSM(), **own)


def test_two_random_starts_differ_and_none_is_reproducible():
    x, y = digits()
    batch, model = Batch(x[:9], y[:9]), small_model()
    with seeded(0):
        a, b = (AdversarialTraining(steps=1).moved(model, batch).x for _ in range(2))
        c, d = (AdversarialTraining(steps=1, random_start=False).moved(model, batch).x for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(c, d)


def test_the_model_becomes_robust_and_loses_little():
    x, y = digits()
    stream = Batches(x=x[:1200], y=y[:1200], batch_size=64)
    plan = Plan(model=small_model(), stream=stream, steps=300, optimizer=adamw(3e-3))
    clean, robust = [], []
    for given_plan in (plan, AdversarialTraining(radius=0.1, steps=4)(plan)):
        model = fit(given_plan, device="cpu").model
        moved = MIFGSM(radius=0.1, decay=0.0).perturb(x[1200:], [misclassify(model, y[1200:])])
        clean.append(float((model(x[1200:]).argmax(1) == y[1200:]).float().mean()))
        robust.append(float((model(moved).argmax(1) == y[1200:]).float().mean()))
    assert robust[1] > robust[0] + 0.2
    assert clean[1] > clean[0] - 0.05


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"radius": 8.0}, "Divide by 255"),
        ({"radius": -0.1}, "radius"),
        ({"radius": math.nan}, "radius"),
        ({"steps": 0}, "steps >= 1"),
        ({"step_size": 2.0}, "Divide by 255"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"share": 1.5}, "share"),
        ({"share": math.nan}, "share"),
        ({"norm": "l1"}, "norm"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(Refused, match=says):
        AdversarialTraining(**wrong)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (Batch(torch.rand(4, 64)), "no labels"),
        (Batch({"ids": torch.rand(4, 64)}, torch.zeros(4).long()), "x of type dict"),
        (Batch(torch.rand(4, 64) * 255, torch.zeros(4).long()), r"must lie in \(0.0, 1.0\)"),
        (Batch(torch.ones(4, 64).int(), torch.zeros(4).long()), "floats"),
        (Batch(torch.full((4, 64), math.nan), torch.zeros(4).long()), "finite"),
    ],
)
def test_batches_that_cannot_be_moved_are_refused(batch, says):
    plan = Plan(model=nn.Linear(64, 10), stream=[batch], steps=1)
    with pytest.raises(Refused, match=says):
        fit(AdversarialTraining()(plan), device="cpu")


def test_a_second_application_is_refused():
    plan = AdversarialTraining()(Plan(model=nn.Linear(64, 10), stream=[], steps=1, terms={"task": CrossEntropy()}))
    with pytest.raises(Refused, match="Apply it once"):
        AdversarialTraining()(plan)
