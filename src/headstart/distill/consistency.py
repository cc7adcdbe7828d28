"""Agreement of a model with itself on several versions of an input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.plan import Step, Term
from headstart.core.validate import require


class Consistency(Term):
    """A model that answers alike on an input and on two augmented versions of it; needs no labels.

    The loss is strength · JS(p(x), p(a₁), p(a₂)), the mean over examples. Beside the cross-entropy on clean inputs, and
    with AugMix's mixed chains as `augment`, it is AugMix; here it makes the robust teacher of `Robustify`.

    Args:
        augment: x of a batch -> a worse x, drawing from torch's global generator.
        strength: >= 0 (AugMix: 12).

    Cost: two forward passes more a step.

    Reference: Hendrycks et al. 2020 (arXiv 1912.02781), section 3.
    """

    def __init__(self, augment: Callable[[Any], Any], strength: float = 12.0) -> None:
        require(0 <= strength < math.inf, "Consistency needs a finite strength >= 0", strength, "AugMix uses 12.")
        super().__init__()
        self.augment, self.strength = augment, strength

    def forward(self, step: Step) -> Tensor:
        x = step.batch.x
        logits = torch.stack([step.run(version).output for version in (x, self.augment(x), self.augment(x))])
        return self.strength * jensen_shannon(logits).mean()


def jensen_shannon(logits: Tensor) -> Tensor:
    """How far k distributions are apart, (k, n, ..., c) -> (n, ...): the mean KL to their mean, in [0, log k].

    >>> jensen_shannon(torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]])).exp()  # disjoint: log 2
    tensor([2.])
    """
    logs = F.log_softmax(logits, -1)
    middle = logs.logsumexp(0) - math.log(len(logs))
    return (logs.exp() * (logs - middle)).sum(-1).mean(0)
