"""Weights of a smaller vocabulary, as if they had the rows of a larger one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from headstart.core.validate import require
from headstart.core.weights import Weights


class Padded(Mapping[str, Tensor]):
    """Weights with rows of zeros added at the end of each floating tensor that has fewer rows than `like` has.

    A view: nothing is read before it is asked for.

    Raises:
        Refused: on reading, a tensor whose shape differs otherwise, or that has more rows.
    """

    def __init__(self, weights: Weights, like: Weights) -> None:
        self.weights, self.like = weights, like

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if name not in self.like or not tensor.is_floating_point():
            return tensor
        shape, wanted = tuple(tensor.shape), tuple(self.like[name].shape)
        if shape == wanted:
            return tensor
        fits = len(shape) == len(wanted) > 0 and shape[1:] == wanted[1:] and shape[0] < wanted[0]
        require(fits, f"Tensor {name!r} may lack rows at its end only", f"{shape} for {wanted}",
                "Transfer between models of one architecture and vocabulary.")  # fmt: skip
        return torch.cat([tensor, tensor.new_zeros(wanted[0] - shape[0], *shape[1:])])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
