"""Weights whose vocabulary tensors show the rows of several models in one order, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headstart.core.weights import Spec, Weights, reader, spec_of, wider


class RowView(Mapping[str, Tensor]):
    """One model's weights with the rows of some tensors in another order, and rows of others where it has none.

    Args:
        names: of the tensors whose rows are placed; the others are the model's own.
        weights: of the model.
        own: (rows,) the model's row for each row of the view, -1 where it has none.
        reference: weights that give row k < `kept` where the model has none.
        kept: rows of the reference's tensors.
        donors: (weights, own) of all models: their mean is row k >= `kept` where the model has none.

    Cost: parts read the rows they show, one read for each run of neighbours.
    """

    def __init__(
        self, names: Collection[str], weights: Weights, own: Tensor, reference: Weights, kept: int,
        donors: Sequence[tuple[Weights, Tensor]],
    ) -> None:  # fmt: skip
        self.names, self.weights, self.own, self.reference, self.kept = frozenset(names), weights, own, reference, kept
        self.donors = donors

    @property
    def same(self) -> bool:
        """Whether the view shows what the model has anyway."""
        long = all(spec_of(self.weights, name).shape[0] == len(self.own) for name in self.names)
        return long and torch.equal(self.own, torch.arange(len(self.own)))

    def __getitem__(self, name: str) -> Tensor:
        return self._rows(name, 0, len(self.own)) if name in self.names else self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        spec = spec_of(self.weights, name)
        return replace(spec, shape=(len(self.own), *spec.shape[1:])) if name in self.names else spec

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 of the flattened tensor."""
        if name not in self.names:
            return reader(self.weights, name)(start, stop)
        width = max(math.prod(self.spec(name).shape[1:]), 1)
        first = start // width
        rows = self._rows(name, first, -(-stop // width)).reshape(-1)
        return rows[start - first * width : stop - first * width]

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        own, spec = self.own[first:last], self.spec(name)
        there = own >= 0
        rows = torch.arange(first, first + len(own))
        old, new = ~there & (rows < self.kept), ~there & (rows >= self.kept)
        found = [(there, _gather(self.weights, name, own[there]))]
        if bool(old.any()):
            found.append((old, _gather(self.reference, name, rows[old])))
        if bool(new.any()):
            found.append((new, self._mean(name, rows[new])))
        out = found[0][1].new_empty(len(own), *spec.shape[1:])
        for where, values in found:
            out[where.to(out.device)] = values.to(out)
        return out

    def _mean(self, name: str, rows: Tensor) -> Tensor:
        """Mean over the models that have them; each row has one."""
        spec = self.spec(name)
        total = torch.zeros(len(rows), *spec.shape[1:], dtype=wider(spec.dtype))
        for weights, own in self.donors:
            there = own[rows] >= 0
            total[there] += _gather(weights, name, own[rows][there]).to(total)
        count = torch.stack([own[rows] >= 0 for _, own in self.donors]).sum(0)
        return total / count.view(-1, *[1] * (total.ndim - 1))


def _gather(weights: Weights, name: str, rows: Tensor) -> Tensor:
    """Those rows of a tensor, (len(rows), ...); neighbours are read together."""
    shape = spec_of(weights, name).shape[1:]
    width, read = math.prod(shape), reader(weights, name)
    ends = torch.nonzero(rows.diff() != 1)[:, 0].tolist()
    runs = zip([0, *(end + 1 for end in ends)], [*(end + 1 for end in ends), len(rows)], strict=True)
    first = rows.tolist()
    parts = [read(first[a] * width, (first[b - 1] + 1) * width) for a, b in runs if b > a]
    return torch.cat(parts).view(-1, *shape) if parts else read(0, 0).view(0, *shape)
