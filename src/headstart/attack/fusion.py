"""How surrogates are weighed against each other: what `AdaEA` computes, for reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What `AdaEA` did at each step.

    Attributes:
        weights: (steps, k, n) of each surrogate for each example; they sum to one over k.
        losses: (steps, k, k, n) cross-entropy of surrogate i after a step along surrogate j's gradient, at [:, i, j].
        kept: (steps, n) share of places that the filter kept; where it is 0 the gradient was used unfiltered.
    """

    weights: Tensor
    losses: Tensor
    kept: Tensor

    @property
    def entropy(self) -> float:
        """Mean entropy of the weights: log k if all count alike, 0 if one surrogate decides alone."""
        return float(torch.special.entr(self.weights).sum(1).mean())


def adaptive_weights(
    losses: Tensor, *, beta: float = 10.0, reduce: Literal["sum", "mean"] = "sum", targeted: bool = False
) -> Tensor:
    """How much each surrogate counts: a softmax of what its step does to the others, relative to their own steps.

    Args:
        losses: (k, k, ...) >= 0, the cross-entropy of model i after a step along the gradient of model j, at [i, j].
        beta: >= 0, sharpness.
        reduce: "sum" or "mean" over the others.
        targeted: small losses are wanted.

    Returns:
        (k, ...), which sum to one over k. Losses below 1e-6 count as that, and ratios above 1000 as that.

    Reference: Chen et al. 2023, adaptive gradient modulation.

    >>> adaptive_weights(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [3.726...e-06, 0.999996...]
    """
    k, own_step = len(losses), losses.diagonal(dim1=0, dim2=1).movedim(-1, 0)[:, None]  # (k, 1, ...)
    ratios = own_step / losses.clamp_min(1e-6) if targeted else losses / own_step.clamp_min(1e-6)
    others = (1 - torch.eye(k, dtype=losses.dtype, device=losses.device)).view(k, k, *[1] * (losses.ndim - 2))
    scores = (ratios.clamp_max(1e3) * others).sum(0)
    return (beta * scores / (max(k - 1, 1) if reduce == "mean" else 1)).softmax(0)


def consensus(gradients: Tensor, *, drf: Literal["full", "official"] = "full") -> Tensor:
    """Whether models agree, place by place: the mean cosine over the channels of each model with each other one.

    Args:
        gradients: (k, n, channels, ...), k >= 2.
        drf: "full", or "official", whose sum lacks the last model while it still divides by k.

    Returns:
        (n, ...) in [-1, 1].

    Reference: Chen et al. 2023, disparity-reduced filter.

    >>> consensus(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])[..., None])
    tensor([[0.7071]])
    """
    units: Tensor = gradients / gradients.norm(dim=2, keepdim=True).clamp_min(1e-12)
    with_others = (units * (units.sum(0) - units)).sum(2) / (len(units) - 1)
    counted = with_others if drf == "full" else with_others[:-1]
    found: Tensor = counted.sum(0) / len(units)
    return found
