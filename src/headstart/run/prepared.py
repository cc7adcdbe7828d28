"""Raw examples as the batches one source's model takes: kept ready when they are small, made when asked for if not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.stream import Batch, each
from headstart.core.validate import require

if TYPE_CHECKING:
    from headstart.zoo import Preprocess

READY = 2**28  # bytes of prepared examples to keep in memory


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Examples in the form a model takes; `rows` gives a batch of any of them.

    Args:
        inputs: raw examples.
        preprocess: the source's.
        ready: all of them prepared, or None when that would be too large.
    """

    inputs: Sequence[Any]
    preprocess: Preprocess
    ready: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, rows: Sequence[int] | Tensor) -> Any:
        """The batch of these rows."""
        index = torch.as_tensor(rows)
        if self.ready is not None:
            return each(lambda t: t[index], self.ready)
        return self.preprocess([self.inputs[int(i)] for i in index])

    def batches(self, size: int = 128) -> Iterator[Any]:
        """All of them in order."""
        for first in range(0, len(self), size):
            yield self.rows(range(first, min(first + size, len(self))))


def prepare(inputs: Sequence[Any], preprocess: Preprocess, *, ready: int = READY) -> Prepared:
    """Prepare examples once if all of them fit into `ready` bytes."""
    lazy = Prepared(inputs=inputs, preprocess=preprocess)
    if not len(inputs):
        return lazy
    size = 0

    def add(t: Tensor) -> Tensor:
        nonlocal size
        size += t.nbytes
        return t

    each(add, lazy.rows([0]))
    if size * len(inputs) > ready:
        return lazy
    made = list(lazy.batches())
    whole = torch.cat(made) if isinstance(made[0], Tensor) else {k: torch.cat([m[k] for m in made]) for k in made[0]}
    return replace(lazy, ready=whole)


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Endless shuffled labelled batches; position p depends on the seed alone, so that a killed run can go on.

    Args:
        examples: what to draw from.
        chosen: rows of `examples` to use.
        labels: (len(examples),) the labels.
        batch_size: examples a batch; fewer when fewer are chosen.
        seed: of the order.
        augment: changes the prepared batch, drawing from torch's generator.
    """

    examples: Prepared
    chosen: Tensor
    labels: Tensor
    batch_size: int
    seed: int
    augment: Callable[[Any], Any] | None = None

    def start(self, position: int) -> Iterator[Batch]:
        n, width = len(self.chosen), min(self.batch_size, len(self.chosen))
        require(n > 0, "Training needs at least one labelled example", n, "Label some.")
        while True:
            epoch, first = divmod(position, n // width)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            for k in range(first, n // width):
                rows = self.chosen[order[k * width : (k + 1) * width]]
                x = self.examples.rows(rows)
                yield Batch(self.augment(x) if self.augment else x, self.labels[rows])
                position += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.start(0)


def jitter(x: Tensor, *, degrees: float = 10.0, shift: float = 0.1, scale: float = 0.12) -> Tensor:
    """Pictures (n, c, H, W) turned, shifted (share of the side) and scaled a little, each by its own amount.

    Kept small on purpose: no mirror images and no colours, which can change what a picture means.
    """
    n = len(x)
    angle, grow = _between(n, degrees * math.pi / 180), 1 + _between(n, scale)
    cos, sin = torch.cos(angle) * grow, torch.sin(angle) * grow
    top = torch.stack([cos, -sin, _between(n, 2 * shift)], 1)
    bottom = torch.stack([sin, cos, _between(n, 2 * shift)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _between(n: int, limit: float) -> Tensor:
    return (torch.rand(n) * 2 - 1) * limit


@torch.no_grad()
def logits_of(model: nn.Module, examples: Prepared, rows: Tensor | None = None) -> Tensor:
    """The model's logits (n, c) on the CPU, in eval mode, without gradient."""
    device = next(model.parameters()).device
    wanted = torch.arange(len(examples)) if rows is None else rows
    model.eval()
    return torch.cat(
        [model(each(lambda t: t.to(device), examples.rows(part))).cpu() for part in torch.split(wanted, 128)]
    )
