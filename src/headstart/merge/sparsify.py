"""Keep exactly the largest entries of a model, however many shards it comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from headstart.core.validate import finite
from headstart.core.weights import Weights

_HALF = 1 << 16  # a float32 is counted in two halves of 16 bits
_CHUNK = 1 << 22  # entries whose bits are held at once


@dataclass(frozen=True)
class Cut:
    """Which entries of stacked tensors (k, ...) stay: those above `edge`, and the first `ties` that equal it.

    Attributes:
        edge: (k, 1) int32, the bit pattern of the smallest magnitude that is kept in each row.
        ties: (k, 1) int64, how many entries of exactly that magnitude are kept, from the first on.
    """

    edge: Tensor
    ties: Tensor

    def __call__(self, stacked: Tensor) -> Tensor:
        """The stacked tensors with everything else set to 0; their shape is kept."""
        bits = magnitude_bits(stacked)
        edge, ties = self.edge.to(bits.device), self.ties.to(bits.device)
        tied = bits == edge
        kept = (bits > edge) | (tied & (tied.cumsum(1) <= ties))
        return stacked * kept.view_as(stacked)

    def tied_in(self, stacked: Tensor) -> Tensor:
        """How many entries of each row equal the edge, (k, 1)."""
        bits = magnitude_bits(stacked)
        return (bits == self.edge.to(bits.device)).sum(1, keepdim=True).cpu()


def magnitude_bits(stacked: Tensor) -> Tensor:
    """|x| as float32, read as integers (k, n): they are ordered as the magnitudes are."""
    return stacked.reshape(len(stacked), -1).float().abs().view(torch.int32)


def largest(read: Callable[[], Iterable[Tensor]], kept: int) -> Cut:
    """The cut that keeps exactly the `kept` largest magnitudes of each row of a matrix that is read in pieces.

    The kept-th largest is found by counting bit patterns: first the high halves of all entries, then the low halves of
    those in the bin where the count reaches `kept`. Nothing is sorted and nothing but the counts is held.

    Args:
        read: starts a pass over the pieces, each (k, ...); called twice.
        kept: entries to keep in each row, from 1 to the row's length.

    Cost: two passes, O(1) an entry; memory 0.5 MB a row and one chunk.

    Notes: magnitudes are compared as float32. Equal ones at the edge are kept in the order they are read.

    >>> cut = largest(lambda: [torch.tensor([[5.0, -1.0, 0.1]]), torch.tensor([[-3.0, 0.0]])], 2)
    >>> cut(torch.tensor([[5.0, -1.0, 0.1, -3.0, 0.0]])).tolist()
    [[5.0, -0.0, 0.0, -3.0, 0.0]]
    """
    high, left = _descend(_count(bits >> 16 for bits in _chunks(read())), torch.tensor(kept))
    inside = (torch.where(bits >> 16 == high, bits & (_HALF - 1), _HALF) for bits in _chunks(read()))
    low, ties = _descend(_count(inside), left)
    return Cut((high << 16 | low).int().cpu(), ties.cpu())


def _chunks(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    return (chunk for piece in pieces for chunk in torch.split(magnitude_bits(piece), _CHUNK, 1))


def _count(halves: Iterable[Tensor]) -> Tensor:
    """How often each value 0..65535 occurs in each row (k, 65536); the value 65536 is not counted."""
    total = torch.zeros((), dtype=torch.int64)
    for half in halves:
        rows = torch.arange(len(half), device=half.device)[:, None] * (_HALF + 1)
        counts = torch.bincount((half + rows).flatten(), minlength=len(half) * (_HALF + 1))
        total = total.to(half.device) + counts.view(len(half), -1)[:, :_HALF]
    return total


def _descend(counts: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The bin (k, 1) where counting from the largest reaches `kept`, and how many to keep inside that bin (k, 1)."""
    counts, kept = counts.flip(1), kept.to(counts.device)
    reached = counts.cumsum(1)
    place = (reached < kept).sum(1, keepdim=True)
    return _HALF - 1 - place, kept - (reached - counts).gather(1, place)


def deltas(name: str, models: Sequence[Weights], base: Weights) -> Tensor:
    """One tensor's change from `base` in each model (k, ...), in float32 or wider; NaN and infinity are refused."""
    first = models[0][name]
    wide = torch.promote_types(first.dtype, torch.float32)
    changed = torch.stack([model[name].to(first.device, wide) for model in models]) - base[name].to(first.device, wide)
    finite(f"tensor {name!r}", changed, "Do not merge a diverged model.")
    return changed


def distinct(names: Sequence[str], models: Sequence[Weights], base: Weights) -> dict[str, str]:
    """Floating tensor -> the first that is the same in every model: a tied weight is counted under one name.

    Copies are known by their bytes, so that weights read from disk count as those in memory do.
    """
    first: dict[bytes, str] = {}
    same = {}
    for name in names:
        if base[name].is_floating_point():
            digest = blake2b(repr(tuple(base[name].shape)).encode())
            for weights in (base, *models):
                digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            same[name] = first.setdefault(digest.digest(), name)
    return same
