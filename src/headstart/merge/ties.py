"""Merge fine-tuned models whose changes interfere: trim, elect signs, average what agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, aligned, by_tensor

from .sparsify import Cut, deltas, distinct, largest

PAPER = Paper(
    title="TIES-Merging: Resolving Interference When Merging Models",
    authors="Yadav et al.",
    year=2023,
    arxiv="2306.01708",
    code="https://github.com/prateeky2806/ties-merging",
    departs="Keeps exactly int(density * d) entries where the official code keeps one more, and all that tie with it.",
)


@dataclass(frozen=True, kw_only=True)
class Ties:
    """One model that does the tasks of several fine-tuned from the same start, without any data.

    Small changes are dropped, each position takes the sign with the larger total change, and only the changes of that
    sign are combined and added to the start.

    Args:
        density: share of its largest changes that each model keeps, in (0, 1]; the paper's k is 20 % (0.2).
        scale: what the merged change is multiplied by (lambda), finite; the paper's is 1 where there is no data to
            choose it on, else 0.8 to 2.5. With combine="sum" it is nearer to 1 / models.
        trim: "model" ranks the changes of the whole model together, as the paper does, and may empty whole layers;
            "tensor" keeps the same share of every tensor, as peft and mergekit do.
        combine: "mean" (the paper's), "sum" or "max" of the changes that agree.

    Shape: state dicts of one architecture; integer tensors are copied from `base`.

    Use it when: several models were fine-tuned from one start for different tasks.
    Not when: there is data of all tasks to train on together, or the models have no common start.

    Cost: reads every weight six times (shapes, copies, two counts, votes, merge); memory of one tensor from each model
        when streamed.

    Notes: where the changes cancel exactly, the sign is the one that won most positions (of the model, or of the
    tensor). Magnitudes are compared as float32; equal ones at the edge are kept in the order of names until the count
    is exact. A tied weight is counted once. Recompute running statistics after merging.

    Raises:
        Refused: no base, a density that keeps nothing, differing names or shapes, NaN.

    Reference: Yadav et al. 2023, algorithm 1.

    >>> base = {"w": torch.zeros(5)}
    >>> changes = [5, -1, 0.1, 3, 0], [-2, -4, 0.2, 3, 0.5], [1, 6, -0.3, -1.5, -0.4]
    >>> Ties(density=0.4).merge([{"w": torch.tensor(change)} for change in changes], base=base)
    {'w': tensor([5., 6., 0., 3., 0.])}
    """

    density: float = 0.2
    scale: float = 1.0
    trim: Literal["model", "tensor"] = "model"
    combine: Literal["mean", "sum", "max"] = "mean"
    scope: ClassVar[Literal["tensor", "model"]] = "model"
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "Ties needs 0 < density <= 1", self.density, "Pass a fraction such as 0.2.")
        require(math.isfinite(self.scale), "Ties needs a finite scale", self.scale, "Pass a number such as 1.0.")
        one_of("trim", self.trim, ["model", "tensor"])
        one_of("combine", self.combine, ["mean", "sum", "max"])

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return self.survey(models, base=base).merge(models, base=base, importance=importance)

    def survey(self, models: Sequence[Weights], *, base: Weights | None = None) -> Elected:
        """Three passes over the models: what each of them keeps, and the sign for positions without a winner."""
        require(base is not None, "Ties needs base=: it merges differences from a common ancestor", None,
                "Pass the pretrained weights.")  # fmt: skip
        assert base is not None
        same = distinct(aligned(models, base), models, base)
        counted = [name for name in dict.fromkeys(same.values()) if base[name].numel()]
        elected: dict[str, tuple[Cut, float]] = {}
        for group in [counted] if self.trim == "model" else [[name] for name in counted]:
            entries = sum(base[name].numel() for name in group)
            kept = int(self.density * entries)
            require(kept > 0, f"Ties needs a density that keeps one of {entries} entries", self.density,
                    f"Raise it, or rank the whole model (trim='model'). Found in {group[:3]}.")  # fmt: skip
            cut = largest(partial(_each, group, models, base), kept)
            cuts, left, votes = [], cut.ties, 0.0
            for changed in _each(group, models, base):
                cuts.append(Cut(cut.edge, torch.minimum(left, cut.tied_in(changed))))
                left = left - cuts[-1].ties
                votes += float(_sign(cuts[-1](changed)).sum())
            majority = float(votes > 0) - float(votes < 0)
            elected |= {name: (own, majority) for name, own in zip(group, cuts, strict=True)}
        return Elected(self, {name: elected[first] for name, first in same.items() if first in elected})


@dataclass(frozen=True)
class Elected:
    """`Ties` after its survey: every tensor can be merged alone."""

    rule: Ties
    elected: Mapping[str, tuple[Cut, float]]  # of each tensor with entries: what is kept, the sign of undecided places
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric: ClassVar[bool] = True

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights of the tensors given."""
        require(importance is None, "Ties weighs all models alike", "importance=", "Leave it out.")
        return by_tensor(self._tensor, models, base)

    def _tensor(self, name: str, stacked: Tensor, base: Tensor | None, _importance: Tensor | None) -> Tensor:
        assert base is not None
        if not base.numel():
            return base
        cut, majority = self.elected[name]
        trimmed = cut(stacked - base)
        sign = _sign(trimmed)
        sign = torch.where(sign == 0, majority, sign)
        agreeing = trimmed * (trimmed.sign() == sign)  # zeros add nothing, whatever the sign
        if self.rule.combine == "max":
            change = agreeing.abs().amax(0) * sign
        else:
            change = agreeing.sum(0, dtype=torch.float64)
            if self.rule.combine == "mean":
                change = change / (agreeing != 0).sum(0).clamp(min=1)
        return base + self.rule.scale * change


def _each(names: Sequence[str], models: Sequence[Weights], base: Weights) -> Iterator[Tensor]:
    return (deltas(name, models, base) for name in names)


def _sign(trimmed: Tensor) -> Tensor:
    """The sign with the larger total magnitude at each place; in float64, so the order of models cannot flip it."""
    return trimmed.sum(0, dtype=torch.float64).sign()
