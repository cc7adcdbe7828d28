"""One goal from several surrogate models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.ascent import Goal
from headstart.core.validate import one_of, require


def fused(
    models: Sequence[nn.Module], labels: Tensor, *, by: Literal["logits", "probabilities", "loss"] = "logits"
) -> Goal:
    """The goal of leaving `labels` behind for all models at once: the cross-entropy of the models taken together.

    Args:
        models: surrogates in eval mode, from inputs to logits (n, c) of the same classes.
        labels: (n,).
        by: what is averaged over the models: "logits" (paper: transfers best), "probabilities" or "loss".

    Cost: one forward pass of every model.

    Notes: logits are comparable only between models of like calibration: one member with six times larger logits
    silences the others, while "loss" and "probabilities" gain from it.

    Raises:
        Refused: no models, or an unknown `by`.

    Reference: Dong et al. 2018, section 3.4; Liu et al. 2017 (arXiv 1611.02770).

    >>> models = [nn.Linear(2, 3), nn.Linear(2, 3)]
    >>> fused(models, torch.tensor([0, 2]))(torch.ones(2, 2)).shape
    torch.Size([2])
    """
    require(bool(models), "fused needs at least one model", "none", "Pass the surrogates.")
    one_of("by", by, ["logits", "probabilities", "loss"])

    def goal(x: Tensor) -> Tensor:
        logits = torch.stack([model(x) for model in models])  # (models, n, c)
        if by == "logits":
            return F.cross_entropy(logits.mean(0), labels, reduction="none")
        likelihoods = F.log_softmax(logits, -1)[:, torch.arange(len(labels)), labels]  # (models, n)
        if by == "loss":
            return -likelihoods.mean(0)
        return math.log(len(models)) - likelihoods.logsumexp(0)

    return goal
