"""MBTL: the card's known answers, the slow double loop, scikit-learn's process, and the plain ways beside it."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.choose import MBTL
from headstart.choose.transfer_matrix import (
    bisection,
    equidistant,
    expected_gain,
    gap_linearity,
    independent,
    learning_curve,
    oracle,
    random_curve,
    scaled,
    sequential_oracle,
    slopes_of,
)
from headstart.core.validate import Refused
from headstart.testing import contract


def rows_of(tasks: Tensor, chosen: Tensor) -> Tensor:
    """A family with a linear gap over two-dimensional contexts."""
    x = tasks.double()
    return (0.5 + 0.4 * x[chosen].mean(1, keepdim=True) - 0.2 * (x[chosen][:, None] - x).abs().sum(2)).clamp(0, 1)


REFUSES = [
    lambda: MBTL(slope=-1.0), lambda: MBTL(slope=()), lambda: MBTL(noise=0.0), lambda: MBTL(restarts=-1), lambda: MBTL(low=1.0, high=1.0),
    lambda: MBTL(mode="fast"), lambda: MBTL(exploration="max"),
]  # fmt: skip
test_contract = contract(MBTL(restarts=1), results=rows_of, refuses=REFUSES)
test_contract_paper = contract(MBTL(mode="paper", slope=(0.5, 0.1), restarts=0), results=rows_of)


def matrix(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    own = 0.4 + 0.5 * torch.rand(n, generator=g, dtype=torch.float64)
    noise = 0.03 * torch.randn(n, n, generator=g, dtype=torch.float64)
    return (own[:, None] - 0.4 * (x[:, None] - x).abs() + noise).clamp(0, 1)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 13])
def test_1_the_first_pick_is_the_middle(n):
    for seed in range(3):
        assert MBTL().select(matrix(n, seed), 1)[0] == [(n - 1) // 2]
    assert (
        MBTL().propose(
            torch.rand(9, 2) * 0.1
            + torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [0.45, 0.45], [0, 0], [0, 0], [1, 1], [1, 1]])
        )
        == 4
    )


@pytest.mark.parametrize("mode", ["robust", "paper"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_1_all_picks_are_a_permutation_that_ends_at_the_oracle(n, mode):
    j = matrix(n)
    chosen, curve = MBTL(mode=mode, restarts=1).select(j, n)
    assert sorted(chosen) == list(range(n))
    assert curve[-1].item() == pytest.approx(j.amax(0).mean().item(), abs=1e-12) == oracle(j)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 9), seed=st.integers(0, 99), mode=st.sampled_from(["robust", "paper"]))
def test_2_the_curve_rises_from_the_middle_row(n, seed, mode):
    j = matrix(n, seed)
    chosen, curve = MBTL(mode=mode, restarts=0).select(j, min(n, 3))
    assert curve[0].item() == pytest.approx(j[(n - 1) // 2].mean().item())
    assert bool((curve.diff() >= 0).all())
    assert len(set(chosen)) == len(chosen)
    torch.testing.assert_close(curve, learning_curve(j, chosen))


def test_3_without_slope_and_exploration_a_flat_forecast_gains_the_same_everywhere():
    best = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)
    gain = expected_gain(torch.full((3,), 0.5, dtype=torch.float64), torch.zeros(3, 3), best)
    assert gain.tolist() == pytest.approx([(0.4 + 0 + 0.1) / 3] * 3)
    sampler = MBTL(slope=0.0, exploration="none")
    x = torch.arange(5)
    sampler.observe(x[2:3], torch.tensor([[0.2, 0.9, 0.5, 0.1, 0.3]]))  # one point, centred: the mean is flat
    forecast = sampler.forecast(x)
    assert forecast.gain.tolist() == pytest.approx([(0.3 + 0 + 0 + 0.4 + 0.2) / 5] * 5)
    assert sampler.propose(x).tolist() == [0]  # the lowest index


def test_4_nothing_to_gain_explores_and_never_repeats():
    x = torch.linspace(0, 1, 9)
    sampler = MBTL(slope=0.5)
    sampler.observe(x[4:5], torch.ones(1, 9))
    forecast = sampler.forecast(x)
    assert forecast.gain.max() <= 0.02
    sampler = MBTL(slope=0.5, exploration="none")
    sampler.observe(x[[4, 0]], torch.ones(2, 9))
    forecast = sampler.forecast(x)
    assert forecast.gain.max() == 0
    spread = torch.where(torch.tensor([i not in (0, 4) for i in range(9)]), forecast.deviation, 0)
    assert sampler.propose(x).item() == int(spread.argmax()) == 8
    chosen, _ = MBTL(slope=0.5, exploration="none", restarts=0).select(torch.ones(9, 9), 9)
    assert sorted(chosen) == list(range(9))


def test_4_where_deviations_are_even_the_farthest_is_next(monkeypatch):
    even = lambda self, x, sources, reached: (torch.zeros(len(x)).double(), torch.ones(len(x)).double())  # noqa: E731
    monkeypatch.setattr(MBTL, "_posterior", even)
    sampler, x = MBTL(exploration="none"), torch.tensor([0.0, 1.0, 2.0, 9.0, 10.0])
    sampler.observe(x[[4, 0]], torch.ones(2, 5))
    assert sampler.propose(x).item() == 2


@pytest.mark.parametrize("theta", [0.1, 0.6, 0.9])
def test_5_closed_form_on_a_grid(theta):
    n, u = 2001, 0.9
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    gain = expected_gain(torch.full((n,), u, dtype=torch.float64), theta * (x[:, None] - x).abs(), torch.zeros(n))
    expected = u - theta * (x.square() + (1 - x).square()) / 2
    torch.testing.assert_close(gain, expected, rtol=0, atol=1e-3)
    assert int(gain.argmax()) == 1000


@pytest.mark.parametrize("n", [3, 8])
def test_6_gains_equal_the_double_loop(n):
    g = torch.Generator().manual_seed(n)
    x, theta = torch.rand(n, 2, generator=g).double(), torch.tensor([0.4, 0.7]).double()
    mean, sd, best = (torch.rand(n, generator=g).double() for _ in range(3))
    slow = []
    for i in range(n):
        total = 0.0
        for j in range(n):
            fall = sum(float(theta[d]) * abs(float(x[i, d] - x[j, d])) for d in range(2))
            total += max(float(mean[i]) + 0.83 * float(sd[i]) - fall - float(best[j]), 0.0)
        slow.append(total / n)
    falls = ((x[:, None] - x).abs() * theta).sum(2)
    np.testing.assert_allclose(expected_gain(mean + 0.83 * sd, falls, best).numpy(), slow, atol=1e-12)


@pytest.mark.parametrize("mode", ["robust", "paper"])
def test_6_the_forecast_equals_a_slow_restatement(mode):
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    n, chosen = 12, [5, 1, 9]
    j, x = matrix(n), np.arange(12.0)
    sampler = MBTL(mode=mode, slope=0.5)
    sampler.observe(torch.arange(n)[chosen], j[chosen])
    forecast = sampler.forecast(torch.arange(n))
    reached = [max(float(j[s, chosen[k]]) for s in chosen[: k + 1]) for k in range(3)]
    paper = mode == "paper"
    kernel = ConstantKernel(1, (1e-3, 1e3)) * (RBF(1, (1e-2, 1e2)) if paper else RBF(0.2, (0.05, 0.5)))
    points = x if paper else x / 11
    gp = GaussianProcessRegressor(kernel, alpha=0.01 if paper else 0.0009, n_restarts_optimizer=9, random_state=0)
    centre = 0.0 if paper else np.mean(reached)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length at its bound
        gp.fit(points[chosen, None], np.array(reached) - centre)
    # the posterior by hand, with the kernel that was fitted
    k = gp.kernel_(points[chosen, None]) + (0.01 if paper else 0.0009) * np.eye(3)
    across = gp.kernel_(points[:, None], points[chosen, None])
    mean = across @ np.linalg.solve(k, np.array(reached) - centre) + centre
    var = gp.kernel_.diag(points[:, None]) - np.einsum("ij,ji->i", across, np.linalg.solve(k, across.T))
    np.testing.assert_allclose(forecast.mean.numpy(), mean, atol=1e-8)
    np.testing.assert_allclose(forecast.deviation.numpy(), np.sqrt(var), atol=1e-6)
    optimistic = mean + math.sqrt(math.log(4)) * np.sqrt(var)
    best = j[chosen].amax(0).numpy()
    slow = [np.mean([max(optimistic[a] - 0.5 * abs(a - b) / 11 - best[b], 0) for b in range(n)]) for a in range(n)]
    np.testing.assert_allclose(forecast.gain.numpy(), slow, atol=1e-6)


def test_7_identical_rows_leave_no_regret_after_one_pick():
    j = torch.rand(8, generator=torch.Generator().manual_seed(0)).double().expand(8, 8)
    _, curve = MBTL().select(j, 4)
    assert curve.tolist() == pytest.approx([oracle(j)] * 4)


def test_exploration_weighs_the_deviation_by_the_pick():
    x, j = torch.arange(6), matrix(6)
    forecasts = {}
    for name in ("none", "one", "log", "inverse"):
        sampler = MBTL(slope=0.0, exploration=name)
        sampler.observe(x[[2, 0]], j[[2, 0]])
        forecasts[name] = sampler.forecast(x)
    f = forecasts["one"]
    for name, weight in (("none", 0.0), ("one", 1.0), ("log", math.sqrt(math.log(3))), ("inverse", 1 / 3)):
        expected = expected_gain(f.mean + weight * f.deviation, torch.zeros(6, 6), j[[2, 0]].amax(0))
        torch.testing.assert_close(forecasts[name].gain, expected)


def test_slopes_are_per_unit_of_the_scaled_contexts_whatever_the_unit():
    j = matrix(9)
    for slope in (None, 0.4):
        grid = MBTL(slope=slope, restarts=0).select(j, 4)[0]
        assert MBTL(slope=slope, restarts=0).select(j, 4, torch.linspace(0.1, 250.0, 9, dtype=torch.float64))[0] == grid
    x = scaled(torch.arange(9))
    gaps, apart = (
        (j[[4, 1]].gather(1, torch.tensor([[4], [1]])) - j[[4, 1]]).flatten(),
        (x[[4, 1]] - x[:, 0]).abs().flatten(),
    )
    slope = slopes_of(None, x, [4, 1], j[[4, 1]], of_nearest=False)
    assert slope.flatten().tolist() == pytest.approx([max(float(gaps @ apart / (apart @ apart)), 1e-6)] * 9)


def test_slopes_as_released_are_the_nearest_sources_own_lines():
    j, x = matrix(9), scaled(torch.arange(9))
    slope = slopes_of(None, x, [1, 7], j[[1, 7]], of_nearest=True)[:, 0]
    lines = [np.polyfit(np.abs(np.arange(9) - s) / 8, np.abs(j[s] - j[s, s]).numpy(), 1)[0] for s in (1, 7)]
    assert slope.tolist() == pytest.approx([max(lines[0 if i <= 4 else 1], 1e-6) for i in range(9)])


def test_weighted_l1_for_vectors_recovers_slopes_and_needs_as_many():
    x = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = scaled(x)
    j = 0.9 - ((u[:, None] - u).abs() * torch.tensor([0.3, 0.05])).sum(2)
    torch.testing.assert_close(
        slopes_of(None, u, [3, 8], j[[3, 8]], of_nearest=False)[0], torch.tensor([0.3, 0.05]).double()
    )
    known, estimated = MBTL(slope=(0.3, 0.05), restarts=1), MBTL(restarts=1)
    assert known.select(j, 5, x)[0] == estimated.select(j, 5, x)[0]
    with pytest.raises(Refused, match="one for each of 2 dimensions; got 3"):
        MBTL(slope=(1.0, 1.0, 1.0)).select(j, 2, x)


def test_crashed_trainings_count_as_the_lowest_and_are_not_repeated():
    j = matrix(7)
    j[3], j[5, 2] = torch.nan, torch.nan
    chosen, curve = MBTL(restarts=0).select(j, 7)
    assert sorted(chosen) == list(range(7))
    assert curve[0] == 0
    torch.testing.assert_close(curve, learning_curve(j.nan_to_num(0.0), chosen))


def test_performance_outside_its_bounds_is_refused_and_bounds_are_scaled():
    j = matrix(8)
    with pytest.raises(Refused, match=r"must lie in 0.0..1.0; got .*low="):
        MBTL().select(j * 100 - 50, 3)
    assert (
        MBTL(low=-50, high=50, slope=0.4, restarts=0).select(j * 100 - 50, 4)[0]
        == MBTL(slope=0.4, restarts=0).select(j, 4)[0]
    )
    with pytest.raises(Refused, match="negate costs"):
        MBTL().select(-j, 3)


def test_noise_and_twins_are_carried():
    x = torch.tensor([0.0, 0.5, 0.5, 0.5, 1.0])
    j = matrix(5)
    assert sorted(MBTL(restarts=0).select(j, 5, x)[0]) == list(range(5))
    assert MBTL(mode="paper").select(j, 5, x)[0][0] == 1


def test_online_use_says_which_policy_serves_which_context():
    x, j = torch.linspace(2, 4, 9), matrix(9)
    sampler, chosen = MBTL(slope=0.4, restarts=0), []
    with pytest.raises(Refused, match="needs observed rows"):
        sampler.assignment()
    with pytest.raises(Refused, match="needs observed rows"):
        sampler.forecast(x)
    for _ in range(4):
        pick = sampler.propose(x)
        assert torch.equal(pick, sampler.propose(x))  # asking again changes nothing
        sampler.observe(x[pick], j[pick])
        chosen += pick.tolist()
    assert chosen == MBTL(slope=0.4, restarts=0).select(j, 4)[0]
    assert torch.equal(sampler.assignment(), j[chosen].argmax(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MBTL().select(matrix(4), 5), "budget must be 1..4"), (lambda: MBTL().select(matrix(4), 0), "budget"),
        (lambda: MBTL().select(matrix(4), 2, torch.arange(5)), "one context for each row"),
        (lambda: MBTL().propose(["a", "b"]), "Embed contexts"), (lambda: MBTL().propose(torch.tensor([True])), "Embed"),
        (lambda: MBTL().propose(torch.zeros(0)), "shape"), (lambda: MBTL().propose(torch.zeros(2, 2, 2)), "shape"),
        (lambda: MBTL().propose(torch.tensor([0.0, torch.nan])), "finite"),
        (lambda: MBTL().observe(torch.zeros(2), torch.zeros(2)), "2 rows"),
    ],
)  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(Refused, match=message):
        call()


def test_refuses_contexts_that_change_on_the_way():
    sampler, x = MBTL(), torch.arange(4.0)
    sampler.observe(x[:1], torch.ones(1, 4))
    for call, message in (
        (lambda: sampler.observe(x[1:2], torch.ones(1, 5)), "must have 4 contexts; got 5"),
        (lambda: sampler.propose(x + 1), "among the contexts"),
        (lambda: sampler.propose(torch.arange(5.0)), "Rows have 4 contexts; got 5"),
    ):
        with pytest.raises(Refused, match=message):
            call()
    sampler.observe(x[1:], torch.ones(3, 4))
    with pytest.raises(Refused, match="4 of 4 trained"):
        sampler.propose(x)


# the plain ways beside it


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 50))
def test_random_is_the_mean_over_all_draws(n, seed):
    j = matrix(n, seed)
    slow = [np.mean([j[list(s)].amax(0).mean() for s in itertools.combinations(range(n), k)]) for k in range(1, n + 1)]
    np.testing.assert_allclose(random_curve(j, n).numpy(), slow, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), data=st.data())
def test_spaced_sources_are_different_and_spread(n, data):
    k = data.draw(st.integers(1, n))
    for chosen in (equidistant(n, k), bisection(n, k)):
        assert len(set(chosen)) == k
        assert set(chosen) <= set(range(n))
    gaps = np.diff([-0.5, *equidistant(n, k), n - 0.5])
    assert max(gaps) <= n / k + 1


def test_bisection_by_hand_and_the_oracles():
    assert bisection(31, 5) == [15, 5, 25, 10, 20]
    j = matrix(7)
    chosen = sequential_oracle(j, 3)
    assert chosen[0] == int(j.mean(1).argmax())
    assert chosen[1] == max(range(7), key=lambda i: torch.maximum(j[i], j[chosen[0]]).mean().item())
    assert independent(j) == pytest.approx(np.mean([float(j[i, i]) for i in range(7)]))
    assert learning_curve(j, sequential_oracle(j, 7))[-1].item() == pytest.approx(oracle(j))
    with pytest.raises(Refused, match="budget"):
        random_curve(j, 8)
    with pytest.raises(Refused, match=r"\(n, n\)"):
        oracle(j[:3])


def test_linearity_is_measured():
    x = torch.linspace(0, 1, 15, dtype=torch.float64)
    d = x[:, None] - x
    straight = gap_linearity(x, [3, 7, 12], (0.9 - 0.5 * d.abs())[[3, 7, 12]])
    assert (straight.slope, straight.r2, straight.one_sidedness, straight.linear) == (0.5, 1.0, 0.0, True)
    one_sided = gap_linearity(x, range(15), 0.9 - 0.5 * d.clamp(min=0))
    assert one_sided.one_sidedness == pytest.approx(1.0)
    assert not one_sided.linear
    flat = gap_linearity(x, range(15), torch.full((15, 15), 0.7))
    assert (flat.r2, flat.one_sidedness, flat.linear) == (0.0, 0.0, False)
    noise = gap_linearity(x, range(15), torch.rand(15, 15, generator=torch.Generator().manual_seed(0)))
    assert noise.r2 < 0.3
    assert not noise.linear
    with pytest.raises(Refused, match=r"\(2, 15\)"):
        gap_linearity(x, [0, 1], torch.ones(2, 14))
