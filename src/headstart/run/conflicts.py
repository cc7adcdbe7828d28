"""What a merge did to each tensor, counted while it is made: who disagreed, what was dropped, how far models are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.shards import spans
from headstart.core.weights import Entrywise, MergeRule, Surveyed, Weights
from headstart.merge.elect import Thinned

FAR = 0.7
"""Distance, as a share of the weights' length, from which a common ancestor is doubted; unrelated models are at 1.4."""


@dataclass
class Tally:
    """Sums over one tensor; lists have one entry for each model."""

    entries: int = 0
    places: int = 0  # where any model changed anything
    disputed: int = 0  # where models changed in opposite directions
    reference: float = 0.0  # squared length of the base, or the first model
    merged: float = 0.0  # of the merged change
    change: list[float] = field(default_factory=list)  # of each model's change
    given: list[int] = field(default_factory=list)  # entries a model changed
    kept: list[int] = field(default_factory=list)  # of those, what thinning left

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(*(_plus(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__))

    def to_json(self) -> dict[str, Any]:
        """Shares and ratios, as merge.json has them."""
        mean = math.sqrt(sum(self.change) / len(self.change)) if self.change else 0.0
        trimmed = [1 - kept / given if given else 0.0 for kept, given in zip(self.kept, self.given, strict=False)]
        return {
            "entries": self.entries,
            "sign_disagreement": self.disputed / self.places if self.places else 0.0,
            "trimmed": trimmed or None,
            "norm_ratio": math.sqrt(self.merged) / mean if mean else None,
            "distance": [math.sqrt(one / self.reference) if self.reference else None for one in self.change],
        }


def _plus(one: Any, two: Any) -> Any:
    if not isinstance(one, list):
        return one + two
    return [a + b for a, b in zip(one, two, strict=True)] if one and two else one or two


class Watched:
    """A rule that does what another does and counts on the way; changes are from the base, else from the first model.

    Cost: about as much again as the rule itself; reads nothing twice.
    """

    scope: ClassVar[Literal["tensor", "model"]] = "model"

    def __init__(self, rule: MergeRule) -> None:
        self.rule = rule
        self.tallies: dict[str, Tally] = {}
        self.symmetric = rule.symmetric

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """What the rule gives."""
        return self.rule.merge(models, base=base, importance=importance)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> MergeRule | Entrywise:
        """The rule after its own survey, watched."""
        rule: MergeRule | Entrywise = self.rule
        if isinstance(rule, Surveyed):
            rule = rule.survey(models, base=base, importance=importance)
        if isinstance(rule, Thinned):
            rule.thin = self._counting(rule)
        return _Parts(rule, self.tallies) if isinstance(rule, Entrywise) else _Tensors(rule, self.tallies)

    def _counting(self, rule: Thinned) -> Any:
        thin = rule.thin

        def counted(name: str, k: int, change: Tensor, start: int) -> Tensor:
            left = thin(name, k, change, start)
            if (name, start) not in rule.waiting:  # else it was counted when it was put off
                tally = self.tallies.setdefault(name, Tally())
                for counts, values in ((tally.given, change), (tally.kept, left)):
                    counts.extend([0] * (rule.models - len(counts)))
                    counts[k] += int(torch.count_nonzero(values))
            return left

        return counted


class _Seen:
    """Running sums over one part."""

    def __init__(self, tally: Tally, base: Tensor | None) -> None:
        self.tally, self.reference, self.first = tally, base, base is None
        self.sum = self.size = torch.zeros(())
        self.change: list[float] = []

    def rows(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same rows, looked at as they pass."""
        for row in rows:
            if self.reference is None:
                self.reference = row
            change = row - self.reference
            self.change.append(_squared(change))
            sign = change.sign_()
            self.sum, self.size = self.sum + sign, self.size + sign.abs()
            yield row

    def finish(self, merged: Tensor | None) -> None:
        """Add the part to its tensor; without `merged` when the rule has put it off."""
        assert self.reference is not None
        tally = self.tally
        tally.entries += len(self.reference)
        tally.reference += _squared(self.reference)
        tally.places += int(torch.count_nonzero(self.size))
        tally.disputed += int((self.sum.abs() < self.size).sum())
        tally.change = _plus(tally.change, self.change)
        if merged is not None:
            tally.merged += _squared(merged - self.reference)


def _squared(values: Tensor) -> float:
    flat = values.flatten()
    return float(torch.dot(flat, flat))


@dataclass
class _Parts:
    rule: Entrywise
    tallies: dict[str, Tally]
    waiting: set[tuple[str, int]] = field(default_factory=set)

    def combine_part(
        self, name: str, rows: Iterable[Tensor], base: Tensor | None, importance: Iterable[Tensor] | None, start: int
    ) -> Tensor | None:
        """See `Entrywise`."""
        tally = self.tallies.setdefault(name, Tally())
        if (name, start) in self.waiting:
            merged = self.rule.combine_part(name, rows, base, importance, start)
            if merged is not None and base is not None:
                tally.merged += _squared(merged - base)
            return merged
        seen = _Seen(tally, base)
        merged = self.rule.combine_part(name, seen.rows(rows), base, importance, start)
        seen.finish(merged)
        if merged is None:
            self.waiting.add((name, start))
        return merged


@dataclass
class _Tensors:
    rule: MergeRule
    tallies: dict[str, Tally]
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric: bool = False

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """See `MergeRule`."""
        merged = self.rule.merge(models, base=base, importance=importance)
        for name, value in merged.items():
            if value.is_floating_point():
                flat = [model[name].float().flatten() for model in models]
                origin = None if base is None else base[name].float().flatten()
                for start, stop in spans(value.numel()):
                    seen = _Seen(self.tallies.setdefault(name, Tally()), None if origin is None else origin[start:stop])
                    for _ in seen.rows(row[start:stop] for row in flat):
                        pass
                    seen.finish(value.float().flatten()[start:stop])
        return merged


def doubts(total: Tally, names: Sequence[str], has_base: bool) -> list[str]:
    """What the distances say against a merge."""
    found, since = [], "the base" if has_base else names[0]
    for name, squared in zip(names, total.change, strict=True):
        away = math.sqrt(squared / total.reference) if total.reference else 0.0
        if away > FAR:
            found.append(f"{name} is {away:.2f} times the weights' length from {since}: they seem to have no common "
                         "ancestor, and merging unrelated models gives noise.")  # fmt: skip
        elif away == 0 and has_base:
            found.append(f"{name} is the base itself and changes nothing.")
    return found
