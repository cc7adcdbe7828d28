"""Move inputs uphill inside a ball: the one loop of every attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .confident import cross_entropy
from .modes import evaluating
from .validate import finite, one_of, require

Goal: TypeAlias = Callable[[Tensor], Tensor]
"""What to increase: x (n, ...) -> (n,), one number for each example."""

PASS = 128
"""Examples that fill a pass: on a CPU more of them are slower, since what a layer says then leaves its caches."""


class Attack(Protocol):
    """Perturb x so that every surrogate's goal rises; example i never depends on example j."""

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor: ...


@dataclass(frozen=True)
class Ball:
    """How far a perturbation may go, in units of x in [0, 1].

    Args:
        radius: >= 0, such as 8 / 255; in the linf norm at most 1.
        norm: "linf" or "l2", over all but the first axis.

    >>> Ball(0.1).clip(torch.tensor([[0.5]]), torch.tensor([[0.9]]), (0.0, 1.0))
    tensor([[0.6000]])
    """

    radius: float
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        one_of("norm", self.norm, ["linf", "l2"])
        limit = "0 <= radius <= 1" if self.norm == "linf" else "a finite radius >= 0"
        require(0 <= self.radius <= 1 or (self.norm == "l2" and 1 < self.radius < math.inf), f"A ball needs {limit}, "
                "in units of x in [0, 1]", self.radius, "Divide by 255 if it is in grey levels.")  # fmt: skip

    def step(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit norm; zero where the gradient is zero."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def clip(self, x: Tensor, moved: Tensor, bounds: tuple[float, float]) -> Tensor:
        """The point of the ball around `x`, then of the bounds, nearest to `moved`; inside both to the last bit."""
        if self.norm == "linf":
            delta = (moved - x).clamp(-self.radius, self.radius)
        else:
            tiny = torch.finfo(x.dtype).tiny  # a radius that x's dtype rounds to zero must not give 0 / 0
            delta = (moved - x) * (self.radius / _norm(moved - x).clamp_min(max(self.radius, tiny))).clamp(max=1)
        return (x + delta).clamp(*bounds)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def check_inputs(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuse an empty batch, integers, NaN, or values outside the bounds."""
    require(x.ndim >= 2 and len(x) > 0, "An attack needs a batch (n, ...), n > 0", tuple(x.shape), "Pass examples.")
    require(x.is_floating_point(), f"Inputs must be floats in {bounds}", x.dtype, "Convert: x.float() / 255.")
    finite("inputs", x)
    low, high = float(x.min()), float(x.max())
    require(bounds[0] <= low and high <= bounds[1], f"Inputs must lie in {bounds}", (low, high),
            "Put the normalisation inside the model and pass pixels in [0, 1].")  # fmt: skip


def ascend(
    x: Tensor,
    gradient: Callable[..., Tensor],
    *,
    ball: Ball,
    steps: int,
    step_size: float,
    decay: float = 0.0,
    look_ahead: bool = False,
    start: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Follow a gradient uphill from x, with momentum, inside the ball and the bounds.

    a ← clip(a + step_size · direction(g)),  g ← decay · g + ∇ / mean|∇|  (the mean over one example's entries).

    Args:
        x: (n, ...) floats within `bounds`.
        gradient: a (n, ...) -> the direction of increase, same shape; called once a step, so that what smooths the
            gradient or averages it over copies belongs into it.
        ball: how far from x.
        steps: >= 0; 0 returns x.
        step_size: in units of x.
        decay: momentum μ; 0 is plain ascent.
        look_ahead: call gradient(a, ahead), where ahead = a + step_size · decay · g is about where the momentum alone
            leads (in the l2 norm g is divided by √d first, so that it is about as long as a step).
        start: where to begin instead of x (clipped into the ball).
        bounds: of valid inputs.

    Returns:
        a tensor like x, detached. An example whose gradient is zero stays where it is.

    Cost: `steps` calls of `gradient`.

    Raises:
        Refused: inputs outside the bounds, steps < 0, an l2 radius above √d, a gradient that is not finite.
    """
    require(
        steps >= 0 and step_size >= 0, "ascend needs steps >= 0 and step_size >= 0", (steps, step_size), "Raise it."
    )
    check_inputs(x, bounds)
    most = (bounds[1] - bounds[0]) * math.sqrt(x[0].numel())  # the distance of the farthest inputs
    require(ball.norm == "linf" or ball.radius <= most, f"An l2 radius of {x[0].numel()} numbers must be at most "
            f"{most:.4g}", ball.radius, "Divide by 255 if it is in grey levels.")  # fmt: skip
    x = x.detach()
    a = x.clone() if start is None else ball.clip(x, start, bounds)
    momentum = torch.zeros_like(x)
    ahead = step_size * decay / (1 if ball.norm == "linf" else math.sqrt(x[0].numel()))
    for _ in range(steps):
        g = gradient(a, a + ahead * momentum) if look_ahead else gradient(a)
        finite("gradient", g, "Check the surrogate model for NaN.")
        if decay == 0 and ball.norm == "linf":  # only the sign counts
            momentum = g
        else:
            mean = g.abs().flatten(1).mean(1).view(-1, *[1] * (g.ndim - 1))
            momentum = decay * momentum + g / mean.clamp_min(torch.finfo(g.dtype).tiny)  # zero gradients: 0 / tiny = 0
        a = ball.clip(x, a + step_size * ball.step(momentum), bounds)
    return a


def goal_gradient(goals: Sequence[Goal], a: Tensor) -> Tensor:
    """Gradient at `a` of the goals' mean, each example on its own (sums over examples separate exactly).

    On a CPU goals about labels are asked for 128 examples at a time.
    """
    require(bool(goals), "An attack needs at least one goal", "none", "Pass one goal for each surrogate model.")
    labelled = [goal for goal in goals if isinstance(goal, LabelGoal) and len(goal.labels) == len(a)]
    if len(a) > PASS and a.device.type == "cpu" and len(labelled) == len(goals):
        spans = [slice(start, start + PASS) for start in range(0, len(a), PASS)]
        return torch.cat([goal_gradient([goal.rows(span) for goal in labelled], a[span]) for span in spans])
    with torch.enable_grad():
        point = a.detach().requires_grad_()
        sums = [goal(point).sum() for goal in goals]
        total = torch.stack(sums).mean() if len(sums) > 1 else sums[0]
        return torch.autograd.grad(total, point)[0]


def gradients_at(goals: Sequence[Goal], points: Tensor, *, at_once: int | None = None) -> Tensor:
    """Gradients of the goals' mean at several copies of a batch, of which many share a pass.

    Args:
        goals: those of `misclassify`, `reach` and `fused` share passes; others are asked for one copy at a time.
        points: (k, n, ...), k copies of n examples.
        at_once: >= 1, how many copies share a pass; by default as many as make 128 examples, at least one.

    Returns:
        a tensor like `points`.

    Cost: k forward and backward passes of n examples, in k / at_once calls.

    >>> gradients_at([lambda x: (x**2).sum(1)], torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    tensor([[[2., 4.]],
    <BLANKLINE>
            [[6., 8.]]])
    """
    require(at_once is None or at_once >= 1, "at_once must be >= 1", at_once, "Leave it out for all at once.")
    labelled = [goal for goal in goals if isinstance(goal, LabelGoal)]
    share = (at_once or max(1, PASS // points.shape[1])) if len(labelled) == len(goals) else 1
    found = []
    for some in torch.split(points, share):
        asked = [goal.repeated(len(some)) for goal in labelled] if share > 1 else goals
        found.append(goal_gradient(asked, some.flatten(0, 1)).view_as(some))
    return torch.cat(found)


@dataclass(frozen=True)
class LabelGoal:
    """A goal about the labels of a batch, which copies of the batch share.

    Args:
        of: x (n, ...), labels (n,) -> (n,).
        labels: (n,) integers.
        model: whose goal it is, for attacks that look into their surrogates; None where it is not one model's.
        targeted: whether the labels are to be reached.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    model: nn.Module | None = None
    targeted: bool = False

    def __post_init__(self) -> None:
        kind = self.labels.dtype
        require(not (kind.is_floating_point or kind.is_complex or kind == torch.bool), "Labels must be class numbers",
                kind, "Pass y.argmax(1) of one-hot rows, or y.long().")  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        require(len(x) == len(self.labels), "A goal needs one label for each example", (len(self.labels), len(x)),
                "Make the goal of this batch's labels.")  # fmt: skip
        return self.of(x, self.labels)

    def rows(self, which: slice) -> LabelGoal:
        """The goal of some of the examples."""
        return replace(self, labels=self.labels[which])

    def repeated(self, copies: int) -> LabelGoal:
        """The goal of `copies` batches one after another."""
        return replace(self, labels=self.labels.repeat(copies, *[1] * (self.labels.ndim - 1)))


def logits(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the model says in eval mode; modules found in train mode are put back into it."""
    if not isinstance(model, nn.Module):
        return model(x)
    with evaluating(model):
        said: Tensor = model(x)
    return said


def own(goals: Sequence[Goal], attack: str) -> list[LabelGoal]:
    """The goals as one model's each, about the same labels, all to be left or all to be reached.

    Raises:
        Refused: no goals, one that `misclassify` and `reach` did not make, or goals that differ in more than the model.
    """
    found = [goal for goal in goals if isinstance(goal, LabelGoal) and goal.model is not None]
    same = all(g.targeted == found[0].targeted and torch.equal(g.labels, found[0].labels) for g in found)
    require(0 < len(found) == len(goals) and same, f"{attack} needs goals of one model each, about the same labels",
            f"{len(found)} such of {len(goals)}", "Pass [misclassify(model, y) for model in surrogates].")  # fmt: skip
    return found


def misclassify(model: nn.Module, labels: Tensor) -> Goal:
    """The goal of leaving the labels behind: cross-entropy of `model` in eval mode."""
    return LabelGoal(lambda x, y: cross_entropy(logits(model, x), y), labels, model)


def reach(model: nn.Module, labels: Tensor) -> Goal:
    """The targeted goal: examples should be taken for `labels`."""
    return LabelGoal(lambda x, y: -cross_entropy(logits(model, x), y), labels, model, True)
