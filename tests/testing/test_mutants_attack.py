"""Each check of attacks rejects an attack made wrong in that one way; right minimal attacks pass all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient
from headstart.testing.attack import ATTACK
from headstart.testing.every import EVERY
from headstart.testing.subject import Subject


@dataclass(frozen=True)
class Ascent:
    radius: float = 0.1
    norm: str = "linf"

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        ball = Ball(self.radius, self.norm)  # type: ignore[arg-type]
        return ascend(x, partial(goal_gradient, goals), ball=ball, steps=4, step_size=self.radius / 3)


@dataclass(frozen=True)
class WithBall:
    """Declares its ball as one field."""

    ball: Ball = Ball(0.1)  # noqa: RUF009 - frozen

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        gradient = partial(goal_gradient, goals)
        return ascend(x, gradient, ball=self.ball, steps=4, step_size=self.ball.radius / 3)


def after(change: Callable[[Tensor, Tensor, float], Tensor]) -> type:
    """An attack whose result is changed: change(x, moved, radius)."""

    class Mutant(Ascent):
        def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
            return change(x, super().perturb(x, goals), self.radius)

    return Mutant


def before(change: Callable[[Tensor, Sequence[Goal]], tuple[Tensor, Sequence[Goal]]]) -> type:
    """An attack on other inputs or goals: change(x, goals)."""

    class Mutant(Ascent):
        def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
            return super().perturb(*change(x, goals))

    return Mutant


class Pooled(Ascent):
    """Scales its step by the gradient of the whole batch."""

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        gradient = goal_gradient(goals, x)
        step = gradient / gradient.abs().max().clamp_min(1e-30) * self.radius
        return Ball(self.radius).clip(x, x + step, (0.0, 1.0))


class GivesUpOnGoals(Ascent):
    """Targets are not what it raises: only ever the first sign it saw."""

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        moved = super().perturb(x, goals)
        with torch.no_grad():
            worse = goals[0](moved).sum() < 0  # a targeted goal is negative
        return 2 * x - moved if worse and self.radius and float((2 * x - moved).min()) >= 0 else x if worse else moved


class Backward(Ascent):
    """Leaves gradients in the surrogate's weights."""

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        goals[0](x).sum().backward()
        return super().perturb(x, goals)


class Graph(Ascent):
    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        return super().perturb(x, goals).requires_grad_()


class Clamps(Ascent):
    """Makes any radius fit instead of refusing it."""

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        return Ascent(min(max(self.radius, 0.0), 1.0)).perturb(x, goals)


MUTANTS: dict[str, list[type]] = {
    "inside_ball_and_bounds": [
        after(lambda x, a, r: (x + (a - x) * 1.00001).clamp(0, 1)), after(lambda x, a, r: x + r * (a - x).sign()),
        after(lambda x, a, r: a.flatten(1)), after(lambda x, a, r: a - 2e-7),
    ],
    "radius_zero_stays": [after(lambda x, a, r: (a + 1e-7).clamp(0, 1)), after(lambda x, a, r: a * 0.999999)],
    "examples_are_independent": [Pooled, after(lambda x, a, r: x + (a - x) * float((a - x).abs().mean() / r))],
    "optimum_of_a_linear_model": [
        after(lambda x, a, r: x + (a - x) * 0.999), after(lambda x, a, r: torch.where(torch.arange(8) < 4, a, x)),
    ],
    "raises_the_goal": [after(lambda x, a, r: x), after(lambda x, a, r: (2 * x - a).clamp(0, 1))],
    "targeted_raises_the_target": [
        before(lambda x, goals: (x, [lambda a, g=goal: g(a).abs() for goal in goals])), GivesUpOnGoals,
    ],
    "all_surrogates_count": [before(lambda x, goals: (x, goals[:1])), before(lambda x, goals: (x, goals[-1:]))],
    "models_untouched": [Backward, Graph],
    "radius_is_checked": [Clamps],
}  # fmt: skip


def check_of(name: str):
    (check,) = [check for check in (*ATTACK.checks, *EVERY) if check.name == name]
    return check


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in ATTACK.checks}


@pytest.mark.parametrize("check", ATTACK.checks, ids=lambda check: check.name)
@pytest.mark.parametrize("make", [Ascent, lambda: Ascent(norm="l2"), WithBall, lambda: WithBall(Ball(0.02, "l2"))])
def test_right_methods_pass(check, make: Callable) -> None:
    check.run(Subject(make=make, kind=ATTACK))


@pytest.mark.parametrize(("name", "make"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, make: type) -> None:
    with pytest.raises(AssertionError):
        check_of(name).run(Subject(make=make, kind=ATTACK))


def unchecked(self: Ascent, x: Tensor, goals: Sequence[Goal]) -> Tensor:
    """No input is looked at."""
    moved = x + self.radius * torch.nan_to_num(goal_gradient(goals, x.float())).sign() if goals and len(x) else x
    return moved.nan_to_num().clamp(0, 1)


@pytest.mark.parametrize("name", ["bad_input_refused", "nan_is_not_hidden"])
def test_the_checks_of_every_method_see_attacks(name: str) -> None:
    check_of(name).run(Subject(make=Ascent, kind=ATTACK))
    with pytest.raises(AssertionError):
        check_of(name).run(Subject(make=type("Mutant", (Ascent,), {"perturb": unchecked}), kind=ATTACK))
