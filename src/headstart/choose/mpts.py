"""Choose the tasks of the next training batch by the risk that a small model predicts for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import finite, require

from .risk_learner import RiskLearner, correlation, rank_correlation, standardised, tail_risk

PAPER = Paper(
    title="Model Predictive Task Sampling for Efficient and Robust Adaptation",
    authors="Qi Wang and Zehao Xiao and Yixiu Mao and Yun Qu and Jiayi Shen and Yiqin Lv and Xiangyang Ji",
    year=2025,
    arxiv="2501.11039",
    code="https://github.com/thu-rllab/MPTS",
    departs="Risks and descriptors are standardised, layers are wider, and the risk learner makes three steps with "
    "a weaker prior; one whose predictions went constant begins anew. The random share never repeats a chosen task.",
)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MPTS:
    """The batch of tasks to train on next: those predicted to be hard or of uncertain risk, at no extra evaluation.

    A small neural process learns from the risks (losses) of the batches you train on. Each round it predicts the risk
    of freshly drawn candidates, and those of the highest mean_weight · mean + spread_weight · deviation are kept.

    Args:
        batch_size: tasks proposed, >= 1 (paper: 16 of 32 candidates, or 1.5 to 25 times as many).
        mean_weight: of the predicted risk, γ0 (paper: 1).
        spread_weight: of its deviation over samples, γ1 (paper: 3 for sinusoids, 5 in reinforcement learning).
        random_share: of the batch drawn at random, in [0, 1] (paper: 0; 0.5 in reinforcement learning).
        warm_up: rounds that are drawn at random first (paper: 0; 50 in reinforcement learning).
        samples: draws of the latent, >= 2 (paper: 20; 50 in reinforcement learning).
        steps: of the risk learner each round, >= 1 (paper: 1; 10 in reinforcement learning).
        rate: learning rate of these steps (paper: 5e-4; 5e-3 in reinforcement learning).
        strength: of the pull to the last posterior, β >= 0 (paper: 1; 1e-4 in reinforcement learning).
        each_sample: the error is that of every draw, averaged, not of their mean, summed over tasks (paper: False; True
            in reinforcement learning).
        latent, hidden: sizes of the risk learner, >= 1 (paper: 10 and 10, which did better in the claim but can die).
        standardise: risks by their running mean and deviation, descriptors to [0, 1] (paper: False).
        seed: of all its draws.

    Shape: tasks (m, q) of numbers -> indices (batch_size,), highest score first; risks (b,), larger is worse.

    Use it when: tasks can be described by a few numbers, evaluating one is dear, and the worst ones matter: few-shot
    learning, randomised physics. Categories need an embedding, angles their sine and cosine.
    Not when: the average alone matters, or risks are mostly noise (then random_share=0.5); watch the mean risk of a
    fixed random batch. In reinforcement learning the risk is minus the return: the wrong sign picks the easiest tasks.

    Cost: samples · m passes through 3,000 weights a round, and `steps` gradients: milliseconds.

    Notes: risks that are not finite count as the largest of their batch. `last` says of the last round how predictions
    and risks agreed. The latent's posterior is kept, so the last batch need not be: it gives the same one.

    Raises:
        Refused: fewer tasks than batch_size, NaN in a task, another number of risks than tasks, all risks NaN.

    Reference: Wang et al. 2025, algorithms 1 and 2.

    >>> sampler, draw = MPTS(batch_size=4), torch.Generator().manual_seed(0)
    >>> for _ in range(100):
    ...     tasks = torch.rand(8, 1, generator=draw)
    ...     chosen = sampler.propose(tasks)
    ...     sampler.observe(tasks[chosen], tasks[chosen, 0])
    >>> bool(tasks[chosen].mean() > tasks.mean()), sampler.last["correlation"] > 0.9
    (True, True)
    """

    batch_size: int = 16
    mean_weight: float = 1.0
    spread_weight: float = 3.0
    random_share: float = 0.0
    warm_up: int = 0
    samples: int = 20
    steps: int = 3
    rate: float = 2e-3
    strength: float = 1e-3
    each_sample: bool = False
    latent: int = 10
    hidden: int = 32
    standardise: bool = True
    seed: int = 0
    state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    last: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "latent", "hidden"):
            require(getattr(self, name) >= 1, f"MPTS needs {name} >= 1", getattr(self, name), "Raise it.")
        require(self.samples >= 2, "MPTS needs samples >= 2, for a deviation", self.samples, "The paper has 20.")
        require(0 <= self.random_share <= 1, "MPTS needs 0 <= random_share <= 1", self.random_share, "Pass a share.")
        require(self.warm_up >= 0, "MPTS needs warm_up >= 0", self.warm_up, "Pass 0, or 50 as in the paper.")
        require(0 < self.rate < math.inf and 0 <= self.strength < math.inf, "MPTS needs rate > 0 and strength >= 0",
                (self.rate, self.strength), "Use 2e-3 and 1e-3.")  # fmt: skip
        weights = (self.mean_weight, self.spread_weight)
        require(all(map(math.isfinite, weights)), "MPTS needs finite weights", weights, "The paper has 1 and 3.")

    def propose(self, tasks: Tensor) -> Tensor:
        """Which of the candidate tasks (m, q) to train on: indices (batch_size,)."""
        require(len(tasks) >= self.batch_size, f"MPTS needs batch_size={self.batch_size} tasks or more", len(tasks),
                "Draw more candidates, about twice as many as a batch.")  # fmt: skip
        learner, x = self._ready(tasks)
        at_random = int(self.random_share * self.batch_size)
        if int(self.state["rounds"]) < self.warm_up:
            at_random = self.batch_size
        predicted = self._predicted(learner, x)
        if float(predicted.max() - predicted.min()) < 1e-8:  # dead units: it would pick by position for ever
            self._restart(learner)
            predicted = self._predicted(learner, x)
        score = self.mean_weight * predicted.mean(0) + self.spread_weight * predicted.std(0)
        ranked = score.argsort(descending=True, stable=True)
        if not at_random:
            return ranked[: self.batch_size]
        best, rest = ranked[: self.batch_size - at_random], ranked[self.batch_size - at_random :]
        return torch.cat([best, rest[self._draw(lambda g: torch.randperm(len(rest), generator=g))][:at_random]])

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        """Learn from the risks (b,) of the tasks (b, q) that were trained on."""
        require(results.shape == (len(tasks),) and len(tasks) > 0, f"MPTS needs {len(tasks)} risks, one a task",
                tuple(results.shape), "Average the losses of each task.")  # fmt: skip
        good = results.isfinite()
        require(bool(good.any()), "One risk must be finite", "none", "Lower the learning rate: every task diverged.")
        learner, x = self._ready(tasks)
        risks = torch.where(good, results, results[good].max()).detach().cpu().float()
        before = self._predicted(learner, x).mean(0)
        y = standardised(risks, self.state) if self.standardise else risks
        for _ in range(self.steps):
            noise = self._draw(lambda g: torch.randn(self.samples, self.latent, generator=g))
            self.state.update(learner.improve(self.state, self.rate, x, y, noise, strength=self.strength,
                                              each_sample=self.each_sample))  # fmt: skip
        self.state["mean"], self.state["deviation"] = learner.encode(self.state["weights"], x, y)
        self.state["rounds"] = self.state["rounds"] + 1
        self.state["evaluations"] = self.state["evaluations"] + len(tasks)
        self.last.update({
            "correlation": correlation(before, risks), "rank correlation": rank_correlation(before, risks),
            "kl": float(self.state["kl"]), "mean risk": float(risks.mean()), "tail risk": tail_risk(risks, 0.5),
            "share by score": 0.0 if int(self.state["rounds"]) <= self.warm_up else 1 - self.random_share,
            "evaluations": float(self.state["evaluations"]), "restarts": float(self.state["restarts"]),
        })  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """All it has learned, the generator too; `load_state_dict` goes on with the same selections."""
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        self.state.clear()
        self.state.update({name: value.clone() for name, value in state.items()})

    def _ready(self, tasks: Tensor) -> tuple[RiskLearner, Tensor]:
        """The risk learner for tasks of this width, and the tasks as it sees them (m, q)."""
        require(tasks.ndim == 2 and tasks.numel() > 0, "Tasks must have shape (m, q), m > 0", tuple(tasks.shape),
                "Describe each task by a row of numbers.")  # fmt: skip
        x = tasks.detach().cpu().float()
        finite("tasks", x)
        learner = RiskLearner(x.shape[1], self.latent, self.hidden)
        if not self.state:
            zero = torch.zeros((), dtype=torch.float64)
            self.state.update({"generator": torch.Generator().manual_seed(self.seed).get_state(), "restarts": zero - 1,
                               "low": x.amin(0), "high": x.amax(0), "rounds": zero, "evaluations": zero})  # fmt: skip
            self._restart(learner)
        low, high = self.state["low"], self.state["high"]
        require(len(low) == x.shape[1], f"Tasks must keep their {len(low)} numbers", x.shape[1], "Begin a new sampler.")
        if not self.standardise:
            return learner, x
        low, high = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
        self.state["low"], self.state["high"] = low, high
        return learner, (x - low) / torch.where(high > low, high - low, 1.0)

    def _restart(self, learner: RiskLearner) -> None:
        self.state.update(self._draw(learner.start), restarts=self.state["restarts"] + 1)

    def _predicted(self, learner: RiskLearner, x: Tensor) -> Tensor:
        """Standardised risk (samples, m) under draws from the posterior of the last batch."""
        noise = self._draw(lambda g: torch.randn(self.samples, self.latent, generator=g))
        with torch.no_grad():
            return learner.decode(self.state["weights"], x, self.state["mean"] + self.state["deviation"] * noise)

    def _draw(self, what: Callable[[torch.Generator], T]) -> T:
        """A draw of its own generator, whose state moves on."""
        generator = torch.Generator()
        generator.set_state(self.state["generator"])
        drawn = what(generator)
        self.state["generator"] = generator.get_state()
        return drawn
