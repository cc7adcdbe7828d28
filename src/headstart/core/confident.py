"""Cross-entropy whose gradient confidence does not drown."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .validate import require


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits) of the labels, each example's own, with a gradient that is right however sure the model is.

    A softmax in float32 says exactly 1 once the other logits are 17 below; the slope of the true logit is then 0, those
    of the others vanish soon after, and whoever follows the gradient takes a sure model for a robust one. Here it is
    softplus(m), where m = log Σ exp(other logits) - true logit. Where the slope would fall below the square root of
    what the dtype can hold (m < -43.7 in float32), its tangent goes on in its place.

    Args:
        logits: (n, c), c >= 2.
        labels: (n,) integers.

    Returns:
        (n,), in float32 or wider; it differs from `torch.nn.functional.cross_entropy` by rounding, and by at most
        1e-16 where the tangent is used (float32).

    >>> sure = torch.tensor([[90.0, 0.0]], requires_grad=True)
    >>> torch.autograd.grad(cross_entropy(sure, torch.tensor([0])).sum(), sure)[0].sign()
    tensor([[-1.,  1.]])
    >>> torch.autograd.grad(F.cross_entropy(sure, torch.tensor([0])), sure)[0].sign()
    tensor([[0., 1.]])
    """
    require(logits.ndim >= 2 and logits.shape[1] >= 2, "Cross-entropy needs logits (n, c) of two classes or more",
            tuple(logits.shape), "Give the model one output for each class.")  # fmt: skip
    lowest = math.log(torch.finfo(logits.dtype).tiny) / 2
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    m = logits.scatter(1, labels.unsqueeze(1), -torch.inf).logsumexp(1) - true
    above = m.clamp_min(lowest)
    return F.softplus(above) + math.exp(lowest) * (m - above)
