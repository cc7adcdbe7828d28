"""What a matrix of transfers says: which sources carry over, which targets take in, and a risk for rare tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.validate import finite, require


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferStudy:
    """How well models of sources do on targets as they are.

    Attributes:
        matrix: (sources, targets) concordance, the mean over folds.
        error: (sources, targets) its standard error over folds; 0 with one fold.
        transferability: (sources,) mean over other tasks as targets.
        receptiveness: (targets,) mean over other tasks as sources.
    """

    matrix: Tensor
    error: Tensor
    transferability: Tensor
    receptiveness: Tensor

    @classmethod
    def of(cls, folds: Tensor) -> TransferStudy:
        """From concordances (sources, targets, folds); with as many sources as targets the diagonal is their own."""
        require(folds.ndim == 3 and folds.numel() > 0, "A study needs concordances (sources, targets, folds)",
                tuple(folds.shape), "Stack one matrix a fold.")  # fmt: skip
        finite("concordances", folds)
        c = folds.double()
        mean = c.mean(2)
        error = c.std(2) / c.shape[2] ** 0.5 if c.shape[2] > 1 else torch.zeros_like(mean)
        other = torch.ones_like(mean)
        if mean.shape[0] == mean.shape[1] > 1:
            other.fill_diagonal_(0)
        rows, columns = ((mean * other).sum(k) / other.sum(k) for k in (1, 0))
        return cls(matrix=mean, error=error, transferability=rows, receptiveness=columns)

    def signs(self) -> Tensor:
        """(sources, targets) 1 where transfer is positive (above 0.5 by a standard error), -1 negative, 0 neither."""
        above = self.matrix - 0.5
        return torch.where(above.abs() > self.error, above.sign(), 0.0).long()


def pooled_risk(risks: Tensor, positive: Tensor) -> Tensor:
    """The mean of the standardised risks (sources, n) of the positive sources: for a task too rare to train on.

    >>> pooled_risk(torch.tensor([[1.0, 3.0], [5.0, 5.0], [9.0, 1.0]]), torch.tensor([True, True, False])).tolist()
    [-0.5, 0.5]
    """
    require(bool(positive.any()), "A pooled risk needs a positive source", "none", "Train on the task itself.")
    r = risks[positive].double()
    spread = r.std(1, correction=0, keepdim=True)
    return ((r - r.mean(1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)).mean(0)
