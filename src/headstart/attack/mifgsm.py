"""Momentum iterative attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient
from headstart.core.paper import Paper

from .settings import check

PAPER = Paper(
    title="Boosting Adversarial Attacks with Momentum",
    authors="Yinpeng Dong and Fangzhou Liao and Tianyu Pang and Hang Su and Jun Zhu and Xiaolin Hu and Jianguo Li",
    year=2018,
    arxiv="1710.06081",
    code="https://github.com/dongyp13/Non-Targeted-Adversarial-Attacks",
)


@dataclass(frozen=True, kw_only=True)
class MIFGSM:
    """Inputs changed by at most `radius` so that models other than the surrogates err too.

    Each step follows the sign (or, in the l2 norm, the direction) of g ← decay · g + ∇ / mean|∇|: gradients that
    agree from step to step add up, those that belong to one surrogate cancel.

    Args:
        radius: of the ball, in units of x in [0, 1]; at most 1 in linf (paper: 16 / 255).
        steps: >= 0 (paper: 10); 0 returns x.
        step_size: in (0, 1]; by default radius / steps, which just reaches the surface of the ball (paper).
        decay: μ >= 0 (paper: 1); 0 is the iterative attack without momentum.
        norm: "linf" or "l2".

    Shape: x (n, ...) in [0, 1] -> the same shape and dtype; goals give (n,). Put normalisation inside the model.

    Use it when: asking how far errors carry over between your own models, or making examples for adversarial training.
    Not when: the strongest attack on one known model is wanted: decay=0 with more steps finds worse points there.

    Cost: `steps` forward and backward passes of every surrogate.

    Notes: several goals are averaged; to average the surrogates' logits instead, pass one goal from `fused`.

    Raises:
        Refused: an argument out of range; x empty, not finite or outside [0, 1]; no goals; a gradient with NaN.

    Reference: Dong et al. 2018, algorithm 1.

    >>> import torch
    >>> MIFGSM(radius=0.1).perturb(torch.full((1, 2), 0.5), [lambda x: x[:, 0] - x[:, 1]])
    tensor([[0.6000, 0.4000]])
    """

    radius: float = 16 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        check(self, self.decay)

    def perturb(self, x: Tensor, goals: Sequence[Goal]) -> Tensor:
        return ascend(
            x,
            partial(goal_gradient, goals),
            ball=Ball(self.radius, self.norm),
            steps=self.steps,
            step_size=self.step_size or self.radius / max(self.steps, 1),
            decay=self.decay,
        )
