"""Attack on clips that are mixed with foreign backgrounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, LabelGoal, ascend, check_inputs, goal_gradient, logits, own
from headstart.core.confident import cross_entropy
from headstart.core.paper import Paper
from headstart.core.validate import finite, one_of, require

from .clips import consistent_gradient, mixed, smoothed
from .draws import generators
from .settings import check

PAPER = Paper(
    title="Temporal Consistency Constrained Transferable Adversarial Attacks with Background Mixup for Action "
    "Recognition",
    authors="Ping Li and Jianan Ni and Bo Pang",
    year=2025,
    arxiv="2505.17807",
    code="https://github.com/mlvccn/BMTC_TransferAttackVid",
    departs="Gradients are smoothed over time by default; the consistency term takes part in the step, by a second "
    "derivative, where the released code adds a constant. What comes out lies in the ball around the clip itself.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BMTC:
    """Clips changed by at most `radius` so that other video models err, by gradients in front of other backgrounds.

    The surrogates see γ · clip + (1 - γ) · background, one background a clip, the same in every frame; the gradient of
    each frame is averaged with those before and after it. Without mixing and averaging this is iterative FGSM.

    Args:
        backgrounds: (m, c, h, w) in [0, 1], m >= 1 frames without the actor and not from the clips themselves (paper:
            one for each class); see `median_background`.
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: momentum μ >= 0 (paper: 0).
        norm: "linf" or "l2".
        gamma: γ in (0, 1] (paper: 0.8); 1 mixes nothing.
        selector: "random", "best" (what the goals are highest in front of, before the first step), or a policy from x
            to scores (n, m), such as `learned_policy` makes (paper).
        sample: draw from the policy's softmax instead of taking its highest score.
        smooth: average gradients over three frames; False for the paper's step.
        consistency: λ >= 0 of the paper's term, by which adjacent frames' gradients are turned towards each other
            (paper: 0.1, with smooth=False); above 0 it needs second derivatives.
        guidance: κ >= 0; above 0 the surrogates must also tell background categories, and examples are moved towards
            that of their background (the paper gives no number; 0.5 is a start).
        categories: (m,) the surrogates' class of each background, for guidance > 0.
        seed: of the draws, which follow from it and the example's number alone.
        first: number of x's first example in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: clips (n, c, t, h, w), or pictures (n, c, h, w), in [0, 1] -> the same shape and dtype; goals give (n,). Put
        normalisation, and any other order of axes, inside the model.

    Use it when: asking how far errors carry over between your own video models; compare with gamma=1, smooth=False.
    Not when: gains are expected unseen. On small clips of moving squares mixing gained nothing over a grey frame or no
        mixing, and smoothing helped or harmed by the architecture (`headstart claims`).

    Cost: `steps` forward and backward passes of every surrogate, about three times as much with consistency > 0;
        selector="best" adds m forward passes.

    Notes: models of ReLU and max pooling have few second derivatives, so consistency may change little; attention
    kernels without one raise torch's error. A victim must not have been the surrogate or auxiliary of a policy.

    Raises:
        Refused: an argument out of range, backgrounds of another size than the frames; x empty, not finite or outside
            [0, 1]; no goals; with guidance, goals that are not of `misclassify`; a gradient with NaN.

    Reference: Li et al. 2025; background mixup, its guidance, and temporal gradient consistency.

    >>> attack = BMTC(backgrounds=torch.rand(3, 1, 1, 2), radius=0.1)
    >>> attack.perturb(torch.full((1, 1, 4, 1, 2), 0.5), [lambda x: (x[..., 0] - x[..., 1]).flatten(1).sum(1)])[0, 0, 0]
    tensor([[0.6000, 0.4000]])
    """

    backgrounds: Tensor = field(repr=False)
    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 0.0
    norm: Literal["linf", "l2"] = "linf"
    gamma: float = 0.8
    selector: Literal["random", "best"] | Callable[[Tensor], Tensor] = "random"
    sample: bool = False
    smooth: bool = True
    consistency: float = 0.0
    guidance: float = 0.0
    categories: Tensor | None = None
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self, self.decay)
        check_inputs(self.backgrounds)
        require(self.backgrounds.ndim == 4, "BMTC needs backgrounds (m, c, h, w)", tuple(self.backgrounds.shape),
                "Stack single frames.")  # fmt: skip
        require(0 < self.gamma <= 1, "BMTC needs 0 < gamma <= 1", self.gamma, "The paper uses 0.8.")
        require(0 <= self.consistency < 1e6, "BMTC needs consistency >= 0", self.consistency, "The paper uses 0.1.")
        require(0 <= self.guidance < 1e6, "BMTC needs guidance >= 0", self.guidance, "Pass 0.5, or leave it out.")
        if isinstance(self.selector, str):
            one_of("selector", self.selector, ["random", "best"])
            require(not self.sample, "sample=True needs a policy", self.selector, "Pass the policy as selector.")
        shape = None if self.categories is None else tuple(self.categories.shape)
        require(self.guidance == 0 or shape == (len(self.backgrounds),), "guidance > 0 needs a category of each "
                f"background, {(len(self.backgrounds),)}", shape, "Pass categories=.")  # fmt: skip

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        chosen = self.choose(x, goals)
        frames = self.backgrounds.to(x)[chosen]
        if self.guidance > 0:
            assert self.categories is not None
            goals = _guided(goals, self.categories.to(x.device)[chosen], self.guidance)
        seen = [partial(_in_front_of, goal, frames, self.gamma) for goal in goals]

        def gradient(a: Tensor) -> Tensor:
            consistent = self.consistency > 0 and a.ndim == 5
            g = consistent_gradient(seen, a, self.consistency) if consistent else goal_gradient(seen, a)
            return smoothed(g) if self.smooth and a.ndim == 5 else g

        return ascend(
            x,
            gradient,
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
        )

    def choose(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        """The number of the background that each clip is mixed with (n,)."""
        check_inputs(x)
        m, *frame = self.backgrounds.shape
        require(x.ndim in (4, 5) and [x.shape[1], *x.shape[-2:]] == frame, "BMTC needs clips (n, c, t, h, w) or "
                f"pictures (n, c, h, w) with frames of {tuple(frame)}", tuple(x.shape), "Turn the axes.")  # fmt: skip
        require(bool(goals), "An attack needs at least one goal", "none", "Pass one goal for each surrogate model.")
        draws = generators(self.seed, self.first, len(x))
        u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in draws]).to(x.device)
        with torch.no_grad():
            if self.selector == "random":
                return (u * m).long()
            if self.selector == "best":
                bank = self.backgrounds.to(x)[:, None]
                at = [torch.stack([goal(mixed(x, frame, self.gamma)) for goal in goals]).mean(0) for frame in bank]
                return torch.stack(at).argmax(0)
            assert not isinstance(self.selector, str)
            scores = logits(self.selector, x)
        require(scores.shape == (len(x), m), f"A policy must give scores {(len(x), m)}", tuple(scores.shape), "Train "
                "it for these backgrounds.")  # fmt: skip
        finite("scores of the policy", scores, "Train it again.")
        below = scores.double().softmax(1).cumsum(1) <= u[:, None]
        return below.sum(1).clamp(max=m - 1) if self.sample else scores.argmax(1)


def _in_front_of(goal: Goal, frames: Tensor, gamma: float, a: Tensor) -> Tensor:
    return goal(mixed(a, frames, gamma))


def _guided(goals: Sequence[Goal], aims: Tensor, strength: float) -> list[Goal]:
    """Leave the labels and reach the backgrounds' categories, one pass for both."""
    owned = own(goals, "BMTC with guidance")
    require(not owned[0].targeted, "guidance > 0 has a target of its own", "goals of reach", "Use misclassify.")

    def of(goal: LabelGoal, a: Tensor) -> Tensor:
        assert goal.model is not None
        said = logits(goal.model, a)
        require(int(aims.min()) >= 0 and int(aims.max()) < said.shape[1], f"categories must be of {said.shape[1]} "
                "classes", aims.tolist(), "Train a head that tells them.")  # fmt: skip
        loss, missed = (cross_entropy(said, y) for y in (goal.labels, aims))
        return loss - strength * missed

    return [partial(of, goal) for goal in owned]
