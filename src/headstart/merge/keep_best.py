"""Aids for training few numbers: clip the gradient, and keep the best of what was tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.core.plan import Plan, Step
from headstart.core.rng import seeded
from headstart.core.validate import require


def clipped(
    optimizer: Callable[[list[nn.Parameter]], Optimizer], norm: float = 1.0
) -> Callable[[list[nn.Parameter]], Optimizer]:
    """An optimizer for a plan that first shortens the gradient to at most `norm`, after it is unscaled.

    >>> from headstart.core.plan import sgd
    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([30.0, 40.0])
    >>> clipped(sgd(1.0))([weight]).step()
    >>> weight.data
    tensor([-0.6000, -0.8000])
    """
    require(norm > 0, "clipped needs norm > 0", norm, "Pass a number such as 1.0.")

    def build(params: list[nn.Parameter]) -> Optimizer:
        def shorten(*_: Any) -> None:
            nn.utils.clip_grad_norm_(params, norm)

        made = optimizer(params)
        made.register_step_pre_hook(shorten)
        return made

    return build


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """A tactic: the model comes out as it was when it scored best, which may be before the first step.

    Args:
        score: model in eval mode -> a number on validation data, higher is better; -inf where it must not be kept, as
            when a control task falls below 0.95 of what it was.
        every: steps between looks, >= 1; the last step is looked at, too.

    Cost: one call of `score` at the start, every `every` steps and at the end, and two copies of what trains.

    Notes: the start is kept unless something scores higher. Apply it once `steps` of the plan is final.

    Raises:
        Refused: every < 1, or a score of NaN.

    Reference: Zhang et al. 2024, the best epoch on validation data; where none beats the start it is the start.

    >>> from headstart.core.loop import fit
    >>> model = nn.Linear(1, 2)
    >>> plan = Plan(model=model, stream=[(torch.ones(4, 1), torch.zeros(4).long())], steps=3)
    >>> kept = fit(KeepBest(score=lambda model: -float(model.bias.norm()), every=1)(plan)).model
    >>> bool(kept.bias.norm() <= model.bias.norm())
    True
    """

    score: Callable[[nn.Module], float]
    every: int = 10

    def __post_init__(self) -> None:
        require(self.every >= 1, "KeepBest needs every >= 1", self.every, "Pass a number such as 10.")

    def __call__(self, plan: Plan) -> Plan:
        """The same plan, watched."""
        memory = _Best(self, plan)
        return replace(plan, optimizer=memory.begin, after_step=(*plan.after_step, memory))


class _Best:
    """What scored best in one run; a run begins where its optimizer is made, on the weights it starts from."""

    def __init__(self, tactic: KeepBest, plan: Plan) -> None:
        self.tactic, self.optimizer, self.last = tactic, plan.optimizer, plan.steps
        self.params: list[nn.Parameter] = []
        self.start: list[Tensor] = []
        self.best: list[Tensor] = []
        self.score, self.steps = -math.inf, 0

    def begin(self, params: list[nn.Parameter]) -> Optimizer:
        """Make the optimizer; remember what it will train."""
        self.params, self.start = params, _copies(params)
        self.best, self.score, self.steps = self.start, -math.inf, 0
        return self.optimizer(params)

    def __call__(self, step: Step) -> None:
        if self.steps == 0:
            now = _copies(self.params)
            self._put(self.start)
            self._look(step.model)
            self._put(now)
        self.steps += 1
        if self.steps % self.tactic.every == 0 or self.steps == self.last:
            self._look(step.model)
        if self.steps == self.last:
            self._put(self.best)

    def _look(self, model: nn.Module) -> None:
        modes = {module: module.training for module in model.modules()}
        with torch.no_grad(), seeded(None):
            score = float(self.tactic.score(model.eval()))
        for module, mode in modes.items():
            module.training = mode
        require(not math.isnan(score), "KeepBest needs a score that is a number", score, "Return -inf to pass over.")
        if score > self.score:
            self.best, self.score = _copies(self.params), score

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.params, values, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"best": self.best, "score": self.score, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best, self.score, self.steps = state["best"], state["score"], state["steps"]


def _copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]
