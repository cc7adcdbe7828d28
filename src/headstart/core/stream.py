"""Batches of examples: what a plan's stream yields, and how it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .rng import random_state, restore_random_state, seeded
from .validate import require


@dataclass(frozen=True)
class Batch:
    """Examples `x` (a tensor or a mapping of tensors, axis 0 the example), labels `y` (n,), and anything else."""

    x: Any
    y: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Resumable(Protocol):
    """A stream that can start at batch `position` without producing the earlier ones."""

    def start(self, position: int) -> Iterator[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Endless shuffled batches over tensors held in memory; epoch `e` is shuffled by (seed, e) alone.

    The last incomplete batch of an epoch is dropped unless the whole set is smaller than one batch, so every batch
    has min(batch_size, n) examples. Position p of the stream never depends on how it was reached.

    Args:
        x: examples, a tensor (n, ...) or a mapping of such tensors.
        y: labels (n,), or None.
        batch_size: examples a batch.
        seed: of the shuffle.
        augment: applied to each x of a batch, drawing from torch's global generator (which `fit` seeds).

    Raises:
        Refused: no examples, batch_size < 1, or lengths that differ.

    >>> stream = Batches(x=torch.arange(6.0)[:, None], y=torch.arange(6), batch_size=4)
    >>> [len(batch.y) for batch, _ in zip(stream, range(3))]
    [4, 4, 4]
    """

    x: Any
    y: Tensor | None = None
    batch_size: int = 32
    seed: int = 0
    augment: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        n = size(Batch(self.x))
        require(n > 0, "Batches needs at least one example", n, "Pass a non-empty set.")
        require(self.batch_size >= 1, "Batches needs batch_size >= 1", self.batch_size, "Pass a positive number.")
        if self.y is not None:
            require(len(self.y) == n, f"Batches needs one label for each of {n} examples", len(self.y), "Align them.")

    def start(self, position: int) -> Iterator[Batch]:
        n = size(Batch(self.x))
        width = min(self.batch_size, n)
        per_epoch = n // width
        while True:
            epoch, first = divmod(position, per_epoch)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            for k in range(first, per_epoch):
                rows = order[k * width : (k + 1) * width]
                x = each(partial(torch.index_select, dim=0, index=rows), self.x)
                yield Batch(self.augment(x) if self.augment else x, None if self.y is None else self.y[rows])
                position += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)


@dataclass(frozen=True)
class Parts:
    """Several streams in step: yields {part: batch}; each repeats for ever, so their lengths need not agree."""

    streams: Mapping[str, Iterable[Any]]

    def start(self, position: int) -> Iterator[dict[str, Any]]:
        running = {part: position_in(stream, position) for part, stream in self.streams.items()}
        while True:
            yield {part: next(stream) for part, stream in running.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.start(0)


def position_in(stream: Iterable[Any], position: int) -> Iterator[Any]:
    """The stream repeated for ever, from batch `position` on. A stream that is not `Resumable` is replayed."""
    if isinstance(stream, Resumable):
        yield from stream.start(position)
    seen = 0
    while True:
        before = seen
        for batch in stream:
            seen += 1
            if seen > position:
                yield batch
        require(
            seen > before,
            "A stream must give batches each time it is iterated",
            f"nothing after {before} batches",
            "Pass a list, a DataLoader or Batches(...), not a generator that runs dry.",
        )


def drawn(stream: Iterable[Any], first: int, seed: int) -> Iterator[Any]:
    """The stream from batch `first` on; a stream that cannot start there is replayed with random numbers of its own."""
    batches = position_in(stream, first)
    if isinstance(stream, Resumable):
        yield from batches
    with seeded(seed):
        own = random_state()
    while True:
        ours = random_state()
        restore_random_state(own)
        batch = next(batches)
        own = random_state()
        restore_random_state(ours)
        yield batch


def each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor of a batch, a mapping, a sequence or a tensor; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Batch):
        return replace(value, x=each(function, value.x), y=each(function, value.y), extra=each(function, value.extra))
    if isinstance(value, Mapping):
        return {key: each(function, item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return type(value)([each(function, item) for item in value])  # type: ignore[call-arg]
    return value


def as_batch(batch: Any) -> Any:
    """Pairs (x, y) and bare tensors become `Batch`; batches and mappings of parts stay what they are."""
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        return {part: as_batch(value) for part, value in batch.items()}
    return Batch(*batch) if isinstance(batch, tuple | list) else Batch(batch)


def size(batch: Batch) -> int:
    """Number of examples of a batch."""
    x = batch.x
    while not isinstance(x, Tensor):
        x = next(iter(x.values() if isinstance(x, Mapping) else x))
    return len(x)


def share(batch: Any, index: int, of: int) -> Any:
    """Slice number `index` of `of` equal slices of every part, so that the mean over slices is the mean over the batch.

    Raises:
        Refused: a part's examples cannot be shared equally.
    """
    if of == 1:
        return batch
    for part in batch.values() if isinstance(batch, dict) else [batch]:
        n = size(part)
        require(n % of == 0, f"A batch must divide by {of} (processes x accumulate)", n, "Change batch_size.")
    return each(lambda t: t[index * (len(t) // of) : (index + 1) * (len(t) // of)], batch)
