"""Optimizers and schedules for plans: how fast to learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer


def constant(_progress: float) -> float:
    """The learning rate stays."""
    return 1.0


def cosine(progress: float) -> float:
    """The learning rate falls to zero along half a cosine.

    >>> cosine(0.0), round(cosine(0.5), 3)
    (1.0, 0.5)
    """
    return 0.5 * (1 + math.cos(math.pi * progress))


def adamw(lr: float = 1e-3, weight_decay: float = 0.0) -> Callable[[list[nn.Parameter]], Optimizer]:
    """An optimizer for a plan: AdamW over all trainable parameters."""
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def sgd(
    lr: float = 0.01, momentum: float = 0.9, weight_decay: float = 0.0
) -> Callable[[list[nn.Parameter]], Optimizer]:
    """An optimizer for a plan: SGD with momentum over all trainable parameters."""
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
