"""The weighted sum of low-rank changes, exactly or at the best lower rank, without forming the large matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from headstart.core.validate import finite, require

Layout: TypeAlias = Literal["linear", "transposed", "embedding"]
"""How an adapter stores the factors: of the weight (out, in), of its transpose (in, out), or of a table (rows, dim)."""


@dataclass(frozen=True)
class Factors:
    """A change of one stored weight (m, n): scale * up @ down.

    Attributes:
        up: (m, rank).
        down: (rank, n).
        scale: what the product is multiplied by; alpha / rank in LoRA.
        layout: how it is written into an adapter folder; the factors here are of the stored weight in any case.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    layout: Layout = "linear"

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop-1 of the change, (stop - start, n), in float32 or wider."""
        wide = torch.promote_types(torch.promote_types(self.up.dtype, self.down.dtype), torch.float32)
        return self.scale * (self.up[start:stop].to(wide) @ self.down.to(wide))


@dataclass(frozen=True)
class LowRankSum:
    """A sum of low-rank changes.

    Attributes:
        factors: of the sum, or of what is kept of it; scale 1. Their columns and rows go from the largest to the
            smallest singular value, which they share evenly, so a further cut takes the first ones.
        singular_values: of the whole sum, (min(R, m, n),) with R the sum of the ranks; float64, falling.
        discarded: share of the squared norm that `factors` leave out, 0 when nothing is cut.
    """

    factors: Factors
    singular_values: Tensor
    discarded: float


def low_rank_sum(parts: Sequence[tuple[Tensor, Tensor, float]], *, rank: int | None = None) -> LowRankSum:
    """The factors of w_1 B_1 A_1 + ... + w_k B_k A_k: adapters merged, at the cost of their small factors.

    With the factors side by side, the sum is B diag(w) A; B = Q R and Aᵀ = P S, and the singular values of the sum are
    those of the small R diag(w) Sᵀ.

    Args:
        parts: (B (m, r), A (r, n), weight) of each change; ranks may differ, weights may be negative or 0.
        rank: of the result, >= 1. None keeps min(R, m, n), which is exact; fewer is the best approximation of that
            rank in the Frobenius norm.

    Shape: factors (m, rank) and (rank, n), in the widest dtype of the parts, on the device of the first.

    Use it when: several adapters of one base become one, or one adapter is cut to a lower rank.
    Not when: the changes are trimmed or their signs elected first: those are not of low rank; merge whole weights
        (`fold_adapter`).

    Cost: O((m + n) R² + R³) in float64, against O(m n min(m, n)) of the dense sum's decomposition; memory (m + n) R.
        Four adapters of rank 16 at 2,048 x 2,048 take a 300th of the time (benchmarks/low_rank.py).

    Notes: computed in float64 and rounded once, into the factors. In half precision that costs their three or two
    digits; laying the factors side by side would not, but sorts and cuts nothing.

    Raises:
        Refused: no parts, shapes that differ, rank < 1, NaN.

    >>> column, row = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]])
    >>> merged = low_rank_sum([(column, row, 3.0), (column, row, -1.0)])
    >>> merged.factors.dense().round(decimals=5), merged.singular_values.round(decimals=5), merged.discarded
    (tensor([[0., 2.],
            [0., 0.]]), tensor([2., 0.], dtype=torch.float64), 0.0)
    """
    require(len(parts) >= 1, "A low-rank sum needs at least one part", len(parts), "Pass (B, A, weight) triples.")
    for k, (up, down, weight) in enumerate(parts):
        require(up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0],
                "The factors of a low-rank part must be B (m, r) and A (r, n)",
                f"{tuple(up.shape)} and {tuple(down.shape)} of part {k}", "Pass B, then A.")  # fmt: skip
        shapes = [(b.shape[0], a.shape[1]) for b, a, _ in (parts[0], parts[k])]
        require(shapes[0] == shapes[1], "All parts of a low-rank sum must change one shape",
                f"{shapes[0]} and {shapes[1]} (part {k})", "Sum adapters of one base.")  # fmt: skip
        require(math.isfinite(weight), "Weights must be finite", f"{weight} of part {k}", "Pass numbers.")
        finite(f"B of part {k}", up, "Do not merge a diverged adapter.")
        finite(f"A of part {k}", down, "Do not merge a diverged adapter.")
    require(rank is None or rank >= 1, "A low-rank sum needs rank >= 1", rank, "Pass a rank such as 16, or None.")

    device = parts[0][0].device
    dtype = reduce(torch.promote_types, (factor.dtype for up, down, _ in parts for factor in (up, down)))
    left, tall = torch.linalg.qr(torch.cat([up.to(device, torch.float64) for up, _, _ in parts], 1))
    right, wide = torch.linalg.qr(torch.cat([down.to(device, torch.float64) for _, down, _ in parts]).T)
    weights = torch.cat([torch.full((len(down),), float(weight), dtype=torch.float64) for _, down, weight in parts])
    u, s, vh = torch.linalg.svd((tall * weights.to(device)) @ wide.T, full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    root = s[:kept].sqrt()
    factors = Factors(
        (left @ (u[:, :kept] * root)).to(dtype),
        ((root[:, None] * vh[:kept]) @ right.T).to(dtype),
    )
    squares = s.square()
    total = float(squares.sum())
    return LowRankSum(factors, s, float(squares[kept:].sum()) / total if total else 0.0)
