"""What `choose` found: sources in order, how sure it is, what it cost, and what would settle a draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from headstart.zoo import Skipped

Basis = Literal["closed form", "probe", "fine-tune"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One source in its place.

    Attributes:
        place: 1 is first.
        name: of the source.
        predicted: accuracy that the task's test will show (on endless new data, where there is no test) after training
            on its labels by the best route that was measured. Fine-tuning to the end usually adds to a probe's.
        basis: what the prediction rests on: an exact leave-one-out ridge ("closed form"), cross-validated logistic
            regression ("probe"), or the probe plus what short fine-tunes gained on the same held-out folds.
        scores: each transferability score; a score that this source has no evidence for is absent.
        probe: cross-validated accuracy of a logistic head; None where only the closed form was computed.
        tuned: predicted accuracy after fine-tuning; None where it was not tried.
        close: cannot be told from the first at 95 % (paired over the same examples).
        sure: share of resamples of the labelled examples in which its predicted accuracy is the highest.
    """

    place: int
    name: str
    predicted: Estimate
    basis: Basis
    scores: Mapping[str, Estimate]
    probe: Estimate | None = None
    tuned: Estimate | None = None
    close: bool = False
    sure: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the procedure: who took part, and its cost as a share of fine-tuning every source."""

    name: str
    sources: tuple[str, ...]
    cost: float
    seconds: float
    says: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The answer of `choose`.

    Attributes:
        task: its name.
        seed: of folds, resamples and fine-tunes.
        best: name of the source to start from; None when no source fits the data.
        reason: one sentence: why this one, or why none.
        ranking: all sources that could be measured, best first.
        skipped: those that could not, with the reason.
        agreement: weighted Kendall correlation between every two scores over the sources; empty below three sources.
        stages: what was done.
        budget: the share of the cost of fine-tuning every source that was allowed.
        cost: the share that was counted.
        seconds: wall clock of this call; next to nothing when everything was cached.
        close: the sources that cannot be told from the first.
        decide: what would tell them apart; "" when there is nothing to decide.
    """

    task: str
    seed: int
    best: str | None
    reason: str
    ranking: tuple[Ranked, ...]
    skipped: tuple[Skipped, ...]
    agreement: Mapping[str, Mapping[str, float]]
    stages: tuple[Stage, ...]
    budget: float
    cost: float
    seconds: float
    close: tuple[str, ...] = ()
    decide: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Choice:
        """The choice that `to_json` wrote.

        >>> nothing = Choice(task="t", seed=0, best=None, reason="-", ranking=(), skipped=(), agreement={}, stages=(),
        ...                  budget=0.1, cost=0.0, seconds=0.0)
        >>> Choice.from_json(nothing.to_json()) == nothing
        True
        """
        ranking = tuple(
            Ranked(
                **{
                    **row,
                    "predicted": Estimate(**row["predicted"]),
                    "scores": {name: Estimate(**score) for name, score in row["scores"].items()},
                    "probe": row["probe"] and Estimate(**row["probe"]),
                    "tuned": row["tuned"] and Estimate(**row["tuned"]),
                }
            )
            for row in record["ranking"]
        )
        stages = tuple(Stage(**{**stage, "sources": tuple(stage["sources"])}) for stage in record["stages"])
        skipped = tuple(Skipped(**row) for row in record["skipped"])
        rest = {"ranking": ranking, "stages": stages, "skipped": skipped, "close": tuple(record["close"])}
        return cls(**{**record, **rest})
