"""What of a fine-tuning's change arrived in another version of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.core.weights import Weights, aligned

from .finetuning_transfer import DiffTransfer


@dataclass(frozen=True)
class Moved:
    """How one transfer went, in one tensor or in the whole model.

    Attributes:
        change: norm of what fine-tuning changed.
        apart: norm of the difference between the two bases.
        arrived: share of the changed entries that differ from the target's after rounding; 1 where nothing changed.
    """

    change: float
    apart: float
    arrived: float

    @property
    def ratio(self) -> float:
        """change / apart; infinite between equal bases."""
        return self.change / self.apart if self.apart else math.inf


def transfer_report(finetuned: Weights, old: Weights, new: Weights, *, scale: float = 1.0) -> dict[str, Moved]:
    """How large the carried change is and what of it survives rounding: of each floating tensor, and of all under "".

    A change below half a unit in the last place of a bfloat16 weight (0.2 to 0.4 % of it) is lost in the sum.

    Args:
        finetuned: the old version, fine-tuned.
        old, new: the two versions before fine-tuning.
        scale: as of `DiffTransfer`.

    Cost: one pass over three models; memory of one tensor of each.

    Notes: tied weights count once in the whole. Between versions whose `ratio` is small in most layers, the change is a
    detail against what separates the bases; `connectivity` says whether that matters.

    Raises:
        Refused: differing names or shapes, NaN.

    >>> import torch
    >>> old, tuned, new = ({"w": torch.tensor(w)} for w in ([1.0, 2.0], [1.5, 2.0], [1.0, 6.0]))
    >>> transfer_report(tuned, old, new)["w"]
    Moved(change=0.5, apart=4.0, arrived=1.0)
    """
    rule = DiffTransfer(scale=scale)
    found: dict[str, Sequence[float]] = {}
    for name in aligned([finetuned, old], new):
        tuned, before, other = (weights[name] for weights in (finetuned, old, new))
        if tuned.is_floating_point():
            result = rule.merge([{name: tuned}, {name: before}], base={name: other})[name]
            before, other = (tensor.to(tuned.device).double() for tensor in (before, other))
            change = tuned.double() - before
            arrived = (result != other)[change != 0]
            found[name] = (
                float(change.square().sum()), float((other - before).square().sum()), int(arrived.sum()), len(arrived)
            )  # fmt: skip
    once = {(*sums, finetuned[name].shape): sums for name, sums in found.items()}  # tied weights have the same sums
    found[""] = [math.fsum(column) for column in zip((0, 0, 0, 0), *once.values(), strict=True)]
    return {
        name: Moved(math.sqrt(change), math.sqrt(apart), kept / of if of else 1.0)
        for name, (change, apart, kept, of) in found.items()
    }
