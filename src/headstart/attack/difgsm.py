"""Attack on resized and shifted inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, check_inputs, goal_gradient
from headstart.core.paper import Paper
from headstart.core.validate import require

from .draws import generators
from .settings import check

PAPER = Paper(
    title="Improving Transferability of Adversarial Examples with Input Diversity",
    authors="Cihang Xie and Zhishuai Zhang and Yuyin Zhou and Song Bai and Jianyu Wang and Zhou Ren and Alan Yuille",
    year=2019,
    arxiv="1803.06978",
    code="https://github.com/cihangxie/DI-2-FGSM",
    departs="Each example draws its own size and place, not the batch; pictures keep their size and proportions.",
)


@dataclass(frozen=True, kw_only=True)
class DIFGSM:
    """Pictures changed by at most `radius` so that other models err, by gradients through random sizes and places.

    As `MIFGSM`, but at each step, with the given probability, the surrogates see the picture resized (bilinear) to a
    random size and put at a random place on black; so the gradient cannot hang on single pixels.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1 for M-DI²-FGSM); 0 is DI²-FGSM.
        norm: "linf" or "l2".
        rate: below 1, sizes run from rate · side to the side; above 1 (paper: 1.1), from the side to rate · side, and
            what was placed is resized back. Sides of 8 pixels need 0.75 or 1.5.
        probability: of being resized, in [0, 1] (paper: 0.5); 0 is `MIFGSM`.
        seed: of sizes and places, a function of it and the example's number alone.
        first: number of x's first example in its data set, >= 0, so that splitting it into batches changes nothing.

    Shape: x (n, c, h, w) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: there is one surrogate for pictures: it carries over far better than `MIFGSM` for the same price.
    Not when: the models read place and size themselves, as on pictures of a few pixels.

    Cost: `steps` forward and backward passes of every surrogate; resizing is 4 · c · h² · w products an example.

    Raises:
        Refused: an argument out of range, pictures too small for the rate; x empty, not finite or outside [0, 1]; no
            goals; a gradient with NaN.

    Reference: Xie et al. 2019, equations 4 and 6.

    >>> DIFGSM(radius=0.1).perturb(torch.full((1, 1, 16, 16), 0.5), [lambda x: x.flatten(1).sum(1)]).unique()
    tensor([0.6000])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"
    rate: float = 0.9
    probability: float = 0.5
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        check(self, self.decay)
        require(0 < self.rate <= 4 and self.rate != 1, "DIFGSM needs 0 < rate <= 4, not 1", self.rate, "Pass 0.9.")
        require(0 <= self.probability <= 1, "DIFGSM needs 0 <= probability <= 1", self.probability, "Pass 0.5.")

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        check_inputs(x)
        require(x.ndim == 4, "DIFGSM needs pictures (n, c, h, w)", tuple(x.shape), "Give each channel an axis.")
        smallest = min(x.shape[2:])
        require(0 < int(self.rate * smallest) != smallest, "DIFGSM needs a rate that changes the size of pictures",
                f"{self.rate} for {smallest} pixels", "Pass 0.75 or 1.5.")  # fmt: skip
        draws = generators(self.seed, self.first, len(x))
        u = torch.stack([torch.rand(self.steps, 4, generator=g, dtype=torch.float64) for g in draws], 1).to(x.device)
        turn = count()

        def gradient(a: Tensor) -> Tensor:
            size, top, left, coin = u[next(turn)].T
            rows, columns = (
                torch.where(
                    (coin < self.probability)[:, None, None],
                    resized(side, self.rate, size, place),
                    torch.eye(side, dtype=torch.float64, device=a.device),
                ).to(a.dtype)[:, None]
                for side, place in ((a.shape[2], top), (a.shape[3], left))
            )
            return rows.mT @ goal_gradient(goals, rows @ a @ columns.mT) @ columns

        return ascend(
            x,
            gradient,
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
        )


def resized(side: int, rate: float, size: Tensor, place: Tensor) -> Tensor:
    """Matrices (n, side, side) that resize an axis and place it, by uniform draws (n,) in [0, 1) for both."""
    low, high = sorted((side, int(rate * side)))
    length = low + (size * (high - low)).long().clamp(max=high - low - 1)
    offset = ((high - length) * place).long().minimum(high - length - 1)
    found = _bilinear(side, length, offset, high)
    return found if high == side else _bilinear(high, length.new_tensor([side]), length.new_tensor([0]), side) @ found


def _bilinear(side: int, length: Tensor, offset: Tensor, total: int) -> Tensor:
    """(n, total, side): `side` pixels resized to `length`, from pixel `offset` of `total`, zero around."""
    at = torch.arange(total, device=length.device) - offset[:, None]
    source = ((at + 0.5) * (side / length.double())[:, None] - 0.5).clamp(0, side - 1)
    taps = (1 - (source[..., None] - torch.arange(side, device=length.device)).abs()).clamp(min=0)
    return taps * ((at >= 0) & (at < length[:, None]))[..., None]
