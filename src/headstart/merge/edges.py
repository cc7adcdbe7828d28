"""Keep exactly the largest changes of a model, however many files it comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.core.shards import Weights, borrowed, spans, spec_of
from headstart.core.weights import wider

_BINS = 1 << 16  # bit patterns that are told apart in one pass
_INFINITY, _TOP = 0x7F800000, 1 << 31  # the bit pattern of infinity, and what no pattern reaches
_SAMPLE = 1 << 10  # entries looked at in each part to guess where the edge lies


@dataclass(frozen=True)
class Edge:
    """Which entries of a tensor stay: magnitudes above `value`, and those equal to it before the entry `limit`."""

    value: float
    limit: int

    def __call__(self, change: Tensor, start: int) -> Tensor:
        """The change (n,), entries `start` and on of its tensor, with everything else set to 0."""
        if self.limit >= start + len(change):
            return _above(change, float(np.nextafter(np.float32(self.value), np.float32(-1))))
        kept = _above(change, self.value)
        if self.limit > start:  # the tensor in which the count is reached
            tied = change[: self.limit - start]
            kept[: self.limit - start] += tied * (tied.float().abs() == self.value)
        return kept


def _above(change: Tensor, value: float) -> Tensor:
    if change.dtype == torch.float32:
        return torch.nn.functional.hardshrink(change, value)  # one pass; a mask takes four
    return change * (change.float().abs() > value)


def largest(changes: Tensor, kept: int) -> Tensor:
    """Rows (k, d) with everything but the `kept` largest magnitudes of each set to 0.

    >>> largest(torch.tensor([[5.0, -1.0, 0.1, -3.0, 0.0]]), 2).abs().tolist()
    [[5.0, 0.0, 0.0, 3.0, 0.0]]
    """
    found = edges(["x"], [{"x": row} for row in changes], {"x": torch.zeros_like(changes[0])}, [kept] * len(changes))[
        "x"
    ]
    return torch.stack([edge(row, 0) for edge, row in zip(found, changes, strict=True)])


def edges(
    names: Sequence[str], models: Sequence[Weights], base: Weights, kept: Sequence[int]
) -> dict[str, tuple[Edge, ...]]:
    """Name -> for each model the edge that keeps exactly its `kept` largest changes over all the named tensors.

    The kept-th largest magnitude is found by counting bit patterns, which are ordered as magnitudes are: a sample says
    where it must lie, one pass counts what is larger and how often each pattern there occurs. Counts add over files;
    nothing is sorted. Where the sample misled, two more passes count everything.

    Args:
        names: floating tensors, ranked together; equal magnitudes at the edge are kept in this order.
        models: k fine-tuned models.
        base: what they started from.
        kept: entries to keep of each model, from 0 to all there are.

    Cost: one pass over everything, O(1) an entry, and as a rule another over half of it to find where the ties end;
    memory 1 MB a model and one part.

    Notes: magnitudes are compared as float32. NaN counts as the largest; the merge that follows refuses it.
    """
    searches = [_Search(count) for count in kept]
    for _, _, k, bits in _bits(names, models, base, range(len(models)), _SAMPLE):
        searches[k].sample(bits)
    for search in searches:
        search.guess(sum(spec_of(base, name).entries for name in names))
    while unfinished := [k for k, search in enumerate(searches) if not search.done]:
        for _, _, k, bits in _bits(names, models, base, unfinished):
            searches[k].count(bits)
        for k in unfinished:
            searches[k].narrow()
    return _limits(names, models, base, searches)


class _Search:
    """Where the kept-th largest of a stream of magnitudes lies: in [low, low + bins << shift)."""

    def __init__(self, kept: int) -> None:
        self.kept, self.seen, self.done = kept, list[NDArray[np.int32]](), kept == 0
        self.low, self.shift = _INFINITY if kept == 0 else 0, 0
        self.ties = self.total = 0  # how many at the edge are kept, and how many there are
        self._clear()

    def _clear(self) -> None:
        self.above, self.table = 0, np.zeros(_BINS, np.int64)

    def sample(self, bits: NDArray[np.int32]) -> None:
        self.seen.append(bits.copy())

    def guess(self, entries: int) -> None:
        """A range around the sample's own edge, one percent of the ranks to each side."""
        if self.done:
            return
        seen = np.concatenate(self.seen)
        self.seen = []
        place, margin = len(seen) * (1 - self.kept / entries), 0.01 * len(seen) + 10
        ranks = np.clip([place - margin, place + margin], 0, len(seen) - 1).astype(int)
        low, high = (int(v) for v in np.partition(seen, ranks)[ranks])
        self._range(low, high + 1)

    def _range(self, low: int, high: int) -> None:
        self.low, self.shift = low, max(0, (high - low - 1).bit_length() - 16)

    def count(self, bits: NDArray[np.int32]) -> None:
        """A part of the stream; it is changed."""
        offset = np.subtract(bits, self.low, out=bits).view(np.uint32)  # what lies below becomes very large
        inside = offset[offset < _BINS << self.shift]
        self.table += np.bincount(inside >> self.shift, minlength=_BINS)
        self.above += int(np.count_nonzero(bits >= 0)) - len(inside)

    def narrow(self) -> None:
        """Take the bin that holds the edge; or, where the range missed it, everything on that side."""
        reached = self.above + np.cumsum(self.table[::-1])
        if self.above >= self.kept:
            self._range(self.low + (_BINS << self.shift), _TOP)
        elif reached[-1] < self.kept:
            self._range(0, self.low)
        else:
            place = _BINS - 1 - int(np.searchsorted(reached, self.kept))
            self.done = self.shift == 0
            self.total = int(self.table[place])
            self.ties = self.kept - int(reached[_BINS - 1 - place]) + self.total
            low = self.low + (place << self.shift)
            self._range(low, low + (1 << self.shift))
        self._clear()


def _limits(
    names: Sequence[str], models: Sequence[Weights], base: Weights, searches: Sequence[_Search]
) -> dict[str, tuple[Edge, ...]]:
    """The edges by tensor: before which entry of which tensor the last tie that is kept comes."""
    sizes = {name: spec_of(base, name).entries for name in names}
    limits = {name: [sizes[name] if s.ties == s.total else 0 for s in searches] for name in names}
    left = {k: search.ties for k, search in enumerate(searches) if search.ties < search.total}
    for name, start, k, bits in _bits(names, models, base, left):
        if k in left:
            tied = np.flatnonzero(bits == searches[k].low)
            if len(tied) >= left[k]:
                limits[name][k] = start + int(tied[left.pop(k) - 1]) + 1
            else:
                limits[name][k] = start + len(bits)
                left[k] -= len(tied)
    values = [float(np.array(search.low, np.int32).view(np.float32)) for search in searches]
    return {name: tuple(map(Edge, values, limits[name])) for name in names}


def _bits(
    names: Sequence[str], models: Sequence[Weights], base: Weights, which: Mapping[int, int] | Sequence[int],
    most: int | None = None,
) -> Iterator[tuple[str, int, int, NDArray[np.int32]]]:  # fmt: skip
    """(name, first entry, model, bit patterns of the magnitudes of its changes) part by part, on the CPU.

    `which` may lose models on the way; `most` reads only the first entries of each part. The patterns are the reader's
    to change, and gone with the next.
    """
    for name in names:
        spec, origin = spec_of(base, name), borrowed(base, name)
        every = {k: borrowed(models[k], name) for k in which}
        wide = wider(spec_of(models[0], name).dtype)
        for start, stop in spans(spec.entries):
            if not which:
                return
            stop = stop if most is None else min(stop, start + most)
            before = origin(start, stop).cpu().to(wide).numpy()
            space = np.empty(len(before), before.dtype)
            for k in list(which):
                change = np.subtract(every[k](start, stop).cpu().to(wide).numpy(), before, out=space)
                bits = change.astype(np.float32, copy=False).view(np.int32)
                yield name, start, k, np.bitwise_and(bits, 0x7FFFFFFF, out=bits)
