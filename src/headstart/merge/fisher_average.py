"""Averages of models with a weight for each entry, and how large those weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.shards import reader, spans, spec_of
from headstart.core.validate import finite, require
from headstart.core.weights import Weights, by_tensor

from .sparsify import distinct


@dataclass(frozen=True)
class Measured:
    """Merges tensor by tensor with Fishers whose sizes are known: Σ c_i F_i θ_i / Σ c_i F_i.

    Args:
        weights: λ_i, None for all alike.
        target_stays: where no Fisher is left, the first model's value stays, unless its λ is 0.
        fishers: of each model.
        source: name of a tensor -> the name its Fisher has; tensors without one are averaged with weights λ_i.
        norms: what λ_i is divided by to give c_i.
        floors: the least Fisher of each model.
    """

    weights: tuple[float, ...] | None
    target_stays: bool
    fishers: Sequence[Weights]
    source: Mapping[str, str]
    norms: Sequence[float]
    floors: Sequence[float]
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return not self.target_stays and len(set(self.weights or ())) <= 1

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged tensors of these models, whose Fishers are known by name."""
        given = self.weights or (1.0,) * len(models)
        require(len(given) == len(models), f"FisherMerging needs one weight for each of {len(models)} models",
                len(given), "Pass as many weights as models.")  # fmt: skip
        share = torch.tensor(given, dtype=torch.float64)
        scaled = share / torch.tensor(self.norms, dtype=torch.float64)

        def combine(name: str, stacked: Tensor, _base: Tensor | None, _importance: Tensor | None) -> Tensor:
            wide = stacked.double()
            if name not in self.source:
                return _mean(share.to(wide.device), wide)
            fishers = [one[self.source[name]].to(wide) for one in self.fishers]
            floored = torch.stack([f.clamp_min(floor) for f, floor in zip(fishers, self.floors, strict=True)])
            weight = torch.einsum("k,k...->k...", scaled.to(wide.device), floored)
            total = weight.sum(0)
            rest = wide[0] if self.target_stays and given[0] > 0 else _mean(scaled.to(wide.device), wide)
            return torch.where(total > 0, (weight * wide).sum(0) / total.where(total > 0, 1.0), rest)

        return by_tensor(combine, models, base)


def _mean(weights: Tensor, stacked: Tensor) -> Tensor:
    return torch.einsum("k,k...->...", weights, stacked) / weights.sum()


def sources(models: Sequence[Weights], importance: Sequence[Weights], names: Sequence[str]) -> dict[str, str]:
    """Floating tensor -> the name its importance has: its own, or that of a tensor it is tied to.

    Raises:
        Refused: importance that names none of the tensors, or of one model that lacks what another's has.
    """
    floating = [name for name in names if spec_of(models[0], name).dtype.is_floating_point]
    named = [name for name in floating if any(name in one for one in importance)]
    require(bool(named), "The importance must name tensors of the models", sorted(importance[0])[:3],
            "Use the names of the state dict.")  # fmt: skip
    for k, one in enumerate(importance):
        lacking = sorted(set(named) - set(one))
        require(not lacking, f"The importance of model {k} must have all that another has", f"none of {lacking[:3]}",
                "Measure the same weights in all models.")  # fmt: skip
    same = distinct(floating, models, models[0])
    first: dict[str, str] = {}
    for name in named:
        first.setdefault(same[name], name)
    return {name: first[same[name]] for name in floating if same[name] in first}


def size_of(
    shapes: Mapping[str, tuple[int, ...]], fisher: Weights, k: int, least: float, relative: bool
) -> tuple[float, float, float]:
    """The norm of the Fisher of model k, its floor in its own units, and the share of its entries below that."""
    total, entries = 0.0, sum(math.prod(shape) for shape in shapes.values())
    for name, shape in shapes.items():
        own = spec_of(fisher, name).shape
        require(own == shape, f"The Fisher of {name!r} must have its shape {shape}", own, "Measure it on this model.")
        for part in (reader(fisher, name)(*span) for span in spans(math.prod(shape))):
            finite(f"the Fisher of {name!r}", part, "Measure it again.")
            require(not bool((part < 0).any()), f"A Fisher must be >= 0; that of {name!r} in model {k}",
                    float(part.min()) if part.numel() else 0, "Pass squared gradients.")  # fmt: skip
            total += float(part.double().square().sum())
    floor = least * (math.sqrt(total / max(entries, 1)) if relative else 1.0)
    below = sum(int((reader(fisher, name)(*span) < floor).sum()) for name, shape in shapes.items()
                for span in spans(math.prod(shape))) if floor else 0  # fmt: skip
    return math.sqrt(total), floor, below / max(entries, 1)
