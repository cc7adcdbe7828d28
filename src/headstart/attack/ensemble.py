"""One goal from several surrogate models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.core.ascent import Goal, LabelGoal, logits
from headstart.core.confident import cross_entropy
from headstart.core.validate import one_of, require

from .stack import stacked


def fused(
    models: Sequence[nn.Module],
    labels: Tensor,
    *,
    by: Literal["logits", "probabilities", "loss"] = "logits",
    weights: Sequence[float] | None = None,
    targeted: bool = False,
    stack: bool = False,
) -> Goal:
    """The goal of leaving `labels` behind for all models at once: the cross-entropy of the models taken together.

    Args:
        models: surrogates, from inputs to logits (n, c) of the same classes; run in eval mode, modes given back.
        labels: (n,).
        by: what is averaged over the models: "logits" (paper: transfers best), "probabilities" or "loss".
        weights: >= 0, one for each model, divided by their sum; by default equal.
        targeted: reach the labels instead of leaving them.
        stack: put models of one architecture through one pass; see `stacked` for when that is faster.

    Cost: one forward pass of every model.

    Notes: logits are comparable only between models of like calibration: one member with six times larger logits
    silences the others, while "loss" and "probabilities" gain from it.

    Raises:
        Refused: no models, an unknown `by`, weights that do not fit, labels that are no integers, models that cannot be
            stacked.

    Reference: Dong et al. 2018, section 3.4; Liu et al. 2017 (arXiv 1611.02770).

    >>> models = [nn.Linear(2, 3), nn.Linear(2, 3)]
    >>> fused(models, torch.tensor([0, 2]))(torch.ones(2, 2)).shape
    torch.Size([2])
    """
    require(bool(models), "fused needs at least one model", "none", "Pass the surrogates.")
    one_of("by", by, ["logits", "probabilities", "loss"])
    shares = [1.0] * len(models) if weights is None else list(weights)
    require(len(shares) == len(models) and min(shares) >= 0 and 0 < sum(shares) < math.inf,
            "fused needs one weight >= 0 for each model, not all zero", shares, "Leave them out.")  # fmt: skip
    sign = -1 if targeted else 1
    together = stacked(models) if stack else lambda x: torch.stack([logits(model, x) for model in models])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        said = together(x)  # (models, n, c)
        share = torch.tensor(shares, dtype=said.dtype, device=said.device)[:, None] / sum(shares)
        if by == "logits":
            return sign * cross_entropy((share[..., None] * said).sum(0), y)
        likelihoods = -cross_entropy(said.flatten(0, 1), y.repeat(len(said))).view(len(said), -1)  # (models, n)
        if by == "loss":
            return -sign * (share * likelihoods).sum(0)
        return -sign * (share.log() + likelihoods).logsumexp(0)

    return LabelGoal(loss, labels)
