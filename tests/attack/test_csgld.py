"""Cyclical SGLD: the rates of its cycles, which models are kept, and that it is a snapshot ensemble without noise."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.attack import CSGLD
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, sgd
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import digits, small_model
from headstart.testing.subject import difference

test_contract = contract(
    CSGLD(examples=256, every=1, cycles=2, samples_per_cycle=1),
    refuses=[
        lambda: CSGLD(examples=0, every=1), lambda: CSGLD(examples=9, every=0), lambda: CSGLD(examples=9, every=1, cycles=0),
        lambda: CSGLD(examples=9, every=1, samples_per_cycle=0), lambda: CSGLD(examples=9, every=1, burn_in_cycles=5),
        lambda: CSGLD(examples=9, every=1, temperature=-1.0), lambda: CSGLD(examples=9, every=1, lr=math.inf),
    ],
)  # fmt: skip


def plan_of(steps: int, model: nn.Module | None = None) -> Plan:
    x, y = digits()
    stream = Batches(x=x[:256], y=y[:256], batch_size=32)
    return Plan(model=model or small_model(), stream=stream, steps=steps, optimizer=adamw())


def test_the_rate_is_full_at_the_start_of_a_cycle_half_midway_and_nearly_zero_at_the_end():
    schedule = CSGLD(examples=9, every=1, cycles=3)(plan_of(24)).schedule
    rates = [schedule(k / 24) for k in range(24)]
    assert rates[:8] == rates[8:16] == rates[16:]
    assert rates[0] == 1
    assert rates[4] == pytest.approx(0.5)
    assert rates[7] == pytest.approx((1 - math.cos(math.pi / 8)) / 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50))
def test_every_cycle_has_the_same_rates_whatever_its_length(cycles, period):
    """Progress is a float; no rounding may move a step into another cycle."""
    steps = cycles * period
    schedule = CSGLD(examples=9, every=1, cycles=cycles, samples_per_cycle=1)(plan_of(steps)).schedule
    for k in range(steps):
        assert schedule(k / steps) == (1 + math.cos(math.pi * (k % period / period))) / 2


def test_without_noise_it_is_a_snapshot_ensemble_bit_for_bit():
    cold = CSGLD(examples=256, every=2, cycles=2, samples_per_cycle=2, lr=0.1, temperature=0.0)

    def warm_restarts(progress: float) -> float:
        return (1 + math.cos(math.pi * (round(20 * progress) % 10) / 10)) / 2

    plain = replace(plan_of(20), optimizer=sgd(0.1, momentum=0.0, weight_decay=3e-4), schedule=warm_restarts)
    snapshots = []
    plain = replace(
        plain, after_step=(lambda s: snapshots.append({n: v.clone() for n, v in s.model.state_dict().items()}),)
    )
    mine, theirs = fit(cold(plan_of(20)), device="cpu"), fit(plain, device="cpu")
    assert not difference(mine.model, theirs.model)
    assert not difference([m.state_dict() for m in cold.samples], [snapshots[k - 1] for k in (8, 10, 18, 20)])


def test_noise_comes_in_the_last_steps_of_a_cycle_only_at_the_size_of_their_rate():
    steps: dict[float, list[torch.Tensor]] = {}
    for temperature in (0.0, 0.3):
        seen = steps.setdefault(temperature, [])
        plan = CSGLD(examples=256, every=2, cycles=1, samples_per_cycle=2, temperature=temperature)(plan_of(10))
        keep = lambda s, seen=seen: seen.append(nn.utils.parameters_to_vector(s.model.parameters()).detach().clone())  # noqa: E731
        fit(replace(plan, after_step=(*plan.after_step, keep)), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(steps[0.0][:6], steps[0.3][:6], strict=True))
    noise = steps[0.3][6] - steps[0.0][6]
    declared = math.sqrt(2 * 0.5 * (1 + math.cos(0.6 * math.pi)) / 2 * 0.3 / 256)
    assert float(noise.std()) == pytest.approx(declared, rel=4 / math.sqrt(2 * len(noise)))


def test_the_published_noise_is_ours_at_its_temperature():
    """sqrt(2 l α) / B = sqrt(2 l T / N) at T = α N / B²: about 0.08 on CIFAR-10, 3.3 on 1,200 examples."""
    for rate, friction, n, batches in ((0.3, 1.0, 50_000, 782), (0.1, 0.1, 1_281_167, 5005), (0.15, 1.0, 1200, 19)):
        temperature = friction * n / batches**2
        assert math.sqrt(2 * rate * friction) / batches == pytest.approx(math.sqrt(2 * rate * temperature / n))
    assert round(50_000 / 782**2, 2) == 0.08
    assert round(1200 / 19**2, 1) == 3.3


@pytest.mark.parametrize(("burn_in", "steps"), [(0, [8, 10, 18, 20, 28, 30]), (2, [28, 30])])
def test_the_last_models_of_each_cycle_are_kept(burn_in, steps):
    sampler = CSGLD(examples=256, every=2, cycles=3, samples_per_cycle=2, burn_in_cycles=burn_in)
    model = fit(sampler(plan_of(30)), device="cpu").model
    assert sampler.samples.steps == steps
    assert not difference(sampler.samples[-1].state_dict(), model.state_dict())


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 9, 12])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path: Path, stop):
    def stopping(done: int, _all: int) -> None:
        if done == stop:
            raise Stop

    samplers = [CSGLD(examples=256, every=2, cycles=2, samples_per_cycle=2) for _ in range(3)]
    whole = fit(samplers[0](plan_of(12)), device="cpu")
    with pytest.raises(Stop):
        fit(samplers[1](plan_of(12)), device="cpu", checkpoint=tmp_path / "a", every=4, progress=stopping)
    again = fit(samplers[2](plan_of(12)), device="cpu", checkpoint=tmp_path / "a", every=4, resume=True)
    assert not difference(whole.model.state_dict(), again.model.state_dict())
    assert samplers[2].samples.steps == [4, 6, 10, 12]
    assert not difference(list(samplers[0].samples), list(samplers[2].samples))


def test_batch_statistics_belong_to_their_sample():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    sampler = CSGLD(examples=256, every=2, cycles=2, samples_per_cycle=1, lr=0.1)
    fit(sampler(plan_of(12, model)), device="cpu")
    one, two = sampler.samples
    assert [int(m[2].num_batches_tracked) for m in (one, two)] == [6, 12]
    assert not torch.equal(one[2].running_mean, two[2].running_mean)


def test_cycles_that_do_not_fit_are_refused():
    with pytest.raises(Refused, match="divide by 3 cycles"):
        CSGLD(examples=256, every=1, cycles=3)(plan_of(10))
    with pytest.raises(Refused, match="must hold its models"):
        CSGLD(examples=256, every=2, cycles=2)(plan_of(10))
