"""Diffusion of short vectors: how much noise at which step, the way back, and a network that sees the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.validate import require


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """How a vector is drowned in noise over T steps, and what undoes one step.

    Step t of 0..T-1 keeps sqrt(1 - beta_t) of what was there; of the clean vector sqrt(kept_t) is left after it.

    Args:
        betas: (T,) shares of noise, each in (0, 1); see `linear` and `rooted`.

    Raises:
        Refused: no step, a share outside (0, 1).

    >>> [f"{float(s.kept[-1]):.2e}" for s in (NoiseSchedule.linear(), NoiseSchedule.rooted())]
    ['6.12e-03', '5.61e-04']
    """

    betas: Tensor

    def __post_init__(self) -> None:
        b = self.betas
        good = b.ndim == 1 and len(b) > 0 and bool(((b > 0) & (b < 1)).all())
        require(good, "A noise schedule needs shares in (0, 1)", b.tolist()[:3], "Use NoiseSchedule.linear().")

    @classmethod
    def linear(cls, steps: int = 200, first: float = 1e-4, last: float = 0.05) -> NoiseSchedule:
        """Shares that rise in a line: for few steps."""
        return cls(betas=torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def rooted(cls, steps: int = 1024, first: float = 0.0015, last: float = 0.0155) -> NoiseSchedule:
        """Shares whose roots rise in a line, as latent diffusion has them."""
        return cls(betas=torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square())

    @cached_property
    def kept(self) -> Tensor:
        """(T,) share of the clean vector's variance that is left after each step."""
        return (1 - self.betas).cumprod(0)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The vectors (n, d) after steps t (n,), given standard normal noise (n, d)."""
        kept = self.kept.to(clean)[t, None]
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def clean(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the clean vectors were if this was the noise."""
        kept = self.kept.to(noisy)[t, None]
        return (noisy - (1 - kept).sqrt() * noise) / kept.sqrt()

    def back(self, noisy: Tensor, noise: Tensor, t: int, fresh: Tensor) -> Tensor:
        """One ancestral step from t: the predicted noise out, a little fresh noise in (none at t = 0)."""
        kept, beta = self.kept, float(self.betas[t])
        mean = (noisy - beta / math.sqrt(1 - float(kept[t])) * noise) / math.sqrt(1 - beta)
        spread = math.sqrt(beta * (1 - float(kept[t - 1])) / (1 - float(kept[t]))) if t else 0.0
        return mean + spread * fresh


@torch.no_grad()
def ancestral(
    schedule: NoiseSchedule,
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """Vectors drawn from what a network that predicts noise has learned.

    Args:
        schedule: the one it was trained with.
        predict: (noisy (n, d), t (n,)) -> noise (n, d).
        shape: (n, d).
        generator: of the first noise and of that of each step, on the device to compute on.

    Cost: T calls of `predict`.
    """
    noisy = torch.randn(shape, generator=generator, device=generator.device)
    for t in reversed(range(len(schedule.betas))):
        times = torch.full(shape[:1], t, device=noisy.device)
        fresh = torch.randn(shape, generator=generator, device=generator.device)
        noisy = schedule.back(noisy, predict(noisy, times), t, fresh)
    return noisy


class Denoiser(nn.Module):
    """Predicts the noise in a vector from the vector, the step, and a condition.

    Args:
        latent: width of the vectors.
        condition: width of the condition.
        width: of the two hidden layers.
        waves: sinusoids that tell the step, even.

    Shape: {"noisy": (n, latent), "time": (n,) steps, "condition": (n, condition)} -> (n, latent).
    """

    def __init__(self, latent: int, condition: int, *, width: int = 256, waves: int = 32) -> None:
        require(waves >= 2 and waves % 2 == 0, "Denoiser needs an even number of waves", waves, "Pass 32.")
        super().__init__()
        self.register_buffer("rates", torch.logspace(0, -4, waves // 2))
        self.layers = nn.Sequential(
            nn.Linear(latent + waves + condition, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, latent),
        )  # fmt: skip

    def forward(self, x: Mapping[str, Any]) -> Tensor:
        angles = x["time"][:, None] * self.rates
        noise: Tensor = self.layers(torch.cat([x["noisy"], angles.sin(), angles.cos(), x["condition"]], 1))
        return noise


class Conditional(nn.Module):
    """A denoiser with the encoder of its condition; which piece of the vector it is comes along, never dropped."""

    def __init__(self, encoder: nn.Module, denoiser: Denoiser, pieces: int) -> None:
        super().__init__()
        self.encoder, self.denoiser, self.pieces = encoder, denoiser, pieces

    def condition(self, sets: Tensor, piece: Tensor, kept: Tensor) -> Tensor:
        """(n, classes, shots, d), pieces (n,), 1 or 0 where the data is left out (n,) -> (n, condition)."""
        data: Tensor = self.encoder(sets) * kept[:, None]
        return data if self.pieces == 1 else torch.cat([data, F.one_hot(piece, self.pieces).to(data)], 1)

    def forward(self, x: Mapping[str, Any]) -> Tensor:
        noise: Tensor = self.denoiser({**x, "condition": self.condition(x["sets"], x["piece"], x["kept"])})
        return noise
