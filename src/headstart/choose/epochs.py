"""Which epoch of a run to keep, by a score that needs no label of the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.plan import Plan, Step
from headstart.core.rng import seeded
from headstart.core.validate import require


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """The epoch to keep, counted from 0, and whether training had saturated there or never did."""

    epoch: int
    saturated: bool


def saturated(scores: Sequence[float], window: int = 3, threshold: float = 0.01) -> Saturation:
    """The best epoch of the first window over which the score stands still; of all epochs if there is no such window.

    A window stands still if the standard deviation of its scores is below `threshold` times their mean's size.

    Args:
        scores: of each epoch, larger is better.
        window: epochs, >= 2; the paper has 3 (2 to 7 tried).
        threshold: > 0; the paper has 0.01.

    Notes: the first of equal scores is taken, and the standard deviation is that of the window, not of a population
    it stands for. Scores that change sign have a mean near 0 and do not stand still.

    Raises:
        Refused: no scores, NaN, window < 2, threshold <= 0.

    Reference: Yang et al. 2024, arXiv 2305.18712, saturation level.

    >>> saturated([1.0, 1.5, 1.51, 1.505, 1.9])
    Saturation(epoch=2, saturated=True)
    """
    require(window >= 2, "saturated needs window >= 2", window, "The paper has 3.")
    require(0 < threshold < math.inf, "saturated needs threshold > 0", threshold, "The paper has 0.01.")
    values = [float(score) for score in scores]
    require(bool(values) and all(map(math.isfinite, values)), "saturated needs finite scores, one an epoch", values,
            "Score at least one epoch.")  # fmt: skip
    for first in range(len(values) - window + 1):
        inside = values[first : first + window]
        if pstdev(inside) < threshold * abs(fmean(inside)):
            return Saturation(epoch=first + inside.index(max(inside)), saturated=True)
    return Saturation(epoch=values.index(max(values)), saturated=False)


class Follow:
    """Scores the model while it trains and hands back the epoch that `saturated` chooses, with no labels.

    Args:
        score: model -> number, larger is better, such as `lambda m: TransferScore().of_model(m, target).score`; it
            gets the model in eval mode, without gradients.
        every: optimizer steps an epoch, >= 1.
        window, threshold: of `saturated`.

    Attributes:
        scores: of each epoch so far.

    Cost: a score each epoch; memory of at most `window` copies of what is trained, on the CPU.

    Notes: for one run. Training is what it is without it, whatever random numbers the score draws, and a resumed run
    remembers. A surgery is applied to the plan before `within`, not after.

    Raises:
        Refused: every < 1, a plan of fewer steps, a second run, weights that do not fit at the end.

    >>> from headstart.core.loop import fit
    >>> from headstart.core.stream import Batches
    >>> stream = Batches(x=torch.randn(8, 2), y=torch.arange(8) % 2)
    >>> follow = Follow(lambda model: -float(model.weight.norm()), every=2)
    >>> model = fit(follow.within(Plan(model=nn.Linear(2, 2), stream=stream, steps=6))).model
    >>> len(follow.scores), -float(model.weight.detach().norm()) == follow.scores[follow.choice.epoch]
    (3, True)
    """

    def __init__(
        self, score: Callable[[nn.Module], float], every: int, *, window: int = 3, threshold: float = 0.01
    ) -> None:
        require(every >= 1, "Follow needs every >= 1", every, "Pass the number of steps of an epoch.")
        saturated([0.0], window, threshold)  # refuses bad settings now, not after an epoch
        self.score, self.every, self.window, self.threshold = score, every, window, threshold
        self.steps, self.scores = 0, list[float]()
        self._kept: dict[int, dict[str, Tensor]] = {}

    @property
    def choice(self) -> Saturation:
        """The epoch to keep, of those so far."""
        return saturated(self.scores, self.window, self.threshold)

    def within(self, plan: Plan) -> Plan:
        """The same plan, followed; the model it gives is that of the chosen epoch."""
        require(self.steps == 0, "A Follow is for one run", f"{self.steps} steps followed", "Make another.")
        require(plan.steps >= self.every, f"A run must have an epoch of {self.every} steps", plan.steps, "Lower every.")
        return replace(plan, after_step=(*plan.after_step, self), finish=(self.restore, *plan.finish))

    def __call__(self, step: Step) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        modes = {module: module.training for module in step.model.modules()}
        with seeded(None), torch.no_grad():
            self.scores.append(float(self.score(step.model.eval())))
        for module, mode in modes.items():
            module.training = mode
        frozen = {name for name, p in step.model.named_parameters() if not p.requires_grad}
        weights = step.model.state_dict()
        epoch, best = len(self.scores) - 1, self.choice
        self._kept[epoch] = {name: v.detach().cpu().clone() for name, v in weights.items() if name not in frozen}
        later = epoch - self.window + 1  # epochs after it lie in the next window too
        self._kept = {e: w for e, w in self._kept.items() if e == best.epoch or (e > later and not best.saturated)}

    def restore(self, model: nn.Module) -> nn.Module:
        """The model with the weights of the chosen epoch."""
        weights = self._kept[self.choice.epoch]
        missing = sorted(weights.keys() - model.state_dict().keys())
        require(not missing, "The followed weights must fit the model", f"no {missing[:3]}",
                "Apply a surgery to the plan before Follow.within.")  # fmt: skip
        model.load_state_dict(weights, strict=False)
        return model

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"steps": self.steps, "scores": self.scores, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.steps, self.scores, self._kept = state["steps"], list(state["scores"]), dict(state["kept"])
