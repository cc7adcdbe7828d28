"""Merge rules by the names of the command line, and from a mergekit file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.core.validate import require
from headstart.core.weights import MergeRule
from headstart.merge import (
    Average,
    Breadcrumbs,
    Dare,
    Della,
    DiffTransfer,
    FisherMerging,
    RegMean,
    Slerp,
    TaskArithmetic,
    Ties,
)
from headstart.merge.mergekit import MergeSettings

RULES: Mapping[str, type[Any]] = {
    "average": Average, "slerp": Slerp, "task-arithmetic": TaskArithmetic, "ties": Ties, "dare": Dare,
    "breadcrumbs": Breadcrumbs, "della": Della, "fisher": FisherMerging, "regmean": RegMean, "diff": DiffTransfer,
}  # fmt: skip
BASED = frozenset({"task-arithmetic", "ties", "dare", "breadcrumbs", "della", "diff"})
"""Rules that cannot do without a base."""
MEASURED = frozenset({"fisher", "regmean"})
"""Rules that need data of each model."""


def rule_of(settings: MergeSettings, *, seed: int = 0) -> MergeRule:
    """The rule that a mergekit file asks for, with mergekit's meaning: trimmed by tensor, weighed before the election.

    Args:
        settings: see `parse_mergekit`.
        seed: of dare's and della's lots, which no file can give.

    Raises:
        Refused: densities (gammas, epsilons) that differ between models where the rule has one; a rescaling that only
            dare and della have; a linear merge that is not normalised and whose weights do not sum to 1.
    """
    method, models = settings.method, settings.models
    weights = tuple(one.weight for one in models)
    elect = None if method in ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear") else "total"
    common: dict[str, Any] = {"scale": settings.scale, "weights": weights}
    if method == "linear":
        whole = settings.normalize or abs(sum(weights) - 1) < 1e-6
        require(whole, "A linear merge that is not normalised needs weights that sum to 1", sum(weights),
                "Set normalize: true.")  # fmt: skip
        return Average(weights=weights)
    if method == "slerp":
        assert settings.t is not None
        return Slerp(towards=settings.t)
    rescaled = method.startswith(("dare", "della"))
    require(rescaled or not settings.rescale, "Only dare and della enlarge what they keep", f"rescale with {method}",
            "Remove rescale.")  # fmt: skip
    if method == "ties":
        density = tuple(one.density for one in models)
        return Ties(density=density, trim="tensor", combine="mean" if settings.normalize else "sum", **common)
    common |= {"normalise": settings.normalize}
    if method == "task_arithmetic":
        return TaskArithmetic(**common)
    common |= {"elect": elect, "density": _one(settings, "density")}
    if method.startswith("breadcrumbs"):
        outliers = min(_one(settings, "gamma"), 1 - common["density"])  # as mergekit: what is kept goes first
        return Breadcrumbs(outliers=outliers, **common)
    common |= {"rescale": settings.rescale, "seed": seed}
    return Della(spread=_one(settings, "epsilon"), **common) if method.startswith("della") else Dare(**common)


def _one(settings: MergeSettings, name: str) -> float:
    values = [float(getattr(one, name)) for one in settings.models]
    require(len(set(values)) == 1, f"{settings.method} needs one {name} for all models", values,
            f"Write {name} once, under the common parameters.")  # fmt: skip
    return values[0]
