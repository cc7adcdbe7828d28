"""Adaptive ensemble attack."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, logits, own
from headstart.core.confident import cross_entropy
from headstart.core.paper import Paper
from headstart.core.validate import one_of, require

from .draws import generators
from .fusion import Fusion, adaptive_weights, consensus
from .settings import check

PAPER = Paper(
    title="An Adaptive Model Ensemble Adversarial Attack for Boosting Adversarial Transferability",
    authors="Bin Chen and Jia-Li Yin and Shukai Chen and Bo-Hao Chen and Ximeng Liu",
    year=2023,
    arxiv="2308.02897",
    code="https://github.com/CHENBIN99/AdaEA",
    departs="Weights belong to one example, not to the batch, unless asked otherwise; the filter is symmetric in the "
    "surrogates; the noisy start lies in [0, 1]; targeted attacks turn the ratios over.",
)


@dataclass(frozen=True, kw_only=True)
class AdaEA:
    """Inputs changed by at most `radius` so that other models err, led by the surrogates whose steps harm others too.

    At each step every surrogate's own step is tried on all others. The more it harms them, compared with what their own
    steps do, the more its logits weigh. Places where the surrogates' gradients disagree over the channels are left out.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (code: 8 / 255).
        steps: >= 0 (code: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / 4 (code). Also the length of the steps that are tried.
        decay: μ >= 0 of the momentum (code: 0.9); 0 is the iterative attack.
        norm: "linf" (paper) or "l2".
        beta: >= 0, sharpness of the weights (code: 10); 0 weighs alike, as `MIFGSM` on `fused` surrogates.
        reduce: add a surrogate's ratios at the others ("sum", code: weights sharpen with their number) or "mean" them.
        per_sample: weights for each example; False weighs by the batch's mean losses (paper). Then an example depends
            on its batch, but a surrogate of much larger logits loses weight, as it does not with weights per example.
        drf: "full" filter, "official" (the code's, which passes over the last surrogate) or None. None also, with a
            warning, where x has no second axis of two channels or more, or there is one surrogate.
        eta: least mean cosine of a place that is kept, <= 1 (code: -0.3). The official map has a smaller range.
        noise: standard deviation of the start's noise, >= 0 (code: 0.001).
        seed: of that noise, which is a function of it and the example's number alone.
        first: number of x's first example in its data set, so that splitting it into batches changes nothing.

    Shape: x (n, channels, ...) in [0, 1] -> the same shape and dtype; goals of `misclassify` or `reach`.

    Use it when: with per_sample=False, surrogates are of unlike scale, so that one of them would silence the others;
        with digits, averaged probabilities and `CWA` were better still.
    Not when: they are alike: averaged logits are as good (in a comparison by others, TransferAttack, level) for a third
        of the price. Nor with a hardened surrogate, which gets little weight as its steps harm the others little.

    Cost: at each step k forward passes, 2k backward passes and k² forward passes to try the steps, k · n examples at
    once; memory of all surrogates at once.

    Notes: weights are about these examples at this step, no property of a model.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; goals that are not about one model
            each; a gradient with NaN.

    Warns: of one surrogate alone, and of inputs without channels unless drf=None.

    Reference: Chen et al. 2023, algorithm 1.

    >>> from headstart.core.ascent import misclassify
    >>> from torch import nn
    >>> goals = [misclassify(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), torch.zeros(5).long()) for _ in range(2)]
    >>> AdaEA(radius=0.1).perturb(torch.rand(5, 2, 4, 4), goals).shape
    torch.Size([5, 2, 4, 4])
    """

    radius: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 0.9
    norm: Literal["linf", "l2"] = "linf"
    beta: float = 10.0
    reduce: Literal["sum", "mean"] = "sum"
    per_sample: bool = True
    drf: Literal["full", "official"] | None = "full"
    eta: float = -0.3
    noise: float = 0.001
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self, self.decay)
        one_of("reduce", self.reduce, ["sum", "mean"])
        one_of("drf", str(self.drf), ["full", "official", "None"])
        require(0 <= self.beta < math.inf, "AdaEA needs a finite beta >= 0", self.beta, "The code uses 10.")
        require(self.eta <= 1, "AdaEA needs eta <= 1, as no cosine is larger", self.eta, "The code uses -0.3.")
        require(0 <= self.noise < 1, "AdaEA needs 0 <= noise < 1", self.noise, "The code uses 0.001.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        return self.traced(x, goals)[0]

    def traced(self, x: Tensor, goals: Sequence[Goal]) -> tuple[Tensor, Fusion]:
        """The changed inputs, and how the surrogates were weighed on the way to them."""
        check_inputs(x)
        ours = own(goals, "AdaEA")
        k, n, y, sign = len(ours), len(x), ours[0].labels, -1 if ours[0].targeted else 1
        channels = x.ndim > 2 and x.shape[1] > 1
        if k == 1:
            warnings.warn("AdaEA was given one surrogate, so there is nothing to weigh", stacklevel=3)
        elif self.drf and not channels:
            warnings.warn("AdaEA filters over channels, and these inputs have none: pass drf=None", stacklevel=3)
        ball, bounds, length = Ball(self.radius, self.norm), (0.0, 1.0), self.step_size or self.radius / 4
        clean, labels = x.detach().repeat(k, *[1] * (x.ndim - 1)), y.repeat(k)
        weights, losses, kept = [], [], []

        def gradient(a: Tensor) -> Tensor:
            with torch.enable_grad():  # a copy of the point for each surrogate: all their gradients in one call
                points = a.detach().repeat(k, *[1] * (a.ndim - 1)).requires_grad_()
                said = [logits(g.model, at) for g, at in zip(ours, torch.split(points, n), strict=True) if g.model]
                total = sign * cross_entropy(torch.cat(said), labels).sum()
                slopes = torch.autograd.grad(total, points, retain_graph=True)[0]
                tried = ball.clip(clean, points.detach() + length * ball.step(slopes), bounds)
                with torch.no_grad():
                    after = [cross_entropy(logits(g.model, tried), labels) for g in ours if g.model]
                losses.append(torch.stack(after).view(k, k, n))
                shared = losses[-1] if self.per_sample else losses[-1].mean(2, keepdim=True)
                w = adaptive_weights(shared, beta=self.beta, reduce=self.reduce, targeted=sign < 0)
                weights.append(w.expand(k, n))
                total = sign * cross_entropy((w[..., None] * torch.stack(said)).sum(0), y).sum()
                found = torch.autograd.grad(total, points)[0].view(k, *a.shape).sum(0)
            filtered, share = found, found.new_ones(n)
            if self.drf and channels and k > 1:
                mask = consensus(slopes.view(k, *a.shape), drf=self.drf) >= self.eta
                filtered = found * mask[:, None]
                left = filtered.flatten(1).any(1)
                filtered = torch.where(left.view(-1, *[1] * (a.ndim - 1)), filtered, found)
                share = torch.where(left, mask.flatten(1).to(found.dtype).mean(1), 0)
            kept.append(share)
            return filtered

        draws = generators(self.seed, self.first, n)
        away = torch.stack([torch.randn(x.shape[1:], dtype=x.dtype, generator=draw) for draw in draws]).to(x.device)
        start = x + self.noise * away if self.steps else None
        moved = ascend(x, gradient, ball=ball, steps=self.steps, step_size=length, decay=self.decay, start=start)
        if not self.steps:
            return moved, Fusion(weights=x.new_empty(0, k, n), losses=x.new_empty(0, k, k, n), kept=x.new_empty(0, n))
        return moved, Fusion(weights=torch.stack(weights), losses=torch.stack(losses), kept=torch.stack(kept))
