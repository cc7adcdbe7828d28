"""A small neural process: the risk of training tasks, predicted from the last batch of tasks and their risks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RiskLearner:
    """Batch of (task, risk) -> a latent distribution; task and latent -> risk. Weights are one flat vector.

    One vector keeps the optimizer to six lines, and a state to a few tensors.

    Args:
        width: numbers that describe a task.
        latent: size of the latent (paper: 10).
        hidden: width of the layers (paper: 10).
    """

    width: int
    latent: int = 10
    hidden: int = 32

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each layer: encoder 3, pooled 1, mean, deviation, decoder 4."""
        q, r, h = self.width, self.latent, self.hidden
        return [(h, q + 1), (h, h), (r, h), (r, r), (r, r), (r, r), (h, q + r), (h, h), (h, h), (1, h)]

    def start(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Weights as torch's linear layers begin, Adam at rest, and the prior N(0, I) of the latent."""
        parts = []
        for outputs, inputs in self.shapes:
            draw = torch.rand(outputs * (inputs + 1), generator=generator)
            parts.append((2 * draw - 1) / math.sqrt(inputs))
        weights, nothing, zero = torch.cat(parts), torch.zeros(self.latent), torch.zeros(())
        rest = {"first": torch.zeros_like(weights), "second": torch.zeros_like(weights), "steps": zero, "kl": zero}
        return {"weights": weights, "mean": nothing, "deviation": nothing + 1, **rest}

    def layers(self, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer, views of the flat vector."""
        sizes = [outputs * n for outputs, inputs in self.shapes for n in (inputs, 1)]
        parts = torch.split_with_sizes(weights, sizes)
        return [(w.view(shape), b) for w, b, shape in zip(parts[::2], parts[1::2], self.shapes, strict=True)]

    def encode(self, weights: Tensor, tasks: Tensor, risks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (latent,) of the latent given tasks (b, width) and their risks (b,).

        The batch enters by its mean only: neither its order nor repeating all of it matters.
        """
        layers = self.layers(weights)
        x = torch.cat([tasks, risks[:, None]], 1)
        for layer in layers[:2]:
            x = F.linear(x, *layer).relu()
        pooled = F.linear(F.linear(x, *layers[2]).mean(0), *layers[3]).relu()
        return F.linear(pooled, *layers[4]), 0.1 + 0.9 * F.linear(pooled, *layers[5]).sigmoid()

    def decode(self, weights: Tensor, tasks: Tensor, latents: Tensor) -> Tensor:
        """Predicted risk (s, m) of tasks (m, width) under latents (s, latent)."""
        first, *middle, last = self.layers(weights)[6:]
        task, latent = first[0].split_with_sizes([self.width, self.latent], dim=1)
        x = (F.linear(tasks, task, first[1]) + F.linear(latents, latent)[:, None]).relu()  # (s, m, hidden)
        for layer in middle:
            x = F.linear(x, *layer).relu()
        return F.linear(x, *last)[..., 0]

    def loss(
        self, weights: Tensor, tasks: Tensor, risks: Tensor, noise: Tensor, prior: tuple[Tensor, Tensor],
        *, strength: float, each_sample: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The negative evidence bound, and the divergence from the prior in it.

        Args:
            weights: flat.
            tasks: (b, width).
            risks: (b,).
            noise: (s, latent) standard normal, for s draws of the latent.
            prior: mean and deviation of the latent before this batch; constants.
            strength: of the divergence, β.
            each_sample: squared error of every draw, mean over all; otherwise of the mean of the draws, summed over
                tasks.
        """
        mean, deviation = self.encode(weights, tasks, risks)
        predicted = self.decode(weights, tasks, mean + deviation * noise)
        kl = divergence(mean, deviation, prior[0].detach(), prior[1].detach())
        error = (predicted - risks).square().mean() if each_sample else (predicted.mean(0) - risks).square().sum()
        return error + strength * kl, kl

    def improve(
        self, state: dict[str, Tensor], rate: float, tasks: Tensor, risks: Tensor, noise: Tensor, *, strength: float,
        each_sample: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One step of Adam on the loss, from a state {weights, first, second, steps, mean, deviation} to the next."""
        weights = state["weights"].clone().requires_grad_()
        prior = (state["mean"], state["deviation"])
        with torch.enable_grad():
            loss, kl = self.loss(weights, tasks, risks, noise, prior, strength=strength, each_sample=each_sample)
            (gradient,) = torch.autograd.grad(loss, weights)
        steps = state["steps"] + 1
        first, second = 0.9 * state["first"] + 0.1 * gradient, 0.999 * state["second"] + 0.001 * gradient.square()
        move = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        moved = weights.detach() - rate * move
        return {**state, "weights": moved, "first": first, "second": second, "steps": steps, "kl": kl.detach()}


def divergence(mean: Tensor, deviation: Tensor, mean0: Tensor, deviation0: Tensor) -> Tensor:
    """KL(N(mean, deviation²) || N(mean0, deviation0²)), summed over dimensions.

    >>> float(divergence(torch.ones(2), torch.ones(2), torch.zeros(2), torch.ones(2)))
    1.0
    """
    ratio = (deviation.square() + (mean - mean0).square()) / (2 * deviation0.square())
    return ((deviation0 / deviation).log() + ratio - 0.5).sum()


def standardised(risks: Tensor, running: dict[str, Tensor]) -> Tensor:
    """Risks less the mean of all so far, by their deviation; `running` is moved on."""
    now = torch.stack([torch.ones_like(risks), risks, risks.square()]).double().sum(1)
    running["risk moments"] = now + running.get("risk moments", torch.zeros_like(now))
    count, total, square = running["risk moments"]
    mean = total / count
    deviation = (square / count - mean.square()).clamp_min(0).sqrt()
    scaled: Tensor = (risks - mean) / torch.where(deviation > 1e-8, deviation, 1.0)
    return scaled.float()


def tail_risk(risks: Tensor, alpha: float) -> float:
    """CVaR: the mean of the worst 1 - alpha of the risks, at least one; alpha = 0 is the mean.

    >>> tail_risk(torch.arange(10.0), 0.9), tail_risk(torch.arange(10.0), 0.0)
    (9.0, 4.5)
    """
    worst = math.ceil(len(risks) * (1 - alpha) - 1e-9)  # 10 (1 - 0.9) is 0.999...
    return float(risks.double().topk(max(worst, 1)).values.mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, 0 where either is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else 0.0


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b, 0 where either is constant."""
    one, other = (torch.sign(x[:, None] - x).double() for x in (a, b))
    size = math.sqrt(float(one.square().sum() * other.square().sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0
