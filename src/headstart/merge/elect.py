"""The changes of several models into one: thin each, elect a sign for each place, combine what agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.validate import one_of, require
from headstart.core.weights import Weights

_LEAST = torch.finfo(torch.float32).tiny  # divides a total that is 0

Thin = Callable[[str, int, Tensor, int], Tensor]
"""(tensor, model, change (n,), place of its first entry) -> the change with some entries 0, the rest perhaps scaled."""


@dataclass(frozen=True, kw_only=True)
class Election:
    """How changes are weighed and combined.

    Args:
        elect: what decides the sign of each place: the larger "total" change, the larger "count" of models, or None
            when nothing does and all changes are combined.
        combine: "mean", "sum" or "max" of the changes that agree (without election: mean or sum of all).
        weights: how much each model counts; None counts all alike.
        weigh: "before" the election, so that weights vote too and a mean divides by the weights that agree; "after" it,
            when a mean divides by how many agree.
        scale: what the combined change is multiplied by.
    """

    elect: Literal["total", "count"] | None = "total"
    combine: Literal["mean", "sum", "max"] = "mean"
    weights: tuple[float, ...] | None = None
    weigh: Literal["before", "after"] = "before"
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale), "A merge needs a finite scale", self.scale, "Pass a number such as 1.0.")
        one_of("combine", self.combine, ["mean", "sum", "max"] if self.elect else ["mean", "sum"])
        one_of("weigh", self.weigh, ["before", "after"])
        require(self.elect in ("total", "count", None), "elect must be 'total', 'count' or None", repr(self.elect),
                "Pass elect='total'.")  # fmt: skip
        good = self.weights is None or (all(map(math.isfinite, self.weights)) and any(self.weights))
        require(good, "A merge needs finite weights, not all 0", self.weights, "Pass one number for each model.")

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return len(set(self.weights or ())) <= 1

    def of_each(self, models: int) -> tuple[float, ...]:
        """One weight for each model."""
        given = self.weights or (1.0,) * models
        require(len(given) == models, f"A merge needs one weight for each of {models} models", len(given),
                "Pass as many weights as models.")  # fmt: skip
        return given

    def change(
        self, changes: Iterable[Tensor], models: int, decide: Callable[[Tensor, bool], float | None]
    ) -> Tensor | None:
        """The combined change (n,) in float64, from the thinned changes (n,) of the models, each looked at once.

        Args:
            changes: of each model in turn.
            models: how many there are.
            decide: (sign of each place, whether votes cancel somewhere) -> the sign of places where they do, or None
                when that cannot be said yet; then the answer is None too.
        """
        if self.elect is None:
            weights, every = self.of_each(models), torch.zeros(())
            for weight, change in zip(weights, changes, strict=True):
                every = every + weight * change.double()
            return self.scale * (every / _divisor(sum(weights)) if self.combine == "mean" else every)
        votes, total, count = self.ballot(changes, models)
        sign = votes.sum.sign()
        winner = decide(sign, bool((sign == 0).logical_and_(votes.size > 0).any()))
        if winner is None:
            return None
        if winner:
            sign = torch.where(sign == 0, winner, sign)
        agreed = sign.abs() * total.of(sign)
        if self.combine == "mean":
            agreed /= count.of(sign).abs_().clamp_min_(_LEAST)
        return self.scale * agreed

    def ballot(self, changes: Iterable[Tensor], models: int) -> tuple[Balance, Balance | Extremes, Balance]:
        """What decides the sign, what is combined, and how many (or much weight) said anything."""
        total: Balance | Extremes = Extremes() if self.combine == "max" else Balance()
        count = Balance()
        alike = self.weigh == "before" or self.weights is None  # then the votes are the total
        whole = torch.float32 if self.weights is None else torch.float64  # counts without weights are small integers
        votes = count if self.elect == "count" else total if alike and isinstance(total, Balance) else Balance()
        for weight, change in zip(self.of_each(models), changes, strict=True):
            voted = change if self.weigh == "after" or weight == 1 else weight * change
            if votes is count or self.combine == "mean":
                count.add(voted.sign(), abs(weight) if self.weigh == "before" else 1.0, whole)
            if votes is not count:
                votes.add(voted, 1.0)
            if total is not votes:
                total.add(voted, 1.0 if self.weigh == "before" else weight)
        return votes, total, count


class Balance:
    """A sum and the sum of magnitudes; together they say what lies on either side of zero.

    In float64, so that the order of the models cannot flip an election.
    """

    def __init__(self) -> None:
        self.sum = self.size = self.space = torch.zeros(())

    def add(self, values: Tensor, weight: float, dtype: torch.dtype = torch.float64) -> None:
        """One more model's values (n,)."""
        if self.sum.ndim == 0:
            self.sum, self.size = torch.zeros_like(values, dtype=dtype), torch.zeros_like(values, dtype=dtype)
            self.space = torch.empty_like(values, dtype=dtype)
        self.sum.add_(self.space.copy_(values), alpha=weight)
        self.size.add_(self.space.abs_(), alpha=weight)

    def of(self, sign: Tensor) -> Tensor:
        """The sum of the values that have this sign, place by place."""
        return (sign * self.size + self.sum) / 2


class Extremes:
    """The largest and the smallest value of each place, 0 included."""

    def __init__(self) -> None:
        self.most = self.least = torch.zeros(())

    def add(self, values: Tensor, weight: float) -> None:
        """One more model's values (n,)."""
        self.most, self.least = torch.maximum(self.most, weight * values), torch.minimum(self.least, weight * values)

    def of(self, sign: Tensor) -> Tensor:
        """The extreme on the side of the sign."""
        return torch.where(sign > 0, self.most, torch.where(sign < 0, self.least, 0.0))


def _divisor(total: float) -> float:
    require(abs(total) > 1e-8, "A mean needs weights whose sum is not 0", total, "Use combine='sum'.")
    return total


class Thinned:
    """An `Entrywise` rule: the base plus the elected change of the models, each thinned first.

    Places where the votes cancel take the sign that won most places of their group of tensors. The votes are counted
    on the way, so parts with such places are put off until everything else has been seen.

    Args:
        election: how the thinned changes are combined.
        thin: of each model.
        models: how many are merged.
        groups: tensors that vote together.
        same: tensor -> the one it is a copy of, which votes for both (`distinct`).
    """

    scope: ClassVar[Literal["tensor", "model"]] = "tensor"

    def __init__(
        self,
        election: Election,
        thin: Thin,
        models: int,
        groups: Sequence[Sequence[str]] = (),
        same: Mapping[str, str] | None = None,
    ) -> None:
        election.of_each(models)
        self.election, self.thin, self.models, self.same = election, thin, models, same or {}
        self.group = {name: k for k, group in enumerate(groups) for name in group}
        self.votes = [0] * len(groups)
        self.waiting: set[tuple[str, int]] = set()

    def combine_part(
        self, name: str, rows: Iterable[Tensor], base: Tensor | None, importance: Iterable[Tensor] | None, start: int
    ) -> Tensor | None:
        """See `Entrywise`."""
        assert base is not None
        first = self.same.get(name, name)
        group = self.group.get(first)

        def decide(sign: Tensor, undecided: bool) -> float | None:
            if group is None:  # an empty tensor
                return 0.0
            if (name, start) not in self.waiting:
                if first == name:
                    self.votes[group] += int(sign.sum())
                if undecided:
                    self.waiting.add((name, start))
                return None if undecided else 0.0
            return float(self.votes[group] > 0) - float(self.votes[group] < 0)

        change = self.election.change((self.thin(name, k, row - base, start) for k, row in enumerate(rows)),
                                      self.models, decide)  # fmt: skip
        return None if change is None else base + change


def needs_base(rule: str, base: Weights | None, importance: Sequence[Weights] | None) -> Weights:
    """The base, or a refusal."""
    require(base is not None, f"{rule} needs base=: it merges differences from a common ancestor", None,
            "Pass the pretrained weights.")  # fmt: skip
    require(importance is None, f"{rule} weighs whole models", "importance=", "Leave it out.")
    assert base is not None
    return base
