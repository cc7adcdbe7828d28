"""One policy for gymnasium's pendulums of many masses and lengths, trained on those predicted to be hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.choose.mpts import MPTS
from headstart.choose.mpts import PAPER as PAPER
from headstart.choose.risk_learner import tail_risk
from headstart.claims.mpts import Chosen, trained
from headstart.core.claim import Claim
from headstart.core.plan import Step, Term
from headstart.core.rng import seeded
from headstart.worlds import control

METHODS = ("choose.mpts",)
TAIL = "minus CVaR 0.9"
CLAIMS = (
    Claim(
        says="One policy for pendulums of many masses and lengths, 1,920 task evaluations each: the worst tenth "
        "fares better than under uniform tasks.",
        metric=TAIL,
        better="MPTS",
        than="uniform",
        seeds=6,
    ),
    Claim(
        says="So it does with a sampler without a random share and without a warm-up.",
        metric=TAIL,
        better="MPTS, by score only",
        than="uniform",
        seeds=6,
    ),
)
NOTE = (
    "Ahead on 4 of 6 seeds; the mean is one seed's, on which uniform tasks ended in a much worse policy (-7.96 against "
    "-5.00). On the other five the two differ by 0.09 on average. Half of the batch at random and a warm-up, which the "
    "paper has for reinforcement learning, changed little."
)
ITERATIONS, STEPS = 120, 50


class Policy(nn.Module):
    """One policy for all pendulums; it does not see which it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.5 * torch.randn(control.WEIGHTS))

    def forward(self, tasks: Tensor, begin: Tensor) -> Tensor:
        """Risks (t,) of tasks (t, 2): minus the mean reward."""
        mass, length = tasks.T
        physics = control.Pendulums(gravity=torch.full_like(mass, 10.0), mass=mass, length=length)
        return -control.returns(self.weights, physics, begin, steps=STEPS)


class Swings(Term):
    """The mean risk, differentiated through the physics."""

    risks: Tensor

    def forward(self, step: Step) -> Tensor:
        risks: Tensor = step.model(step.batch.extra["tasks"], step.batch.x)
        self.risks = risks.detach()
        return risks.mean()


def pendulums(n: int, generator: torch.Generator) -> Tensor:
    """Tasks (n, 2): mass in [0.1, 1], length in [0.5, 1.5]."""
    return torch.rand(n, 2, generator=generator) * torch.tensor([0.9, 1.0]) + torch.tensor([0.1, 0.5])


def run(seed: int) -> dict[str, dict[str, float]]:
    """Each arm starts from the same policy and draws the same candidates, 24 for a batch of 16."""
    fixed = torch.Generator().manual_seed(10_000 + seed)
    tasks, begin = pendulums(200, fixed), control.starts(10, fixed)
    with seeded(seed):
        start = Policy()
    samplers = {
        "uniform": None,
        "MPTS": MPTS(seed=seed, random_share=0.5, warm_up=20, spread_weight=5.0, samples=50),
        "MPTS, by score only": MPTS(seed=seed, spread_weight=5.0, samples=50),
    }
    arms = {}
    for arm, sampler in samplers.items():
        stream = Chosen(sampler, pendulums, lambda _tasks, g: control.starts(4, g), 24, seed)
        model = trained(start, Swings(), stream, ITERATIONS, 2e-2)
        with torch.no_grad():
            risks = model(tasks, begin)
        arms[arm] = {TAIL: -tail_risk(risks, 0.9), "minus mean risk": -tail_risk(risks, 0)} | stream.late()
    return arms
