"""Linear heads of many tasks trained at once: zoos of weights in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term
from headstart.core.stream import Batch
from headstart.core.weights import Weights


class Heads(nn.Module):
    """Linear heads of many tasks at once; (k, m, d) -> (k, m, c)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = torch.baddbmm(self.bias[:, None], x, self.weight.mT)
        return logits


class EachTask(Term):
    """Cross-entropy of each head on its own examples, summed over heads: Adam trains each as if it were alone."""

    def forward(self, step: Step) -> Tensor:
        logits = step.run(step.batch.x).output
        loss: Tensor = F.cross_entropy(logits.flatten(0, 1), step.batch.y.flatten()) * len(logits)
        return loss


def trained(x: Tensor, y: Tensor, start: Sequence[Weights], steps: int = 60) -> list[Weights]:
    """One head for each task of examples x (k, m, d) and labels y (m,): full batches, Adam."""
    heads = Heads(*(torch.stack([weights[name] for weights in start]) for name in ("weight", "bias")))
    plan = Plan(model=heads, stream=[Batch(x, y.expand(len(x), -1))], terms={"each": EachTask()}, steps=steps,
                optimizer=lambda params: torch.optim.Adam(params, lr=0.05))  # fmt: skip
    made = dict(fit(plan, device="cpu").model.named_parameters())
    return [{name: tensor.detach()[k] for name, tensor in made.items()} for k in range(len(x))]


def scorer(x: Tensor, y: Tensor) -> Callable[[Weights], float]:
    """Accuracy of a linear head on these examples."""
    return lambda head: float(((x @ head["weight"].T + head["bias"]).argmax(1) == y).float().mean())
