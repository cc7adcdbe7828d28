"""Adversarial training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import Attack, Ball, Goal, ascend, check_inputs, goal_gradient, misclassify
from headstart.core.modes import evaluating
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Run, Step, Term
from headstart.core.stream import Batch
from headstart.core.validate import require

PAPER = Paper(
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    authors="Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu",
    year=2018,
    arxiv="1706.06083",
    departs="Perturbations are made in eval mode, and may be made for a share of the batch only.",
)


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining:
    """A classifier that keeps its answer when an input changes by up to `radius`, even against its own gradient.

    Each step first moves the inputs uphill on the cross-entropy of the model as it stands, from a random point of the
    ball, and then every term of the plan learns from the moved inputs instead of the clean ones.

    Args:
        radius: of the ball, in units of x in [0, 1] (paper: 8 / 255 for CIFAR-10, 0.3 for MNIST).
        steps: >= 1 (paper: 7 for CIFAR-10, 40 for MNIST); 1 is fast but can be learnt by heart: check with more.
        step_size: in (0, 1]; by default 1.75 · radius / steps, which is the paper's 2 / 255 for 8 / 255 in 7 steps.
        share: of the batch that is moved, in [0, 1] (paper: 1); the other examples stay clean.
        random_start: whether to start at a random point of the ball (paper) instead of at x.
        norm: "linf" or "l2".
        attack: finds the moved inputs in place of that search, such as `attack.DTA` of a frozen base; radius and steps
            are then its own. One with a seed draws anew at each step. None is the paper's search.

    Shape: plans whose batches are `Batch(x, y)` with x (n, ...) floats in [0, 1] and y (n,); normalisation belongs
    inside the model.

    Use it when: the model will meet inputs that somebody chose, or small changes of inputs that it must not notice.
    Not when: clean accuracy is all that counts (it falls, more so with few examples), or inputs are no numbers.

    Cost: `steps` forward and backward passes more for each training step: about 1 + steps times plain training.

    Notes: inputs are moved in eval mode (dropout off, batch statistics untouched) and learnt in training mode. Terms
    added to the plan afterwards see the clean batch. With a tactic that makes batches of parts, apply this one first.

    Raises:
        Refused: an argument out of range, a plan that is adversarial already, inputs outside [0, 1], no labels.

    Reference: Madry et al. 2018, equation 2.1 and section 5.

    >>> from headstart.core.stream import Batches
    >>> plan = Plan(model=nn.Linear(2, 2), stream=Batches(x=torch.rand(8, 2), y=torch.arange(8) % 2), steps=10)
    >>> list(AdversarialTraining(radius=0.1)(plan).terms)
    ['task']
    """

    radius: float = 8 / 255
    steps: int = 7
    step_size: float | None = None
    share: float = 1.0
    random_start: bool = True
    norm: Literal["linf", "l2"] = "linf"
    attack: Attack | None = None

    def __post_init__(self) -> None:
        Ball(self.radius, self.norm)
        require(self.steps >= 1, "AdversarialTraining needs steps >= 1", self.steps, "The paper uses 7.")
        require(self.step_size is None or 0 < self.step_size <= 1, "AdversarialTraining needs 0 < step_size <= 1, in "
                "units of x in [0, 1]", self.step_size, "Divide by 255 if it is in grey levels.")  # fmt: skip
        require(0 <= self.share <= 1, "AdversarialTraining needs 0 <= share <= 1", self.share, "The paper uses 1.")
        if self.attack is not None:
            own = replace(self, attack=None, share=1.0)
            require(own == AdversarialTraining(), "AdversarialTraining leaves radius, steps, random_start and norm to "
                    "its attack", own, "Set them there.")  # fmt: skip

    def __call__(self, plan: Plan) -> Plan:
        twice = [name for name, term in plan.terms.items() if any(isinstance(m, OnMoved) for m in term.modules())]
        require(
            not twice, "AdversarialTraining needs a plan of clean inputs", f"moved ones in {twice}", "Apply it once."
        )
        return replace(plan, terms={name: OnMoved(term, self) for name, term in plan.terms.items()})

    def moved(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with its first round(share · n) examples moved uphill on the model; the model is left as it is.

        Draws from torch's global generator, which `fit` seeds.
        """
        require(isinstance(batch, Batch) and isinstance(batch.x, Tensor) and batch.y is not None,
                "AdversarialTraining needs batches of one tensor x with labels y", _kind(batch),
                "Apply it before tactics that make batches of parts.")  # fmt: skip
        assert batch.y is not None
        check_inputs(batch.x)
        count = round(self.share * len(batch.x))
        if count == 0 or self.radius == 0:
            return batch
        x, goals = batch.x[:count], [misclassify(model, batch.y[:count])]
        with evaluating(model):
            found = self._search(x, goals) if self.attack is None else _drawn_anew(self.attack).perturb(x, goals)
        return replace(batch, x=torch.cat([found, batch.x[count:]]))

    def _search(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        ball = Ball(self.radius, self.norm)
        return ascend(
            x,
            partial(goal_gradient, goals),
            ball=ball,
            steps=self.steps,
            step_size=self.step_size or 1.75 * self.radius / self.steps,
            start=x + self.radius * _within(x, ball) if self.random_start else None,
        )


class OnMoved(Term):
    """A term that sees the moved batch; all terms of a plan share one search and one forward pass."""

    def __init__(self, term: Term, tactic: AdversarialTraining) -> None:
        super().__init__()
        self.term, self.tactic, self.taps = term, tactic, term.taps

    def forward(self, step: Step) -> Tensor:
        key = id(step.batch)
        if key not in step.runs:
            step.runs[key] = step.batch, Run(self.tactic.moved(step.model, step.batch), {})
        loss: Tensor = self.term(replace(step, batch=step.runs[key][1].output, whole=None))
        return loss

    def extra_repr(self) -> str:
        return repr(self.tactic)


def _within(x: Tensor, ball: Ball) -> Tensor:
    """Random points of the unit ball: uniform in linf; in l2 a random direction and a uniform length."""
    if ball.norm == "linf":
        return 2 * torch.rand_like(x) - 1
    length = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return length * ball.step(torch.randn_like(x))


def _drawn_anew(attack: Attack) -> Attack:
    """The attack with a seed from torch's global generator, where it has one."""
    if is_dataclass(attack) and not isinstance(attack, type) and "seed" in {field.name for field in fields(attack)}:
        return replace(attack, seed=int(torch.randint(2**31, ())))
    return attack


def _kind(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"parts {sorted(batch)}"
    return f"x of type {type(batch.x).__name__}" if batch.y is not None else "no labels"
