"""Make a training set unbalanced by a given ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.core.validate import require


def balanced(labels: Tensor, shares: Sequence[int]) -> Tensor:
    """Rows that are left of each class c: the first floor(n_c shares_c / max(shares)), in their order.

    Args:
        labels: (n,) integers in 0..c-1.
        shares: one integer >= 1 a class, such as (20, 80).

    Raises:
        Refused: shares that do not fit the labels, or that leave nothing of a class.

    >>> balanced(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), (30, 70))
    tensor([0, 4, 5, 6, 7])
    """
    counts = torch.bincount(labels, minlength=len(shares)).tolist()
    require(len(counts) == len(shares) and min(shares, default=0) >= 1, f"balanced needs {len(counts)} shares >= 1",
            tuple(shares), "Pass one positive integer for each class.")  # fmt: skip
    left = [n * share // max(shares) for n, share in zip(counts, shares, strict=True)]
    require(min(left) >= 1, "Each class must keep an example", left, "Take more examples or a milder balance.")
    rows = [(labels == label).nonzero()[:n, 0] for label, n in enumerate(left)]
    return torch.cat(rows).sort().values
