"""Noise schedules: known answers, and sampling that finds a distribution whose score is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headstart.core.rng import random_state, seeded
from headstart.core.validate import Refused
from headstart.nets.diffusion import Conditional, Denoiser, NoiseSchedule, ancestral
from headstart.nets.set_encoder import Prototypes

SCHEDULES = {"linear": NoiseSchedule.linear(), "rooted": NoiseSchedule.rooted()}
Z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def test_what_is_left_at_the_last_step():
    assert float(NoiseSchedule.rooted().kept[-1]) == pytest.approx(5.61e-4, abs=5e-7)
    assert float(NoiseSchedule.linear().kept[-1]) == pytest.approx(6.12e-3, abs=5e-6)
    assert [len(s.betas) for s in SCHEDULES.values()] == [200, 1024]


@each_schedule
def test_the_jump_to_a_step_has_the_mean_and_variance_of_the_walk(schedule):
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        steps = torch.full((1,), t)
        one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        assert schedule.noisy(one, none, steps).item() == pytest.approx(mean)
        assert schedule.noisy(none, one, steps).item() ** 2 == pytest.approx(variance)


@each_schedule
def test_the_true_noise_gives_the_clean_vector_back_at_every_step(schedule):
    for t in range(len(schedule.betas)):
        steps = torch.full((len(Z),), t)
        torch.testing.assert_close(schedule.clean(schedule.noisy(Z, NOISE, steps), NOISE, steps), Z)


@each_schedule
def test_the_last_step_adds_no_noise_and_ends_clean(schedule):
    noisy = schedule.noisy(Z, NOISE, torch.zeros(len(Z), dtype=torch.int64))
    torch.testing.assert_close(schedule.back(noisy, NOISE, 0, torch.full_like(Z, 1e9)), Z)


@each_schedule
@pytest.mark.parametrize("t", [1, 50, 199])
def test_a_step_back_is_the_posterior_given_the_clean_vector(schedule, t):
    beta, here, before = schedule.betas[t], schedule.kept[t], schedule.kept[t - 1]
    noisy = schedule.noisy(Z, NOISE, torch.full((len(Z),), t))
    mean = (before.sqrt() * beta * Z + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - here)
    fresh = NOISE.flip(0)
    expected = mean + (beta * (1 - before) / (1 - here)).sqrt() * fresh
    torch.testing.assert_close(schedule.back(noisy, NOISE, t, fresh), expected)


def test_sampling_finds_a_normal_distribution_whose_noise_is_known():
    schedule, mean, spread = NoiseSchedule.linear(), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        """E[noise | noisy] of N(mean, spread²)."""
        kept = schedule.kept.float()[t, None]
        return (1 - kept).sqrt() * (noisy - kept.sqrt() * mean) / (kept * spread**2 + 1 - kept)

    state = random_state()["torch"]
    found = ancestral(schedule, predict, (4000, 2), torch.Generator().manual_seed(0))
    again = ancestral(schedule, predict, (4000, 2), torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    assert torch.equal(state, random_state()["torch"])
    # standard errors are 0.024 and 0.017; 200 steps leave a bias of the same size
    torch.testing.assert_close(found.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(found.std(0), spread, atol=0.1, rtol=0)


def test_a_dropped_condition_says_nothing_but_which_piece():
    with seeded(0):
        model = Conditional(Prototypes(), Denoiser(2, 6 + 2), 2)
    sets = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    piece = torch.tensor([0, 1, 1])
    condition = model.condition(sets, piece, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(condition[:2, :6], sets.mean(2).flatten(1)[:2])
    assert condition[2, :6].tolist() == [0] * 6
    assert condition[:, 6:].tolist() == [[1, 0], [0, 1], [0, 1]]
    x = {"noisy": torch.zeros(3, 2), "time": torch.tensor([0, 5, 5]), "sets": sets, "piece": piece}
    seen, other = (model({**x, "sets": s, "kept": torch.tensor([1.0, 1.0, 0.0])}) for s in (sets, sets + 1))
    assert torch.equal(seen[2], other[2])
    assert not torch.equal(seen[1], other[1])


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [torch.nan]])
def test_shares_that_are_none_are_refused(betas):
    with pytest.raises(Refused, match="shares"):
        NoiseSchedule(betas=torch.tensor(betas))
    with pytest.raises(Refused, match="even"):
        Denoiser(2, 2, waves=3)
