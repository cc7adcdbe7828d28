"""Training on the tasks predicted to be hard does better in the worst cases, at as many evaluations: sinusoids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.choose.mpts import MPTS
from headstart.choose.mpts import PAPER as PAPER
from headstart.choose.risk_learner import tail_risk
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term
from headstart.core.rng import seeded
from headstart.core.stream import Batch

TAIL = "minus CVaR 0.9"
_better = partial(Claim, better="MPTS", seeds=6)
CLAIMS = (
    _better(
        says="MAML on sinusoids, 24,000 evaluated tasks each: the worst tenth fares better than under uniform ones.",
        metric=TAIL, than="uniform",
    ),
    _better(says="So it does on at least five of six seeds.", metric="worst tenth better", than="four of six", by=0.01),
    _better(
        says="Predicted and realised risk of its batches correlate by 0.6 or more over the second half.",
        metric="correlation", than="nothing", by=0.6,
    ),
)  # fmt: skip
NOTE = (
    "The risk learner here has 10 hidden units, as in the paper and in a first trial, which was ahead on 6 of 6 seeds; "
    "this is on 5. With the library's 32 units, safer against dead ones, it would fail: ahead on 4 of 6, by 0.20 and "
    "not 0.88, at the same correlation (0.88). So a better fit of the risk is not what helps; what does is open."
)
ITERATIONS, BATCH, SHOTS = 1500, 16, 10


class Chosen:
    """A stream of batches on tasks that the sampler picks from candidates as they are drawn; None takes the first."""

    def __init__(self, sampler: MPTS | None, draw: Any, cut: Any, candidates: int, seed: int) -> None:
        self.sampler, self.draw, self.cut, self.candidates, self.seed = sampler, draw, cut, candidates, seed
        self.correlations: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            tasks = self.draw(self.candidates, generator)
            tasks = tasks[self.sampler.propose(tasks)] if self.sampler else tasks[:BATCH]
            yield Batch(self.cut(tasks, generator), extra={"tasks": tasks})

    def after_step(self, step: Step) -> None:
        """What came of the batch."""
        if self.sampler:
            self.sampler.observe(step.batch.extra["tasks"], step.terms["task"].risks)  # type: ignore[arg-type]
            self.correlations.append(self.sampler.last["correlation"])

    def late(self) -> dict[str, float]:
        """The mean correlation over the second half."""
        second = self.correlations[len(self.correlations) // 2 :] or [0.0]
        return {"correlation": sum(second) / len(second)}


def trained(model: nn.Module, term: Term, stream: Chosen, steps: int, rate: float) -> nn.Module:
    plan = Plan(model=model, stream=stream, terms={"task": term}, steps=steps, after_step=(stream.after_step,),
                optimizer=lambda params: torch.optim.Adam(params, rate))  # fmt: skip
    return fit(plan, device="cpu").model


def sinusoids(n: int, generator: torch.Generator) -> Tensor:
    """Tasks (n, 2): amplitude in [0.1, 5], phase in [0, π]."""
    return torch.rand(n, 2, generator=generator) * torch.tensor([4.9, math.pi]) + torch.tensor([0.1, 0.0])


def waves(tasks: Tensor, x: Tensor) -> Tensor:
    """a sin(x + b), for tasks (t, 2) at x (t, n, 1)."""
    y: Tensor = tasks[:, :1, None] * (x + tasks[:, 1:, None]).sin()
    return y


def perceptrons(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """One perceptron a task: weights (t, in, out) and (t, 1, out) in turn, x (t, n, 1) -> inputs of layers, output."""
    seen = [x]
    for k in range(0, len(weights), 2):
        h = torch.baddbmm(weights[k + 1], seen[-1], weights[k])
        seen.append(h.relu() if k < len(weights) - 2 else h)
    return seen


def adapted(weights: list[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """One step of gradient descent at 0.001 on the mean squared error of each task, differentiable, written out."""
    *seen, output = perceptrons(weights, x)
    error, moved = 2 * (output - y) / y.shape[1], list(weights)
    for k in range(len(weights) - 2, -1, -2):
        moved[k] = torch.baddbmm(weights[k], seen[k // 2].transpose(1, 2), error, alpha=-0.001)
        moved[k + 1] = weights[k + 1] - 0.001 * error.sum(1, keepdim=True)
        error = (error @ weights[k].transpose(1, 2)) * (seen[k // 2] > 0) if k else error
    return moved


def a_task_each(model: nn.Module, n: int) -> list[Tensor]:
    """The model's weights (n, in, out) and biases (n, 1, out), the same for each task."""
    return [(p.T if p.ndim == 2 else p[None]).expand(n, -1, -1) for p in model.parameters()]


class Adapts(Term):
    """The risk after one step on the shots, summed over tasks; the risks of the tasks are kept for the sampler."""

    def forward(self, step: Step) -> Tensor:
        (x, y), tasks = step.batch.x, step.batch.extra["tasks"]
        weights = adapted(a_task_each(step.model, len(tasks)), x[:, :SHOTS], y[:, :SHOTS])
        risks = (perceptrons(weights, x[:, SHOTS:])[-1] - y[:, SHOTS:]).square().mean((1, 2))
        self.risks: Tensor = risks.detach()
        loss: Tensor = risks.sum()
        return loss


def shots(tasks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = 10 * torch.rand(len(tasks), 2 * SHOTS, 1, generator=generator) - 5
    return x, waves(tasks, x)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Each arm starts from the same weights and draws the same candidates."""
    fixed = torch.Generator().manual_seed(10_000 + seed)
    tasks = sinusoids(500, fixed)
    x, y = shots(tasks, fixed)
    grid = torch.linspace(-5, 5, 1000)[None, :, None].expand(500, -1, -1)
    with seeded(seed):
        start = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    samplers = {"uniform": None, "MPTS": MPTS(seed=seed, hidden=10)}
    arms = {"nothing": {"correlation": 0.0}, "four of six": {"worst tenth better": 4 / 6}}
    for arm, sampler in samplers.items():
        stream = Chosen(sampler, sinusoids, shots, 2 * BATCH, seed)
        model = trained(start, Adapts(), stream, ITERATIONS, 1e-3)
        with torch.no_grad():
            weights = a_task_each(model, 500)
            for _ in range(10):
                weights = adapted(weights, x[:, :SHOTS], y[:, :SHOTS])
            risks = (perceptrons(weights, grid)[-1] - waves(tasks, grid)).square().mean((1, 2))
        arms[arm] = {TAIL: -tail_risk(risks, 0.9), "minus mean risk": -tail_risk(risks, 0)} | stream.late()
    arms["MPTS"]["worst tenth better"] = float(arms["MPTS"][TAIL] > arms["uniform"][TAIL])
    return arms
