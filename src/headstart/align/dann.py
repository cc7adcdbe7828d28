"""Domain-adversarial training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import On, Plan, Step, Term
from headstart.core.rng import seeded
from headstart.core.stream import Parts, as_batch, each
from headstart.core.surgery import freeze, head_of
from headstart.core.taps import tapped
from headstart.core.validate import require

PAPER = Paper(
    title="Domain-Adversarial Training of Neural Networks",
    authors="Yaroslav Ganin and Evgeniya Ustinova and Hana Ajakan and Pascal Germain and Hugo Larochelle and "
    "François Laviolette and Mario Marchand and Victor Lempitsky",
    year=2016,
    arxiv="1505.07818",
    code="https://github.com/GRAAL-Research/domain_adversarial_neural_network",
)


@dataclass(frozen=True)
class DANN:
    """A classifier for a target without labels, from a labelled source: its features no longer tell the two apart.

    A domain head learns to tell source from target features; its gradient reaches the features reversed and times
    λ(p) = strength · (2 / (1 + exp(-gamma · p)) - 1), p the progress of the run, while the head itself always learns
    with weight 1. The plan's own terms see the source only.

    Args:
        target: re-iterable batches of the target's inputs, of about the plan's batch size; labels are not looked at.
        layer: what must not tell the domains apart: a tap, "NAME" or "NAME:input"; by default the input of the head.
        hidden: units of the domain head's hidden layer (paper: 100 for MNIST, 1024 twice for larger models); 0 makes
            it linear.
        gamma: > 0, how fast the reversal rises (paper: 10, never tuned); `math.inf` is full strength at once.
        strength: λ at the end, >= 0 (paper: 1 for deep models; 0 trains on the source alone).
        seed: of the domain head's initial weights.

    Shape: inputs of one shape in both domains are forwarded in one call, so that batch statistics are joint.

    Use it when: source and target show the same classes in about the same proportions and look different.
    Not when: the class proportions differ (features that hide the domain must then err), or some target labels exist.

    Cost: one forward and backward over both batches, about twice a step on the source alone; one small head more.

    Notes: a domain loss near 2 log 2 = 1.39 means success or a dead head: train with strength=0 to see which. Near 0
    the head wins: raise `strength` or lower the learning rate. The paper's rate is `sgd(0.01, 0.9)` under `annealed`;
    on small problems momentum lets the two players circle, and plain `sgd` is better.

    Raises:
        Refused: an empty target, an argument out of range, an unknown layer, or a plan that already has a "domain".

    Reference: Ganin et al. 2016, equations 9, 10 and 18 and section 5.2.2.

    >>> from headstart.core.stream import Batches
    >>> plan = Plan(model=nn.Linear(2, 2), stream=Batches(x=torch.ones(8, 2), y=torch.arange(8) % 2), steps=10)
    >>> list(DANN(Batches(x=torch.zeros(8, 2)))(plan).terms)
    ['task', 'domain']
    """

    target: Iterable[Any] = field(repr=False)
    layer: str | None = None
    hidden: int = 100
    gamma: float = 10.0
    strength: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.hidden >= 0, "DANN needs hidden >= 0", self.hidden, "Pass 0 for a linear domain head.")
        require(self.gamma > 0, "DANN needs gamma > 0", self.gamma, "The paper uses 10.")
        require(0 <= self.strength < math.inf, "DANN needs a finite strength >= 0", self.strength, "Start from 1.")

    def __call__(self, plan: Plan) -> Plan:
        first = next(iter(self.target), None)
        require(first is not None, "DANN needs a target with examples", "an empty stream", "Pass unlabelled batches.")
        layer = self.layer or f"{head_of(plan.model)}:input"
        model = freeze(plan.model).eval()
        device = next(model.parameters()).device
        with torch.no_grad(), tapped(model, [layer]) as seen, seeded(self.seed):
            model(each(lambda t: t.to(device), as_batch(first).x))
            features = seen[layer].flatten(1)
            domain = Domain(layer, features.shape[1], self.hidden, self.gamma, self.strength).to(features)
        terms = {name: On("source", term) for name, term in plan.terms.items()}
        stream = Parts({"source": plan.stream, "target": self.target})
        return replace(plan, stream=stream, terms=terms).plus(domain=domain)


class Domain(Term):
    """The two domain losses, added; each is the mean over its own domain."""

    def __init__(self, layer: str, width: int, hidden: int, gamma: float, strength: float) -> None:
        super().__init__()
        self.taps, self.gamma, self.strength = (layer,), gamma, strength
        self.head = (
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)) if hidden else nn.Linear(width, 1)
        )

    def forward(self, step: Step) -> Tensor:
        weight = self.strength * rise(step.progress, self.gamma)
        source, target = (self.head(reverse(self._features(step, part), weight)) for part in ("source", "target"))
        return -(F.logsigmoid(-source).mean() + F.logsigmoid(target).mean())  # cross-entropy, domains 0 and 1

    def _features(self, step: Step, part: str) -> Tensor:
        return step.on(part).run(step.batch[part].x).taps[self.taps[0]].flatten(1)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse(features: Tensor, weight: float = 1.0) -> Tensor:
    """The same features; their gradient comes back times -weight.

    >>> x = torch.ones(3, requires_grad=True)
    >>> torch.autograd.grad(reverse(x, 2.0).sum(), x)[0]
    tensor([-2., -2., -2.])
    """
    return cast(Tensor, _Reverse.apply(features, weight))  # type: ignore[no-untyped-call]


def rise(progress: float, gamma: float = 10.0) -> float:
    """λ(p) = 2 / (1 + exp(-gamma · p)) - 1, from 0 to almost 1.

    >>> [round(rise(p), 4) for p in (0, 0.1, 0.5, 1)]
    [0.0, 0.4621, 0.9866, 0.9999]
    """
    return math.tanh(gamma * progress / 2) if progress else 0.0  # the same function; inf · 0 is not a number


def annealed(progress: float, alpha: float = 10.0, beta: float = 0.75) -> float:
    """The paper's learning rate multiplier, 1 / (1 + alpha · p)^beta; a `schedule` for plans.

    >>> [round(annealed(p), 4) for p in (0, 0.5, 1)]
    [1.0, 0.2608, 0.1656]
    """
    return float((1 + alpha * progress) ** -beta)
