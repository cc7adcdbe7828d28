"""Target and source text in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from headstart.core.stream import Batch, Batches
from headstart.core.validate import require


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Batches of target and source text side by side, so that the source language is not forgotten.

    Args:
        target: batches (x, y) of target text.
        source: of source text, windows of the same width.
        ratio: share of each batch that is source text, in [0, 1], rounded to whole examples; 0 is `target` itself.

    Notes: a batch holds 1 - ratio times as much target text: take more steps to see as much of it.

    Cost: none beside that of the batches.

    Raises:
        Refused: a ratio outside [0, 1], or with less than one example of either.

    >>> target, source = (Batches(x=torch.full((9, 2), k), y=torch.full((9, 2), k), batch_size=4) for k in (0, 1))
    >>> next(iter(Mixed(target=target, source=source, ratio=0.25))).x[:, 0].tolist()
    [0, 0, 0, 1]
    """

    target: Batches
    source: Batches
    ratio: float = 0.5

    def __post_init__(self) -> None:
        require(self.target.y is not None and self.source.y is not None, "Mixed needs the tokens that follow", None,
                "Make both from windows(...).")  # fmt: skip
        require(0 <= self.ratio <= 1, "Mixed needs 0 <= ratio <= 1", self.ratio, "Pass a fraction such as 0.5.")
        require(all(self.shares) or self.ratio in (0, 1), "Each batch needs both languages",
                f"{self.ratio} of {self.target.batch_size}", "Raise batch_size, or pass ratio 0 or 1.")  # fmt: skip

    @property
    def shares(self) -> tuple[int, int]:
        """Examples of target and of source text in a batch."""
        source = round(self.ratio * self.target.batch_size)
        return self.target.batch_size - source, source

    def start(self, position: int) -> Iterator[Batch]:
        both = zip((self.target, self.source), self.shares, strict=True)
        parts = [replace(stream, batch_size=share).start(position) for stream, share in both if share]
        while True:
            drawn = [next(part) for part in parts]
            if len(drawn) == 1:
                yield drawn[0]
            else:
                yield Batch(torch.cat([b.x for b in drawn]), torch.cat([b.y for b in drawn if b.y is not None]))

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)
