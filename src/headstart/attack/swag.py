"""A Gaussian over weights from the end of one training run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from headstart.core.paper import Paper
from headstart.core.plan import Plan, Step
from headstart.core.rng import seeded
from headstart.core.stream import as_batch
from headstart.core.validate import require
from headstart.core.weights import wider

from .samples import filled, moving

PAPER = Paper(
    title="A Simple Baseline for Bayesian Uncertainty in Deep Learning",
    authors="Wesley Maddox and Timur Garipov and Pavel Izmailov and Dmitry Vetrov and Andrew Gordon Wilson",
    year=2019,
    arxiv="1902.02476",
    code="https://github.com/wjmaddox/swa_gaussian",
    departs="The variance is updated in a form that does not cancel, and is not clamped at 1e-30.",
)


class Trajectory:
    """What a run's weights did from some step on: n, mean θ̄, sum of squares about it, the last deviations θ - θ̄.

    Attributes:
        count: n, how many points were taken in.
        mean, squares: by name, in float32 or wider; squares / n is the variance.
        deviations: by name, (at most `rank`, ...), each from the mean at its time.
        buffers: by name, of the last point.
    """

    def __init__(self) -> None:
        self.template: nn.Module | None = None
        self.begin()

    def begin(self) -> None:
        """Forget an earlier run."""
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.deviations: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def take(self, model: nn.Module, rank: int) -> None:
        """Take in one point."""
        self.count += 1
        trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        for name, value in moving(model).items():
            if name not in trained:
                self.buffers[name] = value.clone()
                continue
            point = value.to(wider(value.dtype))
            old = self.mean.get(name, torch.zeros_like(point))
            mean = old + (point - old) / self.count
            self.mean[name] = mean
            self.squares[name] = self.squares.get(name, torch.zeros_like(point)) + (point - old) * (point - mean)
            last = self.deviations.get(name, point.new_zeros(0, *point.shape))
            self.deviations[name] = torch.cat([last, (point - mean)[None]])[-rank:]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares, "deviations": self.deviations,
                "buffers": self.buffers}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count, self.mean, self.squares = state["count"], dict(state["mean"]), dict(state["squares"])
        self.deviations, self.buffers = dict(state["deviations"]), dict(state["buffers"])


@dataclass(frozen=True, kw_only=True)
class SWAG:
    """As many surrogates as wanted, drawn from a Gaussian over weights that is fitted to the path of one training run.

    N(θ̄, (Σ_diag + D Dᵀ / (K - 1)) / 2): mean and variance of the path's points, and its last K deviations D.

    Args:
        every: >= 1, steps between two points of the path (paper: an epoch).
        start: in [0, 1), share of the run before the first point (paper: about half to three quarters).
        rank: K >= 2, columns of D (paper: 20).
        trajectory: where the path is kept.

    Use it when: any number of surrogates is to be drawn from one run that ends at a constant, rather high rate.
    Not when: the plan's rate falls to zero (`cosine`): the path then stands still and all draws are one model.

    Cost: one pass over the weights a point; memory of K + 2 copies of what is trained.

    Notes: training itself does not change: give the plan `sgd` at a constant rate. Settle steps and surgeries first.

    Raises:
        Refused: a number out of range, fewer than two points, or batch statistics without a stream to estimate them on.

    Reference: Maddox et al. 2019, algorithm 1 and equation 1.

    >>> from headstart.core.loop import fit
    >>> from headstart.core.plan import sgd
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> plan = Plan(model=nn.Linear(1, 2), stream=[(x, torch.tensor([0, 1]))], steps=20, optimizer=sgd(0.1))
    >>> posterior = SWAG(every=2, start=0.5, rank=3)
    >>> model = fit(posterior(plan)).model
    >>> posterior.trajectory.count, len(posterior.draw(4))
    (5, 4)
    """

    every: int
    start: float = 0.5
    rank: int = 20
    trajectory: Trajectory = field(default_factory=Trajectory, repr=False, compare=False)

    def __post_init__(self) -> None:
        require(self.every >= 1, "SWAG needs every >= 1", self.every, "Pass the number of batches of an epoch.")
        require(0 <= self.start < 1, "SWAG needs 0 <= start < 1", self.start, "Pass a share of the run such as 0.5.")
        require(self.rank >= 2, "SWAG needs rank >= 2", self.rank, "The paper uses 20.")

    def __call__(self, plan: Plan) -> Plan:
        """The same plan, watched."""
        first = math.ceil(self.start * plan.steps)
        points = (plan.steps - first) // self.every
        require(points >= 2, "SWAG needs two points of the path", f"{points} in {plan.steps} steps", "Lower every.")
        self.trajectory.template = plan.model
        return replace(plan, after_step=(*plan.after_step, _Watch(self, plan.steps, first)))

    def draw(
        self, count: int, *, scale: float = 1.0, seed: int = 0, stream: Iterable[Any] | None = None, batches: int = 100
    ) -> list[nn.Module]:
        """Models from the Gaussian, frozen and in eval mode.

        Args:
            count: >= 1.
            scale: >= 0, standard deviations are times this; 0 gives the mean.
            seed: of the draws.
            stream: of training batches, to estimate batch statistics on; needed if the model has any.
            batches: >= 1, how many of them at most.
        """
        path = self.trajectory
        require(path.count >= 2 and path.template is not None, "SWAG draws after a run of two points or more",
                f"{path.count} points", "Run fit(swag(plan)) first.")  # fmt: skip
        require(count >= 1 and batches >= 1, "draw needs count >= 1 and batches >= 1", (count, batches), "Raise it.")
        require(0 <= scale < math.inf, "draw needs a finite scale >= 0", scale, "Pass 1, or 0 for the mean.")
        assert path.template is not None
        normalised = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in path.template.modules())
        require(stream is not None or not normalised, "Models with batch statistics need stream=", stream,
                "Pass the training stream.")  # fmt: skip
        device = next(iter(path.mean.values())).device
        generator = torch.Generator(device).manual_seed(seed)
        models = []
        for _ in range(count):
            model = filled(path.template, {**self._point(scale, generator), **path.buffers})
            if normalised:
                assert stream is not None
                with seeded(seed):  # dropout draws
                    update_bn((as_batch(batch).x for batch in islice(stream, batches)), model, device)
            models.append(model.eval())
        return models

    def _point(self, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
        path = self.trajectory
        columns = len(next(iter(path.deviations.values())))
        device = generator.device
        along = torch.randn(columns, generator=generator, device=device, dtype=torch.float64)  # one z₂ for all tensors
        drawn = {}
        for name, mean in path.mean.items():
            z1 = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
            low = torch.tensordot(along.to(mean.dtype), path.deviations[name], 1) / math.sqrt(2 * (columns - 1))
            drawn[name] = mean + scale * ((path.squares[name] / path.count / 2).sqrt() * z1 + low)
        return drawn


class _Watch:
    def __init__(self, swag: SWAG, steps: int, first: int) -> None:
        self.path, self.every, self.rank, self.steps, self.first = swag.trajectory, swag.every, swag.rank, steps, first

    def __call__(self, step: Step) -> None:
        index = round(step.progress * self.steps)
        if index == 0:
            self.path.begin()
        if index >= self.first and (index - self.first + 1) % self.every == 0:
            self.path.take(step.model, self.rank)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return self.path.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.path.load_state_dict(state)
