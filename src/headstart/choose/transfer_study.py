"""Which survival models carry over to which tasks as they are: the matrix, what it says, and a risk for rare tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.surgery import freeze
from headstart.core.validate import finite, require

from .survival import concordance, risk


def zero_transfer(
    models: Sequence[nn.Module], batches: Iterable[Any], times: Tensor, events: Tensor, folds: Tensor
) -> Tensor:
    """How well each source's model, as it is, orders one target's patients: concordances (sources, folds).

    Args:
        models: from bags to hazard logits (n, T), all of the same bins.
        batches: the target's patients in the order of `times`, as the models take them; read once.
        times, events: (n,) as in `concordance`.
        folds: (n,) integers 0..F-1, by patient; each fold is judged alone.

    Raises:
        Refused: no model, lengths that differ, fewer than two folds, a fold without patients to compare.
    """
    require(bool(models), "zero_transfer needs a model", "none", "Pass the sources' trained models.")
    frozen = [freeze(model).eval() for model in models]
    with torch.no_grad():
        risks = torch.cat([torch.stack([risk(model(x)) for model in frozen]) for x in batches], 1)
    require(risks.shape[1] == len(times) == len(events) == len(folds), "Each patient needs a bag, time, event and fold",
            (risks.shape[1], len(times), len(events), len(folds)), "Align the four.")  # fmt: skip
    rows = [folds == k for k in range(int(folds.max()) + 1)]
    require(len(rows) > 1, "zero_transfer needs two folds", len(rows), "One fold has no standard error.")
    return torch.tensor([[concordance(r[k], times[k], events[k]) for k in rows] for r in risks], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferStudy:
    """How well models of sources do on targets as they are.

    Attributes:
        matrix: (sources, targets) concordance, the mean over folds.
        error: (sources, targets) its standard error over folds.
        transferability: (sources,) mean over targets that are not the source's own task.
        receptiveness: (targets,) mean over sources that are not the target's own model.
        own: whether the diagonal is each task's own model.
    """

    matrix: Tensor
    error: Tensor
    transferability: Tensor
    receptiveness: Tensor
    own: bool

    @classmethod
    def of(cls, folds: Tensor, *, own: bool = True) -> TransferStudy:
        """From concordances (sources, targets, folds), one `zero_transfer` a target, stacked along axis 1.

        Args:
            folds: of at least two folds.
            own: sources and targets are the same tasks in the same order; the two means then leave out the diagonal.
        """
        require(folds.ndim == 3 and folds.numel() > 0 and folds.shape[2] > 1,
                "A study needs concordances (sources, targets, two folds or more)", tuple(folds.shape),
                "Stack one zero_transfer a target.")  # fmt: skip
        require(not own or folds.shape[0] == folds.shape[1] > 1, "A diagonal needs as many sources as targets, two",
                tuple(folds.shape), "Pass own=False where sources are other tasks.")  # fmt: skip
        finite("concordances", folds)
        c = folds.double()
        mean = c.mean(2)
        other = torch.ones_like(mean)
        if own:
            other.fill_diagonal_(0)
        rows, columns = ((mean * other).sum(k) / other.sum(k) for k in (1, 0))
        error = c.std(2) / c.shape[2] ** 0.5
        return cls(matrix=mean, error=error, transferability=rows, receptiveness=columns, own=own)

    def signs(self) -> Tensor:
        """(sources, targets) 1 where transfer is positive (above 0.5 by a standard error), -1 negative, 0 neither."""
        above = self.matrix - 0.5
        return torch.where(above.abs() > self.error, above.sign(), 0.0).long()


def positive_sources(folds: Tensor, test: int, *, own: bool = True) -> Tensor:
    """(sources, targets) true where a source helps by the folds other than `test`, so `test` can judge the choice.

    Args:
        folds: (sources, targets, folds) as in `TransferStudy.of`, three folds or more.
        test: the fold to be judged on, which is not looked at.
        own: as there; a task's own model is not among its sources.
    """
    require(folds.ndim == 3 and 0 <= test < folds.shape[2] > 2, "Choosing needs concordances of three folds, one held",
            (tuple(folds.shape), test), "Two folds must be left to choose on.")  # fmt: skip
    kept = [k for k in range(folds.shape[2]) if k != test]
    positive = TransferStudy.of(folds[:, :, kept], own=own).signs() == 1
    return positive & ~torch.eye(*positive.shape, dtype=torch.bool) if own else positive


def pooled_risk(risks: Tensor, positive: Tensor) -> Tensor:
    """The mean of the standardised risks (sources, n) of the positive sources: for a task too rare to train on.

    >>> pooled_risk(torch.tensor([[1.0, 3.0], [5.0, 5.0], [9.0, 1.0]]), torch.tensor([True, True, False])).tolist()
    [-0.5, 0.5]
    """
    require(risks.ndim == 2 and positive.shape == risks.shape[:1], "pooled_risk needs one flag a source",
            (tuple(risks.shape), tuple(positive.shape)), "Pass one target's column of positive_sources.")  # fmt: skip
    require(bool(positive.any()), "A pooled risk needs a positive source", "none", "Train on the task itself.")
    r = risks[positive].double()
    finite("risks", r)
    spread = r.std(1, correction=0, keepdim=True)
    return ((r - r.mean(1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)).mean(0)
