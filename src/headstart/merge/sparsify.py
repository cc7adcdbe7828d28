"""Which tensors are copies, which entries of a change are among the largest, and lots that belong to a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from headstart.core.shards import Weights, reader, spans, spec_of

from .edges import Edge, edges

_BLOCK = 1 << 16  # random numbers that are drawn at once


def distinct(names: Sequence[str], models: Sequence[Weights], base: Weights) -> dict[str, str]:
    """Floating tensor -> the first that is the same in every model: a tied weight is counted under one name.

    Copies are known by their bytes, so that weights read from disk count as those in memory do. Tensors that no model
    changed stay apart, since equal ones, such as biases of zeros, need not be tied. Names come sorted, as in the
    official TIES: files and state dicts have orders of their own.
    """
    first: dict[tuple[bytes, ...], str] = {}
    same = {}
    alike: dict[object, int] = {}
    floating = sorted(name for name in names if spec_of(base, name).dtype.is_floating_point)
    starts = {name: (spec_of(base, name), *(_digest(one, name, 256) for one in (base, *models))) for name in floating}
    for start in starts.values():
        alike[start] = alike.get(start, 0) + 1
    for name in floating:
        same[name] = name
        if alike[starts[name]] > 1:
            digests = tuple(_digest(one, name) for one in (base, *models))
            if any(digest != digests[0] for digest in digests):
                same[name] = first.setdefault(digests, name)
    return same


def _digest(weights: Weights, name: str, most: int | None = None) -> bytes:
    spec, read = spec_of(weights, name), reader(weights, name)
    digest = blake2b(repr(spec).encode())
    for start, stop in spans(spec.entries if most is None else min(most, spec.entries)):
        digest.update(read(start, stop).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def grouped(same: Mapping[str, str], base: Weights, trim: Literal["model", "tensor"]) -> list[list[str]]:
    """The tensors that are ranked together: all that have entries, or each alone; of copies only the first."""
    names = [name for name in dict.fromkeys(same.values()) if spec_of(base, name).entries]
    return [names] if trim == "model" else [[name] for name in names]


def keep_largest(
    groups: Sequence[Sequence[str]],
    same: Mapping[str, str],
    models: Sequence[Weights],
    base: Weights,
    count: Callable[[int], Sequence[int]],
) -> Callable[[str, int, Tensor, int], Tensor]:
    """A function (tensor, model, change, first entry) -> the change without what is not among the largest.

    Args:
        groups: tensors that are ranked together (`grouped`).
        same: tensor -> the first of its copies (`distinct`).
        models: k fine-tuned models.
        base: what they started from.
        count: entries of a group -> how many of them each model keeps.
    """
    found: dict[str, tuple[Edge, ...]] = {}
    for group in groups:
        entries = sum(spec_of(base, name).entries for name in group)
        if min(kept := count(entries)) < entries:
            found |= edges(group, models, base, kept)

    def keep(name: str, k: int, change: Tensor, start: int) -> Tensor:
        own = found.get(same[name])
        return own[k](change, start) if own else change

    return keep


def uniform(key: str, start: int, count: int) -> Tensor:
    """Numbers `start` to `start + count` of a random sequence in [0, 1) that belongs to `key`, on the CPU.

    >>> torch.equal(uniform("a", 0, 70_000)[65_530:65_540], uniform("a", 65_530, 10))
    True
    """
    made = []
    for block in range(start // _BLOCK, -(-(start + count) // _BLOCK)):
        seed = int.from_bytes(blake2b(f"{key} {block}".encode(), digest_size=7).digest(), "little")
        made.append(torch.rand(_BLOCK, generator=torch.Generator().manual_seed(seed)))
    first = start % _BLOCK
    return torch.cat(made)[first : first + count] if made else torch.empty(0)
