"""Pendulums with varied physics: gymnasium's Pendulum-v1, many at once, and a cheap way to train policies on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = 8
WEIGHTS = 5 * HIDDEN + 1
_MOST_TORQUE, _MOST_SPEED, _SECONDS = 2.0, 8.0, 0.05


@dataclass(frozen=True, kw_only=True)
class Pendulums:
    """Physics of many pendulums; the fields broadcast against states (..., 2) without their last axis."""

    gravity: Tensor
    mass: Tensor
    length: Tensor

    def step(self, angle: Tensor, speed: Tensor, torque: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Angle (0 is up) and speed after 0.05 s, and the reward, at most 0: the equations of Pendulum-v1."""
        torque = torque.clamp(-_MOST_TORQUE, _MOST_TORQUE)
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        reward = -(off.square() + 0.1 * speed.square() + 0.001 * torque.square())
        pull = 3 * self.gravity / (2 * self.length) * angle.sin() + 3 / (self.mass * self.length.square()) * torque
        speed = (speed + pull * _SECONDS).clamp(-_MOST_SPEED, _MOST_SPEED)
        return angle + speed * _SECONDS, speed, reward


def starts(n: int, generator: torch.Generator) -> Tensor:
    """States (n, 2) as Pendulum-v1 begins: any angle, speed in [-1, 1]."""
    return (2 * torch.rand(n, 2, generator=generator) - 1) * torch.tensor([math.pi, 1.0])


def torques(weights: Tensor, angle: Tensor, speed: Tensor) -> Tensor:
    """What small perceptrons (..., WEIGHTS) do in states (..., s) of what gymnasium shows: cos, sin, speed / 4, 1."""
    enter, leave, bias = weights.split([4 * HIDDEN, HIDDEN, 1], dim=-1)  # type: ignore[no-untyped-call]
    seen = torch.stack([angle.cos(), angle.sin(), speed / 4, torch.ones_like(speed)], -1)  # (..., s, 4)
    hidden = (seen @ enter.unflatten(-1, (4, HIDDEN))).tanh()
    torque: Tensor = _MOST_TORQUE * ((hidden * leave[..., None, :]).sum(-1) + bias).tanh()
    return torque


def returns(weights: Tensor, physics: Pendulums, begin: Tensor, steps: int = 200) -> Tensor:
    """Mean reward of a step, of policies (..., WEIGHTS) on pendulums (...), over the starting states (s, 2)."""
    shape = (weights[..., 0] + physics.gravity).shape
    wide = Pendulums(gravity=physics.gravity[..., None], mass=physics.mass[..., None], length=physics.length[..., None])
    angle, speed = (column.expand(*shape, len(begin)) for column in begin.T)
    total = torch.zeros(*shape, len(begin))
    for _ in range(steps):
        angle, speed, reward = wide.step(angle, speed, torques(weights, angle, speed))
        total = total + reward
    return total.mean(-1) / steps


def train(physics: Pendulums, *, seed: int, rounds: int = 30, policies: int = 48, episodes: int = 8) -> Tensor:
    """A policy for each pendulum (n, WEIGHTS) by the cross-entropy method: sample, keep a sixth, narrow down."""
    generator = torch.Generator().manual_seed(seed)
    alone = Pendulums(gravity=physics.gravity[:, None], mass=physics.mass[:, None], length=physics.length[:, None])
    mean = torch.zeros(len(physics.gravity), WEIGHTS)
    spread = torch.full_like(mean, 1.5)
    for _ in range(rounds):
        noise = torch.randn(len(mean), policies, WEIGHTS, generator=generator)
        tried = mean[:, None] + spread[:, None] * noise
        best = returns(tried, alone, starts(episodes, generator)).topk(policies // 6, 1).indices
        kept = tried.gather(1, best[..., None].expand(-1, -1, WEIGHTS))
        mean, spread = kept.mean(1), 0.5 * spread + 0.5 * kept.std(1) + 0.02
    return mean
