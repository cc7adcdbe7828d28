"""Soft targets let a student learn from few examples what hard labels need many for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, Weighted, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.distill.soft_targets import PAPER as PAPER
from headstart.distill.soft_targets import SoftTargets
from headstart.testing.material import digits

CLAIMS = (
    Claim(
        says="With 10 examples a class, a small student that also sees its teacher's soft targets on those same "
        "examples beats the same student on hard labels alone by at least a point (section 5, UCI digits).",
        metric="accuracy",
        better="soft targets",
        than="hard labels",
        by=0.01,
    ),
    Claim(
        says="Soft targets on 1,000 inputs without a label beat hard labels on 100 of them by at least three points.",
        metric="accuracy",
        better="soft targets, no labels",
        than="hard labels",
        by=0.03,
    ),
)


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def run(seed: int) -> dict[str, dict[str, float]]:
    """A teacher of 256 units on 1,000 labelled digits; students of 32 units, 600 steps, one start and one order."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1000], order[1000:]
    few = torch.cat([train[y[train] == c][:10] for c in range(10)])
    with seeded(seed):
        teacher, student = _perceptron(256), _perceptron(32)

    def plan(model: nn.Module, rows: Tensor) -> Plan:
        stream = Batches(x=x[rows], y=y[rows], batch_size=50, seed=seed)
        return Plan(model=model, stream=stream, steps=600, optimizer=adamw(3e-3), schedule=cosine)

    kd = SoftTargets(fit(plan(teacher, train), device="cpu", seed=seed).model)
    arms = {
        "hard labels": plan(student, few),
        "soft targets": plan(student, few).plus(kd=Weighted(10.0, kd)),  # "considerably lower weight" on the labels
        "soft targets, no labels": replace(plan(student, train), terms={"kd": kd}),
    }
    models = {arm: fit(p, device="cpu", seed=seed).model for arm, p in arms.items()}
    models["teacher"] = kd.teacher
    return {arm: {"accuracy": (m(x[test]).argmax(1) == y[test]).float().mean().item()} for arm, m in models.items()}
