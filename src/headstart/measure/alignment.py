"""Whether two models' features are the same up to a linear map, and the map."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.core.validate import finite, require


def channels_last(z: Tensor) -> Tensor:
    """Features with their d channels on the last axis: (n, d), (n, p, d), or (n, d, h, w, ...) as (n, h, w, ..., d)."""
    require(z.ndim >= 2 and z.is_floating_point(), "Features must be floats (n, d), (n, p, d) or (n, d, h, w, ...)",
            f"{z.dtype} {tuple(z.shape)}", "Name another layer.")  # fmt: skip
    return z if z.ndim < 4 else z.movedim(1, -1)


def mapped(z: Tensor, matrix: Tensor) -> Tensor:
    """The same linear map (d, d') of the channels at each position of z; the axes stay where they were."""
    moved = channels_last(z) @ matrix.to(z)
    return moved if z.ndim < 4 else moved.movedim(-1, 1)


def paired_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two models' features of the same examples as centred rows (n · positions, d) and (n · positions, d'), float64.

    Raises:
        Refused: features of other examples or positions, or not finite.
    """
    left, right = channels_last(a), channels_last(b)
    require(left.shape[:-1] == right.shape[:-1], "Features are compared position by position, of the same examples",
            (tuple(a.shape), tuple(b.shape)), "Name layers of one height and width, or pool them.")  # fmt: skip
    for z in (a, b):
        finite("features", z, "Check the model for NaN.")
    p, q = (z.detach().flatten(0, -2).double() for z in (left, right))
    return p - p.mean(0), q - q.mean(0)


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """The rotation P (d, d') for which a P comes nearest to b, both centred; U Vᵀ of the singular vectors of aᵀ b.

    Args:
        a: features (n, d), or with positions; see `channels_last`.
        b: another model's features of the same examples, d' channels. With d != d' the rows or columns of P are
            orthonormal, not both.

    Returns:
        (d, d') float64. For a difference of features there are no means to add.

    Cost: O(n d d' + d d' min(d, d')).

    Notes: directions in which the features never vary are turned anywhere. Warns if there are fewer rows than
    channels, where there must be some; 5 d rows are advised.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -2.0]])
    >>> procrustes(a, a @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).round(decimals=6) + 0.0
    tensor([[ 0.,  1.],
            [-1.,  0.]], dtype=torch.float64)
    """
    p, q = paired_rows(a, b)
    channels = max(p.shape[1], q.shape[1])
    if len(p) < channels:
        warnings.warn(f"{len(p)} rows do not determine a rotation of {channels} channels; align on more.", stacklevel=2)
    u, _, vt = torch.linalg.svd(p.T @ q, full_matrices=False)
    turn: Tensor = u @ vt
    return turn


def ridge(a: Tensor, b: Tensor, *, strength: float = 1e-3) -> Tensor:
    """The linear map W (d, d') with the least |a W - b|² + λ |W|², both centred; it may scale and shear.

    Args:
        a: features (n, d), or with positions; see `channels_last`.
        b: another model's features of the same examples, d' channels.
        strength: λ as a share of the mean squared length of a channel of a, > 0.

    Returns:
        (d, d') float64.

    Raises:
        Refused: strength <= 0, or features that never change.
    """
    p, q = paired_rows(a, b)
    gram = p.T @ p
    penalty, rounding = strength * float(gram.diagonal().mean()), 1e-12 * float(a.detach().double().square().sum())
    require(strength > 0 and float(gram.trace()) > rounding, "ridge needs strength > 0 and features that differ",
            (strength, float(gram.trace())), "Pass other inputs; 1e-3 is a usual strength.")  # fmt: skip
    solved: Tensor = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), p.T @ q)
    return solved


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment in [0, 1]; 1 for features equal up to rotation and scale.

    0 where one side never changes. Cost: O(n d d').

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 3.0]])
    >>> round(linear_cka(a, 3 * a.flip(1)), 6)
    1.0
    """
    p, q = paired_rows(a, b)
    size = float((p.T @ p).norm() * (q.T @ q).norm())
    return float((p.T @ q).square().sum()) / size if size > 0 else 0.0


def procrustes_distance(a: Tensor, b: Tensor) -> float:
    """Squared distance of centred features of unit norm after the best rotation, in [0, 2]; 0 for a rotated copy.

    2 where one side never changes.
    """
    p, q = paired_rows(a, b)
    size = float(p.norm() * q.norm())
    if size == 0:
        return 2.0
    return 2 - 2 * min(1.0, float(torch.linalg.svdvals(p.T @ q).sum()) / size)


def aligned_cosine(a: Tensor, b: Tensor, matrix: Tensor) -> float:
    """The mean cosine of centred a mapped by `matrix` with centred b, over examples and positions."""
    p, q = paired_rows(a, b)
    return float(F.cosine_similarity(p @ matrix.to(p), q, dim=1).mean())


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike a target's features are to the source's: linear CKA, Procrustes distance, cosine after the rotation."""

    cka: float
    distance: float
    cosine: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, turn: Tensor) -> Likeness:
        """Of two models' features of the same examples, and the rotation from a to b found on others."""
        return cls(cka=linear_cka(a, b), distance=procrustes_distance(a, b), cosine=aligned_cosine(a, b, turn))
