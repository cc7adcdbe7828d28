"""Choosing sources by a model of transfer: on the family it assumes, and on pendulums with varied physics."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.choose.mbtl import MBTL
from headstart.choose.mbtl import PAPER as PAPER
from headstart.choose.transfer_matrix import (
    bisection,
    equidistant,
    gap_linearity,
    independent,
    learning_curve,
    oracle,
    random_curve,
    sequential_oracle,
)
from headstart.core.claim import Claim
from headstart.worlds import control

LINEAR, MASS, WEIGHT = "linear family", "pendulum, mass", "pendulum, gravity at equal weight"


def _area(where: str, than: str, says: str, better: str = "MBTL") -> Claim:
    return Claim(says=says, metric=f"area, {where}", better=better, than=than, seeds=8)


CLAIMS = (
    _area(LINEAR, "random", "Where the gap is linear, the area under MBTL's curve of ten picks is above random's."),
    Claim(
        says="There it is above the expected area of random on at least seven of eight seeds.",
        metric=f"above random, {LINEAR}",
        better="MBTL",
        than="six of eight",
        seeds=8,
    ),
    _area(LINEAR, "bisection", "There it is above nested bisection on average."),
    _area(LINEAR, "random", "So it is with the slope estimated from the rows.", better="MBTL, slope estimated"),
    _area(MASS, "random", "Pendulum-v1 with masses of 0.03 to 1.6: MBTL is above random."),
    _area(MASS, "bisection", "Pendulum-v1 with masses of 0.03 to 1.6: MBTL is above nested bisection."),
    _area(WEIGHT, "random", "Pendulum-v1 with gravity of 2.5 to 25 at equal weight: MBTL is above random."),
    _area(
        WEIGHT, "bisection", "Pendulum-v1 with gravity of 2.5 to 25 at equal weight: MBTL is above nested bisection."
    ),
)
NOTE = (
    "On pendulums MBTL is no better than random sources: ahead on 4 of 8 seeds (mass) and 5 of 8 (gravity at equal "
    "weight), by 0.002 and 0.001 on average, with intervals ten times as wide; two claims hold by that much only. The "
    "reason is measured: a line explains 0.89 of the spread of the gap in the linear family, but 0.19 and 0.18 here. "
    "With mass, performance falls to one side only (one-sidedness 0.71). With gravity at equal weight it falls to both "
    "(0.07), but policies a few contexts apart differ by the luck of their training (0.64 and 0.91 on one seed) more "
    "than by distance. Greedy choice on the true matrix is 0.06 and 0.10 above random, so there is something to gain. "
    "Check the gap first (gap_linearity). On two seeds each, other ranges of gravity, mass and length reached at most "
    "0.38 of the spread."
)
CONTEXTS = 20


def linear(seed: int, n: int = 50) -> Tensor:
    """A transfer matrix as the method assumes: a smooth set point less 0.6 times the distance, and noise of 0.03."""
    g = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    kernel = (-0.5 * ((x[:, None] - x) / 0.12).square()).exp() + 1e-6 * torch.eye(n, dtype=torch.float64)
    own = 0.8 + 0.25 * torch.linalg.cholesky(kernel) @ torch.randn(n, generator=g, dtype=torch.float64)
    noise = 0.03 * torch.randn(n, n, generator=g, dtype=torch.float64)
    matrix: Tensor = own.clamp(0, 1)[:, None] - 0.6 * (x[:, None] - x).abs() + noise
    return matrix.clamp(0, 1)


def pendulums(where: str) -> control.Pendulums:
    """The physics; contexts are evenly spaced in the logarithm of the mass, or of the gravity."""
    one, even = torch.ones(CONTEXTS), torch.linspace
    if where == MASS:
        return control.Pendulums(gravity=10 * one, mass=10 ** even(-1.5, 0.2, CONTEXTS), length=one)
    by = 10 ** even(-0.6, 0.4, CONTEXTS)
    return control.Pendulums(gravity=10 * by, mass=one / by, length=one)


def swings(where: str, seed: int) -> Tensor:
    """How well a policy trained on each pendulum does on each: mean reward of a step, -10 to 0 scaled to [0, 1]."""
    physics = pendulums(where)
    policies = control.train(physics, seed=seed, rounds=24)
    begin = control.starts(20, torch.Generator().manual_seed(1000 + seed))
    return (1 + control.returns(policies[:, None], physics, begin) / 10).clamp(0, 1).double()


def run(seed: int) -> dict[str, dict[str, float]]:
    """The area under the curve of ten picks of fifty, and of eight picks of twenty pendulums."""
    arms: dict[str, dict[str, float]] = {"six of eight": {f"above random, {LINEAR}": 0.75}}
    for where, matrix, budget in (
        (LINEAR, linear(seed), 10), (MASS, swings(MASS, seed), 8), (WEIGHT, swings(WEIGHT, seed), 8),
    ):  # fmt: skip
        n, known = len(matrix), 0.6 if where == LINEAR else None
        areas = {
            "MBTL": MBTL(slope=known).select(matrix, budget)[1],
            "MBTL as released": MBTL(mode="paper", slope=known or 0.5).select(matrix, budget)[1],
            "random": random_curve(matrix, budget),
            "bisection": learning_curve(matrix, bisection(n, budget)),
            "greedy on the true matrix": learning_curve(matrix, sequential_oracle(matrix, budget)),
        }
        if known:
            areas["MBTL, slope estimated"] = MBTL().select(matrix, budget)[1]
        for arm, curve in areas.items():
            arms.setdefault(arm, {})[f"area, {where}"] = float(curve.mean())
        arms["MBTL"][f"above random, {where}"] = float(areas["MBTL"].mean() > areas["random"].mean())
        found = gap_linearity(torch.arange(n), range(n), matrix)
        arms.setdefault("family", {}).update({
            f"r2 of the gap, {where}": found.r2, f"slope, {where}": found.slope,
            f"one-sidedness, {where}": found.one_sidedness, f"independent, {where}": independent(matrix),
            f"oracle, {where}": oracle(matrix),
            f"{budget} equidistant, {where}": float(learning_curve(matrix, equidistant(n, budget))[-1]),
        })  # fmt: skip
    return arms
