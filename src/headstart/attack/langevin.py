"""The noise that turns descent into sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from headstart.core.plan import Plan, Step, sgd
from headstart.core.validate import require

from .samples import Samples


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Descent on a plan's loss with noise after some of the steps, which keeps models after some.

    Args:
        examples: n >= 1, how many training examples the loss is a mean over.
        lr: > 0.
        temperature: >= 0.
        weight_decay: >= 0.
        seed: of the noise; that of step k depends on (seed, k) alone, so processes and resumed runs agree.
        samples: where models are kept.

    Raises:
        Refused: a number out of range.
    """

    examples: int
    lr: float
    temperature: float
    weight_decay: float
    seed: int
    samples: Samples

    def __post_init__(self) -> None:
        require(self.examples >= 1, "Sampling needs examples >= 1", self.examples, "Pass the training set's size.")
        require(0 < self.lr < math.inf, "Sampling needs a finite lr > 0", self.lr, "Pass a number such as 0.1.")
        for word, value in (("temperature", self.temperature), ("weight_decay", self.weight_decay)):
            require(0 <= value < math.inf, f"Sampling needs a finite {word} >= 0", value, "Pass 0 to do without.")

    def within(
        self, plan: Plan, schedule: Callable[[float], float], noisy: Callable[[int], bool], kept: Callable[[int], bool]
    ) -> Plan:
        """The plan by plain descent at `lr` times `schedule`, with noise in steps `noisy`, models kept after `kept`."""
        self.samples.template = plan.model
        optimizer = sgd(self.lr, momentum=0.0, weight_decay=self.weight_decay)
        after = _Noise(self, plan.steps, schedule, noisy, kept)
        return replace(plan, optimizer=optimizer, schedule=schedule, after_step=(*plan.after_step, after))


class _Noise:
    def __init__(
        self,
        chain: Chain,
        steps: int,
        schedule: Callable[[float], float],
        noisy: Callable[[int], bool],
        kept: Callable[[int], bool],
    ) -> None:
        self.chain, self.steps, self.schedule, self.noisy, self.kept = chain, steps, schedule, noisy, kept

    @torch.no_grad()
    def __call__(self, step: Step) -> None:
        index = round(step.progress * self.steps)
        if index == 0:
            self.chain.samples.begin()
        if self.noisy(index) and self.chain.temperature > 0:
            rate = self.chain.lr * self.schedule(step.progress)
            deviation = math.sqrt(2 * rate * self.chain.temperature / self.chain.examples)
            params = [p for p in step.model.parameters() if p.requires_grad]
            generator = torch.Generator(params[0].device).manual_seed(self.chain.seed * 1_000_003 + index)
            for p in params:
                p.add_(torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator), alpha=deviation)
        if self.kept(index):
            self.chain.samples.keep(step.model, index + 1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return self.chain.samples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.chain.samples.load_state_dict(state)
