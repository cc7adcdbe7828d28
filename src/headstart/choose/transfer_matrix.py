"""What a transfer matrix says: learning curves, the plain ways to choose sources, and whether the gap is linear.

A transfer matrix J (n, n) holds in row i how well a policy trained on context i does on each context j, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from headstart.core.validate import finite, require


def scaled(contexts: Tensor) -> Tensor:
    """Contexts (n,) or (n, q) as float64 (n, q), each dimension moved and scaled to [0, 1].

    Raises:
        Refused: no contexts, contexts that are not numbers, NaN.

    >>> scaled(torch.tensor([10.0, 20.0, 50.0])).flatten().tolist()
    [0.0, 0.25, 1.0]
    """
    numeric = isinstance(contexts, Tensor) and not contexts.is_complex() and contexts.dtype != torch.bool
    require(numeric, "Contexts must be a tensor of numbers", getattr(contexts, "dtype", type(contexts).__name__),
            "Embed contexts that are names or pictures first, or pass torch.tensor(contexts).")  # fmt: skip
    require(contexts.ndim in (1, 2) and contexts.numel() > 0, "Contexts must have shape (n,) or (n, q), n > 0",
            tuple(contexts.shape), "Give each context one row.")  # fmt: skip
    x = contexts.detach().cpu().double().reshape(len(contexts), -1)
    finite("contexts", x)
    low, high = x.amin(0), x.amax(0)
    return (x - low) / torch.where(high > low, high - low, 1.0)


def square(matrix: Tensor) -> Tensor:
    """A transfer matrix in float64, refused where it is not square, empty or has NaN."""
    require(matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0, "A transfer matrix must be (n, n), n > 0",
            tuple(matrix.shape), "Give one row a source and one column a target.")  # fmt: skip
    finite("A transfer matrix", matrix)
    return matrix.double()


def learning_curve(matrix: Tensor, sources: Sequence[int]) -> Tensor:
    """The mean over contexts of the best of the first 1, 2, ... sources (k,).

    >>> learning_curve(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [1, 0]).tolist()
    [0.5, 1.0]
    """
    return square(matrix)[list(sources)].cummax(0).values.mean(1)


def random_curve(matrix: Tensor, budget: int) -> Tensor:
    """What `learning_curve` is on average over all orders of random sources, exactly (budget,).

    The r-th best source of a context is the best of k random ones in C(n - r, k - 1) of C(n, k) draws.
    """
    ranked = square(matrix).sort(0, descending=True).values.mean(1).tolist()  # mean over contexts of the r-th best
    n = len(ranked)
    _affordable(n, budget)
    best = [sum(v * math.comb(n - 1 - r, k - 1) for r, v in enumerate(ranked)) / math.comb(n, k)
            for k in range(1, budget + 1)]  # fmt: skip
    return torch.tensor(best, dtype=torch.float64)


def _affordable(n: int, budget: int) -> None:
    require(1 <= budget <= n, f"The budget must be 1..{n}, the number of contexts", budget, "Train fewer sources.")


def equidistant(n: int, budget: int) -> list[int]:
    """`budget` sources in the middles of as many equal parts of a grid of n contexts.

    >>> equidistant(9, 3)
    [1, 4, 7]
    """
    _affordable(n, budget)
    return [(2 * k + 1) * n // (2 * budget) for k in range(budget)]


def bisection(n: int, budget: int) -> list[int]:
    """The middle of a grid of n contexts, then always into the widest gap, where one policy serves both sides.

    A gap between two sources is cut in the middle; one between a source and the edge a third from the edge.

    >>> bisection(31, 5)
    [15, 5, 25, 10, 20]
    """
    _affordable(n, budget)
    chosen = [(n - 1) // 2]
    while len(chosen) < budget:
        gaps = []
        for left, right in pairwise([None, *sorted(chosen), None]):
            first, last = (0 if left is None else left), (n - 1 if right is None else right)
            inside = [i for i in range(first, last + 1) if i not in chosen]
            at = first + (last - first) * (1 / 3 if left is None else 2 / 3 if right is None else 1 / 2)
            if inside:
                away = [(abs(i - at), i) for i in inside]
                gaps.append((last - first, min(away)[1]))
        chosen.append(max(gaps, key=lambda gap: gap[0])[1])
    return chosen


def sequential_oracle(matrix: Tensor, budget: int) -> list[int]:
    """The sources that raise the curve most, one after the other, by the true matrix; nobody can have this."""
    matrix = square(matrix)
    _affordable(len(matrix), budget)
    best, chosen = torch.full_like(matrix[0], -math.inf), list[int]()
    while len(chosen) < budget:
        reached = torch.maximum(matrix, best).mean(1)
        reached[chosen] = -math.inf
        chosen.append(first_largest(reached))
        best = torch.maximum(best, matrix[chosen[-1]])
    return chosen


def independent(matrix: Tensor) -> float:
    """What one policy for each context reaches: n trainings."""
    return float(square(matrix).diagonal().mean())


def oracle(matrix: Tensor) -> float:
    """What the best source for each context reaches: n trainings and all transfers known."""
    return float(square(matrix).amax(0).mean())


def first_largest(values: Tensor) -> int:
    """The lowest index among the largest values."""
    return int((values == values.max()).nonzero()[0, 0])


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is expected of training each context next: all (n,), in units of performance in [0, 1]."""

    mean: Tensor
    deviation: Tensor
    gain: Tensor


def expected_gain(optimistic: Tensor, falls: Tensor, best: Tensor) -> Tensor:
    """How much training context i is expected to raise the best known performance, mean over contexts (n,).

    Args:
        optimistic: (n,), forecast performance of training i on context i.
        falls: (n, n), how much less that is on context j.
        best: (n,), the best known performance on context j.

    >>> expected_gain(torch.tensor([1.0, 0.5]), torch.tensor([[0.0, 0.2], [0.2, 0.0]]), torch.tensor([0.6, 0.6]))
    tensor([0.3000, 0.0000])
    """
    return (optimistic[:, None] - falls - best).clamp_min(0).mean(1)


def slopes_of(
    given: float | tuple[float, ...] | None, x: Tensor, sources: Sequence[int], rows: Tensor, *, of_nearest: bool
) -> Tensor:
    """How fast the performance of training each context falls with distance in each dimension (n, q).

    Args:
        given: one number, or one for each dimension; None estimates them from observed rows.
        x: (n, q), scaled contexts.
        sources: the k that were trained.
        rows: (k, n), what they reach; rows with NaN are left out.
        of_nearest: each context has the slope of the nearest source's own line, with intercept, through the sizes of
            its gaps; otherwise all have the one slope through the origin of all rows.
    """
    if given is not None:
        known = torch.as_tensor(given, dtype=torch.float64).flatten()
        require(len(known) in (1, x.shape[1]), f"There must be one slope, or one for each of {x.shape[1]} dimensions",
                len(known), "Pass as many slopes as contexts have numbers.")  # fmt: skip
        return known.expand_as(x)
    good = (~rows.isnan().any(1)).nonzero()[:, 0]
    if len(good) == 0:
        return torch.full_like(x, 1e-6)
    at = torch.tensor(sources)[good]
    apart, gaps = (x - x[at][:, None]).abs(), rows[good].gather(1, at[:, None]) - rows[good]  # (k, n, q), (k, n)
    if not of_nearest:
        return _fitted(apart.flatten(0, 1), gaps.flatten()).clamp_min(1e-6).expand_as(x)
    lines = torch.cat([apart, torch.ones_like(apart[..., :1])], 2)
    own = [_fitted(line, size)[: x.shape[1]] for line, size in zip(lines, gaps.abs(), strict=True)]
    return torch.stack(own).clamp_min(1e-6)[(x[:, None] - x[at]).abs().sum(2).argmin(1)]


def _fitted(columns: Tensor, values: Tensor) -> Tensor:
    """Least squares through the origin; the smallest solution where there are several."""
    solution: Tensor = torch.linalg.lstsq(columns, values[:, None], driver="gelsd").solution
    return solution[:, 0]


@dataclass(frozen=True, kw_only=True)
class Linearity:
    """Whether performance falls linearly with the distance between contexts; `gap_linearity` measures it.

    Attributes:
        slope: of the fall, per unit of contexts scaled to [0, 1], mean over dimensions.
        r2: share of the spread of the fall that the line through the origin explains; negative is worse than a mean.
        one_sidedness: 0 where falls to either side are alike, 1 where performance falls to one side only.
    """

    slope: float
    r2: float
    one_sidedness: float

    @property
    def linear(self) -> bool:
        """Whether a method that assumes a linear gap has what it assumes: r2 >= 0.5, a fall, and to both sides."""
        return self.r2 >= 0.5 and self.slope > 1e-3 and self.one_sidedness <= 0.5


def gap_linearity(contexts: Tensor, sources: Sequence[int], rows: Tensor) -> Linearity:
    """Whether the performance of trained policies falls linearly with distance, and to both sides.

    Args:
        contexts: (n,) or (n, q).
        sources: the k contexts that were trained.
        rows: (k, n), the performance of each on all contexts.

    >>> x = torch.linspace(0, 1, 5)
    >>> gap_linearity(x, range(5), 0.9 - 0.5 * (x[:, None] - x).abs())
    Linearity(slope=0.5, r2=1.0, one_sidedness=0.0)
    """
    x, rows, at = scaled(contexts), rows.double(), torch.as_tensor(list(sources))
    require(rows.shape == (len(at), len(x)) and len(at) > 0 and len(x) > 1,
            f"Rows must be (sources, contexts) = ({len(at)}, {len(x)}), two contexts or more", tuple(rows.shape),
            "Evaluate each trained policy on every context.")  # fmt: skip
    finite("rows", rows)
    towards = (x - x[at][:, None]).flatten(0, 1)  # (k n, q), signed
    gaps = (rows.gather(1, at[:, None]) - rows).flatten()
    slopes = _fitted(towards.abs(), gaps)
    total, left = (gaps - gaps.mean()).square().sum(), (gaps - towards.abs() @ slopes).square().sum()
    r2 = 1 - float(left / total) if total > 1e-24 else 0.0
    up, down = _fitted(torch.cat([towards.clamp(min=0), (-towards).clamp(min=0)], 1), gaps).view(2, -1)
    size = float(up.abs().sum() + down.abs().sum())
    uneven = float((up - down).abs().sum()) / size if size > 1e-12 else 0.0
    return Linearity(slope=round(float(slopes.mean()), 6), r2=round(r2, 6), one_sidedness=round(uneven, 6))
