"""What a small labelled set looks like, as one vector: with the order of its classes, or without."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.core.validate import require


class Prototypes(nn.Module):
    """The mean of each class, one after another: the order of the classes stays, that of examples does not.

    Shape: (n, classes, examples, d) -> (n, classes * d).
    """

    def forward(self, sets: Tensor) -> Tensor:
        return sets.mean(2).flatten(1)


class SetPool(nn.Module):
    """One vector of a set whatever the order of its elements: induced attention, then pooling by attention.

    Args:
        inputs: width of an element.
        outputs: width of the vector.
        hidden: of the attention; a multiple of `heads`.
        heads: of the attention.
        points: learned points through which the elements see each other.

    Shape: (n, m, inputs) -> (n, outputs).

    Cost: O(n m points hidden).

    Reference: Lee et al. 2019, Set Transformer.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: int = 128, heads: int = 2, points: int = 32) -> None:
        require(hidden % heads == 0, "SetPool needs hidden to divide by heads", (hidden, heads), "Use 128 and 2.")
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, points, hidden) * hidden**-0.5)
        self.seed = nn.Parameter(torch.randn(1, 1, hidden) * hidden**-0.5)
        self.lift = nn.Linear(inputs, hidden)
        self.gather, self.spread, self.pool = (_Attend(hidden, heads) for _ in range(3))
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        n = len(x)
        x = self.spread(x, self.gather(self.points.expand(n, -1, -1), x))
        pooled: Tensor = self.out(self.pool(self.seed.expand(n, -1, -1), x)[:, 0])
        return pooled


class SetEncoder(nn.Module):
    """One vector of a labelled set that depends neither on the order of examples nor on that of classes.

    Args:
        inputs: width d of an example.
        outputs: width of the vector.
        width: of the vector that stands for a class.
        hidden, heads, points: as in `SetPool`.

    Shape: (n, classes, examples, d) -> (n, outputs).

    Not when: what is made from the vector has a place for each class, as a classifier's head: use `Prototypes`.

    Reference: Soro et al. 2025, section 3.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int = 512, hidden: int = 128, heads: int = 2, points: int = 32
    ) -> None:
        super().__init__()
        self.within = SetPool(inputs, width, hidden=hidden, heads=heads, points=points)
        self.between = SetPool(width, width, hidden=hidden, heads=heads, points=points)
        self.project = nn.Linear(width, outputs)

    def forward(self, sets: Tensor) -> Tensor:
        classes = self.within(sets.flatten(0, 1)).unflatten(0, sets.shape[:2])
        out: Tensor = self.project(self.between(classes))
        return out


class _Attend(nn.Module):
    """Attention of queries over a set, and a small network, each added to what was there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        x = self.first(queries + self.attention(queries, x, x, need_weights=False)[0])
        out: Tensor = self.second(x + self.mix(x))
        return out
