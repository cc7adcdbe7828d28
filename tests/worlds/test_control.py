"""The pendulums are gymnasium's, step by step; training makes them swing up."""

from __future__ import annotations

import pytest
import torch

from headstart.worlds.control import WEIGHTS, Pendulums, returns, starts, torques, train

gymnasium = pytest.importorskip("gymnasium")


@pytest.mark.parametrize(("gravity", "mass", "length"), [(10.0, 1.0, 1.0), (3.7, 0.2, 1.4), (20.0, 1.6, 0.5)])
def test_a_step_is_gymnasiums(gravity, mass, length):
    import numpy as np

    env = gymnasium.make("Pendulum-v1", g=gravity).unwrapped
    env.m, env.l = mass, length
    env.reset(seed=0)
    ours = Pendulums(
        **{
            k: torch.tensor(v, dtype=torch.float64)
            for k, v in (("gravity", gravity), ("mass", mass), ("length", length))
        }
    )
    rng = np.random.default_rng(0)
    angle, speed = (torch.tensor(v, dtype=torch.float64) for v in env.state)
    for _ in range(300):
        torque = rng.uniform(-3, 3)
        _, reward, *_ = env.step(np.array([torque]))
        angle, speed, mine = ours.step(angle, speed, torch.tensor(torque, dtype=torch.float64))
        assert (angle.item(), speed.item(), mine.item()) == pytest.approx((*env.state, reward), rel=1e-9, abs=1e-9)


def test_returns_are_those_of_the_environment():
    env = gymnasium.make("Pendulum-v1", g=6.0).unwrapped
    weights = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(1))
    begin = starts(3, torch.Generator().manual_seed(2))
    total = 0.0
    for state in begin:
        env.reset()
        env.state = state.double().numpy()
        for _ in range(20):
            angle, speed = torch.as_tensor(env.state, dtype=torch.float32)[:, None]
            total += env.step(torques(weights, angle, speed).numpy())[1]
    one = torch.ones(())
    ours = returns(weights, Pendulums(gravity=6 * one, mass=one, length=one), begin, steps=20)
    assert ours.item() == pytest.approx(total / 60, rel=1e-4)


def test_batches_are_as_one_by_one():
    g = torch.Generator().manual_seed(0)
    weights, begin = torch.randn(3, WEIGHTS, generator=g), starts(4, g)
    gravity, one = torch.tensor([5.0, 10.0]), torch.ones(2)
    whole = returns(weights[:, None], Pendulums(gravity=gravity, mass=one, length=one), begin, steps=15)
    for i in range(3):
        for j in range(2):
            alone = returns(weights[i], Pendulums(gravity=gravity[j], mass=one[j], length=one[j]), begin, steps=15)
            assert whole[i, j].item() == pytest.approx(alone.item(), rel=1e-4)


def test_training_is_repeatable_and_teaches():
    one = torch.ones(1)
    easy = Pendulums(gravity=3 * one, mass=0.5 * one, length=one)
    weights = train(easy, seed=0, rounds=12)
    assert torch.equal(weights, train(easy, seed=0, rounds=12))
    begin = starts(20, torch.Generator().manual_seed(5))
    assert returns(weights, easy, begin) > -2 > returns(torch.zeros(1, WEIGHTS), easy, begin)
