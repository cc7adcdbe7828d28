"""SWAG: mean and covariance of a known path are numpy's, draws have them, and a run that stopped goes on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headstart.attack import SWAG
from headstart.attack.swag import Trajectory
from headstart.core.loop import fit
from headstart.core.plan import Plan, sgd
from headstart.core.rng import random_state
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.testing import contract
from headstart.testing.material import digits, small_model
from headstart.testing.subject import difference

test_contract = contract(
    SWAG(every=1),
    refuses=[lambda: SWAG(every=0), lambda: SWAG(every=1, start=1.0), lambda: SWAG(every=1, rank=1),
             lambda: SWAG(every=1).draw(1)],
)  # fmt: skip


def along(path: np.ndarray, rank: int) -> SWAG:
    """A SWAG that has seen a linear layer's weights take the rows of `path`."""
    model = nn.Linear(path.shape[1], 1, bias=False).double()
    swag = SWAG(every=1, rank=rank)
    swag.trajectory.template = model
    for row in path:
        model.weight.data = torch.tensor(row)[None]
        swag.trajectory.take(model, rank)
    return swag


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(2, 8), st.integers(0, 99), st.sampled_from([0.0, 1e6]))
def test_mean_variance_and_deviations_are_those_of_numpy(n, width, rank, seed, offset):
    """Also far from zero, where the mean of squares minus the squared mean has lost every digit."""
    path = np.random.default_rng(seed).normal(size=(n, width)) + offset
    kept = along(path, rank).trajectory
    assert kept.count == n
    np.testing.assert_allclose(kept.mean["weight"][0], path.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kept.squares["weight"][0] / n, path.var(0), rtol=1e-6, atol=1e-9)
    columns = np.stack([path[i] - path[: i + 1].mean(0) for i in range(n)])[-rank:]
    np.testing.assert_allclose(kept.deviations["weight"][:, 0], columns, rtol=1e-6, atol=1e-8)


def test_draws_have_the_mean_and_the_covariance_of_the_paper():
    path = np.random.default_rng(0).normal(size=(12, 3)) @ np.array([[1.0, 0.8, 0], [0, 0.5, -0.7], [0, 0, 0.2]])
    swag, rank, n = along(path, 5), 5, 6_000
    columns = np.stack([path[i] - path[: i + 1].mean(0) for i in range(12)])[-rank:].T
    covariance = (np.diag(path.var(0)) + columns @ columns.T / (rank - 1)) / 2
    generator = torch.Generator().manual_seed(0)
    drawn = np.stack([swag._point(1.0, generator)["weight"][0].numpy() for _ in range(n)])
    doubt = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / n)
    assert (np.abs(drawn.mean(0) - path.mean(0)) <= 4 * np.sqrt(np.diag(covariance) / n)).all()
    assert (np.abs(np.cov(drawn.T) - covariance) <= 4 * doubt).all()


def test_the_two_parts_of_the_noise_lie_together_in_all_layers():
    """With equal paths in two tensors the low-rank part moves both alike: the correlation is that of the paper."""
    model, trajectory, rank = nn.Linear(1, 1).double(), Trajectory(), 4
    for value in (0.0, 1.0, 3.0, 2.0, 5.0):
        for p in model.parameters():
            p.data.fill_(value)
        trajectory.take(model, rank)
    swag, generator = SWAG(every=1, rank=rank, trajectory=trajectory), torch.Generator().manual_seed(1)
    drawn = [swag._point(1.0, generator) for _ in range(2000)]
    both = np.array([[float(d["weight"]), float(d["bias"])] for d in drawn])
    low = float(trajectory.deviations["bias"].square().sum()) / (rank - 1)
    expected = low / (low + float(trajectory.squares["bias"]) / 5)
    assert np.corrcoef(both.T)[0, 1] == pytest.approx(expected, abs=4 / math.sqrt(2000))


def plan_of(steps: int = 12, model: nn.Module | None = None) -> Plan:
    x, y = digits()
    stream = Batches(x=x[:256], y=y[:256], batch_size=32)
    return Plan(model=model or small_model(), stream=stream, steps=steps, optimizer=sgd(0.05))


def test_training_stays_as_it_was_and_the_path_is_that_of_the_run():
    swag, seen = SWAG(every=3, start=0.5), []
    plan = plan_of()
    plain = Plan(model=plan.model, stream=plan.stream, steps=12, optimizer=plan.optimizer,
                 after_step=(lambda s: seen.append(s.model.head.weight.detach().clone()),))  # fmt: skip
    assert not difference(fit(plain, device="cpu").model, fit(swag(plan), device="cpu").model)
    assert swag.trajectory.count == 2
    assert torch.allclose(swag.trajectory.mean["head.weight"], (seen[8] + seen[11]) / 2, atol=1e-7)


def test_draws_follow_the_seed_the_scale_and_leave_random_state_alone():
    swag = SWAG(every=2, start=0.0)
    fit(swag(plan_of()), device="cpu")
    before = random_state()
    one, two, other = swag.draw(2, seed=3), swag.draw(2, seed=3), swag.draw(1, seed=4)
    assert not difference(before, random_state())
    assert not difference(one, two)
    assert difference(one[0], one[1])
    assert difference(one[0], other[0])
    (mean,) = swag.draw(1, scale=0.0)
    assert torch.equal(mean.head.weight, swag.trajectory.mean["head.weight"])
    assert not mean.training
    assert not any(p.requires_grad for p in mean.parameters())


def test_batch_statistics_are_estimated_anew_for_each_draw():
    swag, plan = SWAG(every=2), plan_of(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))
    )  # fmt: skip
    fit(swag(plan), device="cpu")
    with pytest.raises(Refused, match="need stream="):
        swag.draw(1)
    before = random_state()
    one, two = swag.draw(2, stream=plan.stream, batches=8)
    assert not difference(before, random_state())
    x = digits()[0][:256].flatten(1)
    for model in (one, two):
        inner = model[1](x)
        assert torch.allclose(model[2].running_mean, inner.mean(0), atol=1e-5)  # eight batches are all examples once
        assert not model.training


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 9, 12])
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path: Path, stop):
    def stopping(done: int, _all: int) -> None:
        if done == stop:
            raise Stop

    swags = [SWAG(every=2, start=0.2, rank=3) for _ in range(3)]
    whole = fit(swags[0](plan_of()), device="cpu")
    with pytest.raises(Stop):
        fit(swags[1](plan_of()), device="cpu", checkpoint=tmp_path / "a", every=4, progress=stopping)
    again = fit(swags[2](plan_of()), device="cpu", checkpoint=tmp_path / "a", every=4, resume=True)
    assert not difference(whole.model.state_dict(), again.model.state_dict())
    assert swags[0].trajectory.count == 4
    assert not difference(swags[0].draw(2), swags[2].draw(2))


def test_half_precision_is_averaged_in_float32_and_given_back_as_it_was():
    model, trajectory = nn.Linear(1, 1, bias=False).half(), Trajectory()
    for value in (1.0, 1.0009765625):  # neighbours in float16
        model.weight.data.fill_(value)
        trajectory.take(model, 2)
    assert float(trajectory.mean["weight"]) == 1.00048828125
    trajectory.template = model
    assert SWAG(every=1, trajectory=trajectory).draw(1)[0].weight.dtype == torch.float16


def test_what_means_nothing_is_refused():
    with pytest.raises(Refused, match="two points"):
        SWAG(every=4)(plan_of(12))
    swag = SWAG(every=2)
    fit(swag(plan_of()), device="cpu")
    for wrong in (
        {"count": 0},
        {"count": 1, "scale": -1.0},
        {"count": 1, "scale": math.nan},
        {"count": 1, "batches": 0},
    ):
        with pytest.raises(Refused, match="draw needs"):
            swag.draw(**wrong)
