"""Elastic weight consolidation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.core.fisher import diagonal_fisher
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Step, Term
from headstart.core.validate import one_of, require

PAPER = Paper(
    title="Overcoming catastrophic forgetting in neural networks",
    authors="James Kirkpatrick and Razvan Pascanu and Neil Rabinowitz and Joel Veness and Guillaume Desjardins and "
    "Andrei A. Rusu and Kieran Milan and John Quan and Tiago Ramalho and Agnieszka Grabska-Barwinska and "
    "Demis Hassabis and Claudia Clopath and Dharshan Kumaran and Raia Hadsell",
    year=2017,
    arxiv="1612.00796",
    departs="The penalties of all tasks are kept as one, equal up to a constant, so that memory does not grow.",
)


@dataclass
class EWC:
    """A model that learns the next task and moves least the weights that earlier tasks depend on.

    After task t, `remember` measures the importance F_t of each weight (the exact diagonal Fisher information) at the
    weights θ_t. Later plans add strength / 2 · Σ_t F_t (θ - θ_t)², kept as the one quadratic A (θ - c)² with
    A = Σ F_t and c = Σ F_t θ_t / A.

    Args:
        strength: λ >= 0, with the factor 1/2 and the mean over examples in F (other libraries drop either, which
            changes its meaning). Depends on the problem: try 10, 100, 1000. 0 is plain fine-tuning.
        labels: whose log likelihood F squares: "expected" (all classes by the model's own probability, the
            definition), "true" (the data's labels, as most code) or "sampled".

    Attributes:
        importance: A, name of each weight -> tensor of its shape; empty before the first `remember`.
        centre: c, likewise.

    Use it when: tasks come one after another, old data is gone, and one head serves all (or each has its own).
    Not when: old examples may be kept: replaying 100 of them forgets less.

    Cost: memory 2 x the trainable weights, however many tasks; a step O(weights) more; `remember` one backward pass
    for each example and class (one in all for "true" and "sampled").

    Notes: gradient descent diverges where learning rate · strength · A > 2: lower either.

    Raises:
        Refused: strength < 0, or a plan whose model lacks a remembered weight or has it in another shape.

    Reference: Kirkpatrick et al. 2017, equation 3.

    >>> ewc, task = EWC(strength=10.0), [(torch.eye(2), torch.arange(2))]
    >>> plan = Plan(model=nn.Linear(2, 2), stream=task, steps=1)
    >>> list(ewc(plan).terms)
    ['task']
    >>> ewc.remember(plan.model, task)
    >>> list(ewc(plan).terms)
    ['task', 'ewc']
    """

    strength: float = 10.0
    labels: Literal["expected", "true", "sampled"] = "expected"
    importance: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    centre: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(0 <= self.strength < math.inf, "EWC needs a finite strength >= 0", self.strength, "Start from 10.")
        one_of("labels", self.labels, ["expected", "true", "sampled"])

    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        """Add the task that `model` has just learned: its weights that require gradients.

        `stream` is one finite pass over the task's examples.
        """
        weights = dict(model.named_parameters())
        for name, fisher in diagonal_fisher(model, stream, labels=self.labels).items():
            here = weights[name].detach()
            total = self.importance.get(name, torch.zeros_like(fisher)) + fisher
            centre = self.centre.get(name, here)
            share = fisher / total.clamp_min(torch.finfo(total.dtype).tiny)  # 0 / tiny = 0 where nothing matters
            self.importance[name], self.centre[name] = total, centre + share * (here - centre)

    def __call__(self, plan: Plan) -> Plan:
        return plan.plus(ewc=Anchor(self.strength, self.importance, self.centre)) if self.importance else plan


class Anchor(Term):
    """Keep weights near a centre, each as much as it matters: strength / 2 · Σ importance · (θ - centre)²."""

    importance: Tensor
    centre: Tensor

    def __init__(self, strength: float, importance: Mapping[str, Tensor], centre: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.strength, self.shapes = strength, {name: value.shape for name, value in importance.items()}
        self.register_buffer("importance", torch.cat([importance[name].flatten() for name in self.shapes]))
        self.register_buffer("centre", torch.cat([centre[name].flatten() for name in self.shapes]))

    def forward(self, step: Step) -> Tensor:
        weights = {name: _attribute(step.model, name) for name in self.shapes}
        lost = [name for name, shape in self.shapes.items() if getattr(weights[name], "shape", None) != shape]
        require(not lost, "The model must have every remembered weight in its shape", lost, "Keep the architecture.")
        here = torch.cat([weights[name].flatten() for name in self.shapes])
        return self.strength / 2 * (self.importance * (here - self.centre).square()).sum()


def _attribute(model: Any, name: str) -> Any:
    """What the model computes with under this name: under LoRA, or any parametrisation, the changed weight."""
    return reduce(lambda owner, part: getattr(owner, part, None), name.split("."), model)
