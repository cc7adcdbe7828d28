"""Task vectors of one tensor in half precision, and their sum by coefficients that can be learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstart.core.weights import wider

PIECE = 1 << 18
"""Entries of all vectors together that are widened at a time: 1 MB of float32, so that caches hold them."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What several task vectors add to one tensor of n entries; never written to, so copies of a model share it.

    Attributes:
        values: (k, n), each row a vector divided by its scale.
        scale: (k,) powers of two, so that dividing rounds nothing and tiny vectors do not underflow in float16.
        rows: (k,) which of all vectors these are; those that leave the tensor alone take no memory.
        groups: (n,) which coefficient of a vector each entry has, or None where it has one.
    """

    values: Tensor
    scale: Tensor
    rows: Tensor
    groups: Tensor | None = None

    @classmethod
    def of(cls, changes: Sequence[tuple[int, Tensor]], like: Tensor, half: bool, groups: Tensor | None) -> Changes:
        """From (row, change) pairs, for a tensor like `like`."""
        values, scales = [], []
        for _, change in changes:
            exact = change.to(like.device).double().flatten()
            exponent = torch.frexp(exact.abs().amax()).exponent
            values.append(torch.ldexp(exact, -exponent).to(torch.float16 if half else wider(like.dtype)))
            scales.append(torch.ldexp(exact.new_ones(()), exponent))
        rows = torch.tensor([row for row, _ in changes], device=like.device)
        return cls(torch.stack(values), torch.stack(scales).to(wider(like.dtype)), rows, groups)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Changes:
        return self

    def to(self, device: torch.device) -> Changes:
        """The same on another device; values keep their dtype."""
        if self.values.device == device:
            return self
        groups = None if self.groups is None else self.groups.to(device)
        values, scale, rows = (t.to(device) for t in (self.values, self.scale, self.rows))
        return replace(self, values=values, scale=scale, rows=rows, groups=groups)

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
        """Widened columns, and which they are."""
        width = max(1, PIECE // len(self.values))
        for start in range(0, self.values.shape[1], width):
            piece = slice(start, start + width)
            yield self.values[:, piece].to(dtype), piece

    def total(self, coefficients: Tensor) -> Tensor:
        """The sum over vectors, (n,), with coefficients (m,), or (m, groups)."""
        weights = coefficients.reshape(len(coefficients), -1)[self.rows] * self.scale[:, None]  # (k, groups or 1)
        if self.groups is None:
            return torch.cat([weights[:, 0] @ values for values, _ in self._pieces(weights.dtype)])
        parts = self._pieces(weights.dtype)
        return torch.cat([(weights[:, self.groups[piece].long()] * values).sum(0) for values, piece in parts])

    def inner(self, gradient: Tensor, like: Tensor) -> Tensor:
        """The inner product of each vector with a gradient (n,), in the shape of the coefficients `like`."""
        found = like.new_zeros(len(self.values), like[0].numel())
        for values, piece in self._pieces(like.dtype):
            own = gradient[piece].to(like.dtype)
            if self.groups is None:
                found[:, 0] += values @ own
            else:
                found.index_add_(1, self.groups[piece].long(), values * own)
        found *= self.scale[:, None]
        return torch.zeros_like(like).index_copy_(0, self.rows, found.view(-1, *like.shape[1:]))


class Composition(torch.autograd.Function):
    """base + sum_i coefficient_i change_i, rounded once; going back takes inner products and keeps no graph."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, coefficients: Tensor, changes: Changes) -> Tensor:
        ctx.changes, ctx.like = changes, coefficients
        with torch.autocast(base.device.type, enabled=False):
            total = changes.total(coefficients)
            return (base.flatten().to(total.dtype) + total).to(base.dtype).view_as(base)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.changes.inner(gradient.flatten(), ctx.like), None
