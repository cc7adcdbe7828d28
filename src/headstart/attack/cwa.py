"""Common weakness attack."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient, own
from headstart.core.paper import Paper
from headstart.core.validate import require

from .ensemble import fused
from .settings import check

PAPER = Paper(
    title="Rethinking Model Ensemble in Transfer-based Adversarial Attacks",
    authors="Huanran Chen and Yichi Zhang and Yinpeng Dong and Xiao Yang and Hang Su and Jun Zhu",
    year=2024,
    arxiv="2303.09105",
    code="https://github.com/huanranchen/AdversarialAttacks",
    departs="The outer momentum is scaled for each example, not for the batch; the reverse step averages logits; inner "
    "steps grow with the square root of the input's size.",
)


@dataclass(frozen=True, kw_only=True)
class CWA:
    """Inputs changed by at most `radius` that lie in a weakness all surrogates share: flat, near each one's optimum.

    Each step goes a little way back to where the averaged logits do better, then once through the surrogates, from
    each to the next along its own normalised gradient with momentum. Where that ends is where the step leads. To
    first order it is the sum of the normalised gradients; to second order it seeks points where they agree.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (code: 16 / 255).
        steps: >= 0 (code: 10); 0 returns x.
        step_size: in (0, 1]; by default 2 · radius / steps (code).
        decay: μ >= 0 of both momenta (code: 1).
        norm: "linf" or "l2".
        reverse: length of the step back, >= 0; by default radius / 15 (code); 0 leaves it out: CSE alone.
        sweep: go through the surrogates. Without, the gradient of the averaged logits at the point that the step back
            leads to: SAM alone (code: reverse = radius / 10), and with reverse=0 `MIFGSM` on `fused` surrogates.
        beta_rms: root mean square, over the entries of x, of a move along one gradient, > 0; by default that of the
            code's β = 250 on pictures of 3x224x224, which is 10.3 radii (l2: radii / √entries); its β = 50 for CSE
            alone is 2.05 radii.
        shuffle: a new order of the surrogates at each step (theory) in place of the given one (code).
        seed: of the orders.
        whole_batch: scale the outer momentum by the whole batch's norm (code); examples then depend on each other.

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals of `misclassify` or `reach`, one for each surrogate.

    Use it when: examples should fool all of several models at once, also those of unlike scale of logits; at hardened
        models, at which the paper finds the largest gains.
    Not when: the aim is transfer to ordinary models, from ordinary surrogates. A comparison by others (TransferAttack,
        four convolutional surrogates) has 23.9 to 49.9 % on four transformers where averaged logits have 32.2 to
        67.5 %, and 43.9 against 43.4 % on a hardened model.

    Cost: `steps` times twice the forward and backward passes of every surrogate, one after another in the sweep.

    Notes: at the default `beta_rms` each surrogate throws the point to the surface of the ball, and the last has the
    final say. A surrogate whose gradient is zero is passed over; `agreement` counts how often. Without the step back
    goals may be any functions.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; with a step back, or without a sweep,
            goals that are not about one model each; no goals; a gradient with NaN.

    Warns: of one goal alone, which has no weakness in common with others.

    Reference: Chen et al. 2024, MI-CWA.

    >>> goals = [lambda x: x[:, 0], lambda x: 9 * x[:, 1]]
    >>> CWA(radius=0.1, reverse=0.0).perturb(torch.full((1, 2), 0.5), goals)
    tensor([[0.6000, 0.6000]])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    reverse: float | None = None
    sweep: bool = True
    beta_rms: float | None = None
    shuffle: bool = False
    seed: int = 0
    whole_batch: bool = False

    def __post_init__(self) -> None:
        check(self, self.decay)
        require(self.reverse is None or 0 <= self.reverse <= 1, "CWA needs 0 <= reverse <= 1, in units of x in [0, 1]",
                self.reverse, "Leave it out for radius / 15.")  # fmt: skip
        require(self.beta_rms is None or 0 < self.beta_rms < math.inf, "CWA needs a finite beta_rms > 0", self.beta_rms,
                "Leave it out for 10.3 radii.")  # fmt: skip

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        require(bool(goals), "An attack needs at least one goal", "none", "Pass one goal for each surrogate model.")
        if len(goals) == 1:
            warnings.warn("CWA was given one surrogate: it seeks what several have in common", stacklevel=2)
        x, size = x.detach(), math.sqrt(x[0].numel())
        ball, bounds, draws = Ball(self.radius, self.norm), (0.0, 1.0), torch.Generator().manual_seed(self.seed)
        back = self.radius / 15 if self.reverse is None else self.reverse
        usual = 250 / math.sqrt(3 * 224 * 224) / (16 / 255) * self.radius / (1 if self.norm == "linf" else size)
        beta = size * (usual if self.beta_rms is None else self.beta_rms)
        joint: list[Goal] = []
        if back > 0 or not self.sweep:
            ours = own(goals, "CWA with a step back, or without a sweep,")
            joint = [fused([g.model for g in ours if g.model], ours[0].labels, targeted=ours[0].targeted)]
        inner, outer = torch.zeros_like(x), torch.zeros_like(x)

        def gradient(a: Tensor) -> Tensor:
            nonlocal inner, outer
            point = a
            if back > 0:
                point = ball.clip(x, a - back * ball.step(goal_gradient(joint, a)), bounds)
            if self.sweep:
                order = torch.randperm(len(goals), generator=draws).tolist() if self.shuffle else range(len(goals))
                for k in order:
                    inner = self.decay * inner + Ball(1.0, "l2").step(goal_gradient([goals[k]], point))
                    point = ball.clip(x, point + beta * inner, bounds)
                found = (point - a) * ((point - a).abs() > 4 * torch.finfo(x.dtype).eps)  # no move but by rounding
            else:
                found = goal_gradient(joint, point)
            if not self.whole_batch:
                return found  # `ascend` scales it for each example and adds the momentum
            outer = self.decay * outer + found / found.abs().sum().clamp_min(torch.finfo(found.dtype).tiny)
            return outer

        return ascend(
            x,
            gradient,
            ball=ball,
            steps=self.steps,
            step_size=self.step_size or 2 * self.radius / max(self.steps, 1),
            decay=0.0 if self.whole_batch else self.decay,
        )
