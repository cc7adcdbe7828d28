"""Survival in discrete time: bins, the risk hazards say, and how well risks order patients."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.core.validate import finite, require


def binned(times: Tensor, bins: int = 32, width: float = 365.0) -> Tensor:
    """The bin (n,) of each time (n,) > 0; the last bin is open. The same bins must be used for all tasks.

    >>> binned(torch.tensor([10.0, 365.0, 99999.0])).tolist()
    [0, 1, 31]
    """
    finite("times", times)
    require(
        bool((times > 0).all()), "Survival times must be > 0", float(times.min()), "Leave out patients without one."
    )
    require(
        bins >= 1 and width > 0, "Bins need bins >= 1 and width > 0", (bins, width), "The paper has 32 of 365 days."
    )
    return (times.double() / width).floor().long().clamp(max=bins - 1)


def risk(logits: Tensor) -> Tensor:
    """Minus the expected number of bins survived (n,), from hazard logits (n, T): higher dies sooner."""
    return -torch.cumprod(torch.sigmoid(-logits.double()), 1).sum(1)


def concordance(risks: Tensor, times: Tensor, events: Tensor) -> float:
    """Harrell's C: how often, of two patients who can be compared, the one who died first had the higher risk.

    Patients i, j can be compared if i died, and before j's time; or at j's time, while j was censored. Equal risks (to
    1e-8) count half.

    Args:
        risks: (n,) higher is sooner.
        times: (n,) of the event or of the last look.
        events: (n,) true where the event was seen.

    Cost: O(n²) comparisons in blocks of four million, so the memory is free of n.

    Raises:
        Refused: different lengths, NaN, events other than 0 and 1, nobody to compare.

    Reference: Harrell et al. 1982.

    >>> concordance(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]))
    1.0
    """
    require(len(risks) == len(times) == len(events), "Concordance needs one risk, time and event a patient",
            (len(risks), len(times), len(events)), "Align the three.")  # fmt: skip
    finite("risks", risks)
    finite("times", times)
    require(bool(((events == 0) | (events == 1)).all()), "Events must be 0 or 1", "others", "1 is a death seen.")
    r, t, e = risks.double(), times.double(), events.bool()
    right, pairs = 0.0, 0
    for rows in torch.split(torch.nonzero(e)[:, 0], max(1, 2**22 // max(1, len(r)))):
        after = (t > t[rows, None]) | ((t == t[rows, None]) & ~e)  # (b, n)
        gap = r[rows, None] - r
        right += int((after & (gap > 1e-8)).sum()) + int((after & (gap.abs() <= 1e-8)).sum()) / 2
        pairs += int(after.sum())
    require(
        pairs > 0, "Concordance needs two patients who can be compared", "none", "Follow more patients to an event."
    )
    return right / pairs
