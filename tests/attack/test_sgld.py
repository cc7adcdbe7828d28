"""SGLD: the stationary law of a Gaussian target, no noise is descent, and runs that stop go on as they were."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headstart.attack import SGLD
from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term, adamw, constant, sgd
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import LowRank, Thin, digits, small_model
from headstart.testing.subject import difference

test_contract = contract(
    SGLD(examples=256, every=2),
    refuses=[
        lambda: SGLD(examples=0, every=1),
        lambda: SGLD(examples=1, every=0),
        lambda: SGLD(examples=1, every=1, lr=0),
    ],
)


class Quadratic(Term):
    """Per coordinate a/2 (θ - m)²: as many independent one-dimensional chains as there are coordinates."""

    def __init__(self, a: float, m: float) -> None:
        super().__init__()
        self.a, self.m = a, m

    def forward(self, step: Step) -> Tensor:
        return self.a / 2 * (step.model.weight - self.m).square().sum()


def chains(n: int = 4000) -> nn.Module:
    model = nn.Linear(n, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


@pytest.mark.parametrize(("temperature", "decay"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0)])
def test_on_a_gaussian_target_the_stationary_law_is_the_posterior(temperature, decay):
    """Mean a m / (a + wd), variance T / (N (a + wd)) at a small rate; 4,000 chains give 2.2 % of doubt (one sigma)."""
    a, m, examples, lr = 2.0, 3.0, 50, 0.02
    sampler = SGLD(examples=examples, every=400, lr=lr, temperature=temperature, weight_decay=decay)
    plan = Plan(model=chains(), stream=[(torch.zeros(1, 4000), None)], steps=400, terms={"task": Quadratic(a, m)})
    theta = fit(sampler(plan), device="cpu").model.weight.detach()
    curve = a + decay
    variance = temperature / (examples * curve)
    assert float(theta.mean()) == pytest.approx(a * m / curve, abs=4 * math.sqrt(variance / 4000))
    exact = variance / (1 - lr * curve / 2)  # of the recursion at this rate
    assert float(theta.var()) == pytest.approx(exact, rel=4 * math.sqrt(2 / 4000))
    assert exact == pytest.approx(variance, rel=0.04)


def digits_plan(steps: int = 12, model: nn.Module | None = None) -> Plan:
    x, y = digits()
    stream = Batches(x=x[:256], y=y[:256], batch_size=32)
    return Plan(model=model or small_model(), stream=stream, steps=steps, optimizer=adamw())


def test_without_noise_it_is_plain_descent_bit_for_bit():
    cold = SGLD(examples=256, every=3, lr=0.05, temperature=0.0, weight_decay=0.01)
    plain = replace(digits_plan(), optimizer=sgd(0.05, momentum=0.0, weight_decay=0.01), schedule=constant)
    mine, theirs = fit(cold(digits_plan()), device="cpu"), fit(plain, device="cpu")
    assert not difference(mine.model, theirs.model)
    assert torch.equal(mine.losses, theirs.losses)
    assert not difference(cold.samples[-1].state_dict(), theirs.model.state_dict())


def test_one_step_has_the_declared_noise():
    cold, warm = (SGLD(examples=256, every=1, lr=0.05, temperature=t) for t in (0.0, 0.7))
    a, b = (fit(s(digits_plan(steps=1)), device="cpu").model.parameters() for s in (cold, warm))
    noise = torch.cat([(p - q).detach().flatten() for p, q in zip(b, a, strict=True)])  # 2,700 numbers
    declared = math.sqrt(2 * 0.05 * 0.7 / 256)
    assert float(noise.std()) == pytest.approx(declared, rel=4 / math.sqrt(2 * len(noise)))
    assert float(noise.mean()) == pytest.approx(0, abs=4 * declared / math.sqrt(len(noise)))


def test_models_are_kept_when_they_should_be_and_are_those_of_the_run():
    seen: list[Tensor] = []
    sampler = SGLD(examples=256, every=4, burn_in=3)
    plan = sampler(digits_plan())
    plan = replace(plan, after_step=(*plan.after_step, lambda s: seen.append(s.model.head.weight.detach().clone())))
    fit(plan, device="cpu")
    assert sampler.samples.steps == [7, 11]
    assert all(torch.equal(model.head.weight, seen[k - 1]) for k, model in zip([7, 11], sampler.samples, strict=True))
    for model in sampler.samples:
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_the_seed_decides_the_noise_and_a_second_run_starts_over():
    one, two = SGLD(examples=256, every=6), SGLD(examples=256, every=6, seed=1)
    plan = one(digits_plan())
    first = [m.state_dict() for _ in [fit(plan, device="cpu")] for m in one.samples]
    fit(two(digits_plan()), device="cpu")
    assert difference(first[0], two.samples[0].state_dict())
    fit(plan, device="cpu")
    assert len(one.samples) == 2
    assert not difference(first, [m.state_dict() for m in one.samples])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 8, 12])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path: Path, stop):
    def stopping(done: int, _all: int) -> None:
        if done == stop:
            raise Stop

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)
        )

    start, samplers = model(), [SGLD(examples=256, every=3) for _ in range(3)]
    whole = fit(samplers[0](digits_plan(model=start)), device="cpu")
    with pytest.raises(Stop):
        fit(samplers[1](digits_plan(model=start)), device="cpu", checkpoint=tmp_path / "a", every=4, progress=stopping)
    again = fit(samplers[2](digits_plan(model=start)), device="cpu", checkpoint=tmp_path / "a", every=4, resume=True)
    assert not difference(whole.model.state_dict(), again.model.state_dict())
    assert len(samplers[2].samples) == 4
    assert not difference(list(samplers[0].samples), list(samplers[2].samples))


def test_frozen_weights_get_no_noise_and_are_shared():
    model = small_model()
    model.enter.requires_grad_(False)
    sampler = SGLD(examples=256, every=6, temperature=100.0)
    fit(sampler(digits_plan(model=model)), device="cpu")
    for sample in sampler.samples:
        assert sample.enter.weight is model.enter.weight
        assert sample.head.weight is not model.head.weight
    assert not any("enter" in name for name in sampler.samples.weights[0])


def test_after_a_surgery_the_samples_are_operated_models_and_before_it_they_are_refused():
    sampler = SGLD(examples=256, every=6)
    fit(sampler(digits_plan(model=freeze(small_model())).under(Thin())), device="cpu")
    assert isinstance(sampler.samples[0].head, LowRank)
    fit(sampler(digits_plan()).under(Thin()), device="cpu")
    with pytest.raises(Refused, match="surgery to the plan before"):
        sampler.samples[0]


def test_a_run_too_short_to_keep_one_is_refused():
    with pytest.raises(Refused, match="burn_in"):
        SGLD(examples=256, every=4, burn_in=9)(digits_plan())
