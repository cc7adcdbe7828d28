"""Random numbers that belong to one example each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from headstart.core.ascent import Ball


def generators(seed: int, first: int, count: int) -> list[Generator]:
    """One generator for each example; its numbers follow from the seed and the example's number alone.

    Args:
        seed: any integer.
        first: number of the first example in its data set, so that a batch draws what the whole data set would.
        count: of examples.

    >>> import torch
    >>> whole, part = generators(0, 0, 3), generators(0, 2, 1)
    >>> torch.equal(torch.rand(2, generator=whole[2]), torch.rand(2, generator=part[0]))
    True
    """
    # Generators on the CPU read 32 bits; within a seed, no two examples share them.
    return [Generator().manual_seed((0x9E3779B1 * seed + 0x85EBCA77 * (first + k)) % 2**32) for k in range(count)]


def noise(x: Tensor, ball: Ball, draws: Sequence[Generator], *, copies: int, times: float = 1.0) -> Tensor:
    """Random displacements (copies, n, ...), each example's from its own generator.

    linf: every entry uniform within `times` the radius. l2: a random direction, a length uniform up to that.
    """
    found = x.new_empty((len(x), copies, *x.shape[1:]), device="cpu")
    reach = times * ball.radius
    for row, generator in zip(found, draws, strict=True):
        if ball.norm == "linf":
            row.uniform_(-reach, reach, generator=generator)
            continue
        row.normal_(generator=generator)
        lengths = row.new_empty(copies).uniform_(0, reach, generator=generator)
        row.copy_(ball.step(row) * lengths.view(-1, *[1] * (row.ndim - 1)))
    return found.transpose(0, 1).to(x.device)
