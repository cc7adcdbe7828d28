"""Run by test_two_processes on two processes: writes the trained weights of each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches


class Projector(Term):
    """A term with weights of its own, which must be kept equal too."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)

    def forward(self, step: Step) -> Tensor:
        return self.own(step.run(step.batch.x).output).square().mean()


def by_grad(losses: Mapping[str, Tensor], params: Sequence[nn.Parameter]) -> None:
    """The sum of the losses, as a gradient rule."""
    for p, g in zip(params, torch.autograd.grad(sum(losses.values()), params), strict=True):
        p.grad = g


RULES = ("sum", "rule", "accumulate")


def train(rule: str, checkpoint: str | None = None) -> dict[str, Tensor]:
    """The trained weights of model and term."""
    generator = torch.Generator().manual_seed(0)
    with seeded(0):
        model, projector = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), Projector()
    stream = Batches(x=torch.randn(64, 6, generator=generator), y=torch.arange(64) % 3, batch_size=16)
    plan = Plan(model=model, stream=stream, steps=15, optimizer=sgd(0.2), gradient=by_grad if rule == "rule" else None)
    fitted = fit(plan.plus(projector=projector), device="cpu", accumulate=2 if rule == "accumulate" else 1,
                 checkpoint=checkpoint, every=5)  # fmt: skip
    return {**fitted.model.state_dict(), **fitted.terms["projector"].state_dict()}


if __name__ == "__main__":
    folder = sys.argv[1]
    states = {rule: train(rule, f"{folder}/{rule}.pt") for rule in RULES}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save({"states": states, "world": world}, f"{folder}/weights.{rank}")
    torch.distributed.destroy_process_group()
