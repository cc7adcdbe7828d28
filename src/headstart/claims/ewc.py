"""Elastic weights forget less than plain fine-tuning on a sequence of tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.retain.ewc import EWC
from headstart.retain.ewc import PAPER as PAPER
from headstart.testing.material import digits

CLAIMS = (
    Claim(
        says="Five tasks of permuted digits: mean accuracy over all of them at the end is at least four points "
        "above plain fine-tuning's.",
        metric="accuracy",
        better="EWC",
        than="fine-tuning",
        by=0.04,
    ),
    Claim(
        says="It forgets less: backward transfer (accuracy at the end minus just after learning, old tasks) is higher.",
        metric="backward transfer",
        better="EWC",
        than="fine-tuning",
    ),
)
TASKS = 5


def run(seed: int) -> dict[str, dict[str, float]]:
    """The card's setting: MLP 64-100-100-10 without biases, SGD 0.05, batch 16, 5 epochs a task, EWC's defaults."""
    x, y = digits()
    x = x.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    views = [torch.arange(64), *(torch.randperm(64, generator=generator) for _ in range(TASKS - 1))]
    order = torch.randperm(len(y), generator=generator)
    train, test = order[:1200], order[1200:]
    with seeded(seed):
        start = nn.Sequential(
            nn.Linear(64, 100, bias=False), nn.ReLU(), nn.Linear(100, 100, bias=False), nn.ReLU(),
            nn.Linear(100, 10, bias=False),
        )  # fmt: skip

    def accuracies(model: nn.Module) -> Tensor:
        return torch.stack([(model(x[test][:, view]).argmax(1) == y[test]).float().mean() for view in views])

    def sequence(method: EWC | None) -> dict[str, float]:
        model: nn.Module = start
        rows = []
        for view in views:
            stream = Batches(x=x[train][:, view], y=y[train], batch_size=16, seed=seed)
            plan = Plan(model=model, stream=stream, steps=5 * 75, optimizer=sgd(0.05, momentum=0.0))
            model = fit(method(plan) if method else plan, device="cpu", seed=seed).model
            if method:
                method.remember(model, [(stream.x, stream.y)])
            rows.append(accuracies(model))
        table = torch.stack(rows)  # (tasks learned, tasks)
        return {
            "accuracy": table[-1].mean().item(),
            "backward transfer": (table[-1] - table.diagonal())[:-1].mean().item(),
        }

    return {"fine-tuning": sequence(None), "EWC": sequence(EWC())}
