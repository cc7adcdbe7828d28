"""One sweep over the examples: decode a chunk, send it through every model that misses it, keep what comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.core.evidence import forward_features
from headstart.core.validate import Refused
from headstart.zoo import Skipped

from .cache import Halted

if TYPE_CHECKING:
    from headstart.tasks import Examples
    from headstart.zoo import Source

    from .cache import Cache, Progress

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PAUSE = 2.0  # seconds of work between two parts on disk; what a kill can cost


class Extraction:
    """A model on its way through the examples; `done` of them are finished."""

    def __init__(self, cache: Cache, key: str, source: Source) -> None:
        self.cache, self.key, self.source = cache, key, source
        self.model = source.load().to(cache.placed())
        self.kept = _finished(cache, key)
        self.done = sum(len(part["features"]) for part in self.kept)
        self.written, self.saved = self.done, time.monotonic()
        self.waiting: list[Any] = []
        self.running = forward_features(self.model, self._batches(), head=source.head)

    def _batches(self) -> Iterator[Any]:
        while True:
            yield self.waiting.pop()

    def weight(self) -> int:
        """Bytes of the model."""
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def take(self, raw: Sequence[Any]) -> None:
        """The next chunk of raw examples."""
        self.waiting.append(self.source.preprocess(raw))
        with nullcontext([0]) if self.kept else counted(self.model) as operations:
            features, logits = next(self.running)
        part = {"features": features.float().cpu(), "logits": logits.float().cpu()}
        if not self.kept:
            one = sum(operations) // len(raw) or 2 * sum(p.numel() for p in self.model.parameters())
            part["operations"] = torch.tensor([one])
        self.kept.append(part)
        self.done += len(raw)

    def save(self) -> None:
        """Put what has come since the last part on disk, as a part named by its rows, when it is time to."""
        from safetensors.torch import save

        if self.done == self.written or time.monotonic() - self.saved < PAUSE:
            return
        rows, tail = 0, []
        for part in reversed(self.kept):
            if self.done - rows <= self.written:
                break
            rows += len(part["features"])
            tail.append(part)
        data = save(_joined(tail[::-1]))
        with suppress(FileNotFoundError):  # another process has just finished this extraction and cleared the folder
            path = self.cache.parts(self.key) / f"{self.written:09d}-{self.done:09d}"
            self.cache.write(path, lambda file: file.write(data))
        self.written, self.saved = self.done, time.monotonic()

    def finish(self) -> None:
        """Put the whole in place."""
        from safetensors.torch import save

        self.cache.publish(self.key, save(_joined(self.kept)))


def sweep(cache: Cache, examples: Examples, missing: Mapping[str, Source], progress: Progress | None) -> list[Skipped]:
    """Extract every missing source; a source that fails is dropped with its reason, the others go on."""
    waiting, skipped = dict(missing), list[Skipped]()
    while waiting:
        running: list[Extraction] = []
        while waiting and sum(job.weight() for job in running) < cache.memory:
            key = next(iter(waiting))
            source = waiting.pop(key)
            try:
                running.append(Extraction(cache, key, source))
            except Exception as error:  # whatever a stranger's checkpoint raises, the other sources go on
                skipped.append(Skipped(name=source.name, why=reason(error)))
        for first in range(0, len(examples), cache.chunk):
            rows = range(first, min(first + cache.chunk, len(examples)))
            behind = [job for job in running if job.done <= first]
            raw = decoded(examples, rows) if behind else []
            for job in behind:
                try:
                    job.take(raw)
                except Exception as error:
                    skipped.append(Skipped(name=job.source.name, why=reason(error)))
                    running.remove(job)
            for job in running:
                job.save()
            if progress and behind:
                progress("features", rows.stop, len(examples))
        for job in running:
            job.finish()
    return skipped


def decoded(examples: Examples, rows: range) -> list[Any]:
    """The raw examples of these rows."""
    raw = []
    for i in rows:
        try:
            raw.append(examples.inputs[i])
        except OSError as error:
            raise Halted(
                f"Example {examples.names[i]!r} must stay readable; got {type(error).__name__}. "
                "Restore it, or load the task again without it."
            ) from error
    return raw


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Collect the floating point operations of the linear and convolution layers that run inside the block.

    A multiply-add counts as two; products inside attention are not counted.

    >>> with counted(nn.Linear(3, 2)) as operations:
    ...     pass
    >>> operations
    []
    """
    operations: list[int] = []

    def note(layer: Any, _inputs: Any, output: Tensor) -> None:
        operations.append(2 * output.numel() * (layer.weight.numel() // max(1, layer.weight.shape[0])))

    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield operations
    finally:
        for handle in handles:
            handle.remove()


def reason(error: Exception) -> str:
    """A refusal's own words, else the kind of error and its first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {first}"


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("features", "logits")}
    return joined | ({"operations": parts[0]["operations"]} if "operations" in parts[0] else {})


def _finished(cache: Cache, key: str) -> list[dict[str, Tensor]]:
    """The parts that follow one another from row 0; of two that start at one row, the longer."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    ends: dict[int, int] = {}
    for path in sorted(cache.parts(key).glob("[0-9]*-[0-9]*")):
        first, last = map(int, path.name.split("-"))
        ends[first] = max(last, ends.get(first, 0))
    parts, done = [], 0
    while done in ends:
        path = cache.parts(key) / f"{done:09d}-{ends[done]:09d}"
        try:
            part = load(path.read_bytes())
        except (SafetensorError, OSError):
            break
        parts.append(part)
        done = ends[done]
    return parts
