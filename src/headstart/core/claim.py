"""A paper's statement at small scale, checked."""

from __future__ import annotations

import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from .checkpoint import write_atomically
from .validate import require, suggestion


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One falsifiable statement: arm `better` has a higher `metric` than arm `than`, by at least `by`, over `seeds`.

    Higher is better for every metric; a loss enters negated.
    """

    says: str
    metric: str
    better: str
    than: str
    by: float = 0.0
    seeds: int = 5

    def __post_init__(self) -> None:
        require(self.seeds >= 2, "A claim needs seeds >= 2 for a paired interval", self.seeds, "Raise it.")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happened: the paired differences over seeds, their mean and 95 % t-interval, and whether the claim held.

    `held` is decided by the mean alone (mean > by); `certain` says whether the interval lies on the same side.
    """

    claim: Claim
    held: bool
    certain: bool
    difference: float
    interval: tuple[float, float]
    arms: Mapping[str, list[float]]


def judge(claim: Claim, runs: list[Mapping[str, Mapping[str, float]]]) -> Verdict:
    """Compare two arms over seeds, paired.

    >>> runs = [{"a": {"acc": 0.9}, "b": {"acc": 0.8}}, {"a": {"acc": 0.8}, "b": {"acc": 0.75}}]
    >>> judge(Claim(says="", metric="acc", better="a", than="b", seeds=2), runs).held
    True
    """
    from scipy.stats import t

    for arm in (claim.better, claim.than):
        require(arm in runs[0], "A claim's arms must be what run(seed) returns", repr(arm), suggestion(arm, runs[0]))
    arms = {arm: [float(run[arm][claim.metric]) for run in runs] for arm in (claim.better, claim.than)}
    gaps = [a - b for a, b in zip(arms[claim.better], arms[claim.than], strict=True)]
    n, mean = len(gaps), math.fsum(gaps) / len(gaps)
    spread = math.sqrt(math.fsum((g - mean) ** 2 for g in gaps) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * spread
    held = mean > claim.by
    certain = mean - half > claim.by if held else mean + half <= claim.by
    return Verdict(
        claim=claim, held=held, certain=certain, difference=mean, interval=(mean - half, mean + half), arms=arms
    )


def check(
    module: ModuleType, progress: Callable[[int, int], None] | None = None, *, data: str | None = None
) -> dict[str, object]:
    """Run a claim module over its seeds and return the record that is published.

    Args:
        module: has PAPER, CLAIMS (a tuple of `Claim`) and run(seed) -> {arm: {metric: value}}; may have NOTE, the
            reason found for a claim that fails. A recipe that users run on their own data is run(seed, data=None).
        progress: called with (seeds done, seeds in all).
        data: the user's own data, as the claim wants it: a folder, for instance.

    Raises:
        Refused: data for a claim that makes its own.

    Cost: max seeds of the claims times one `run`.
    """
    run = module.run
    if data is not None:
        require("data" in inspect.signature(run).parameters, "data= needs a claim that reads the user's data",
                module.__name__.rsplit(".", 1)[1], "Leave data= away.")  # fmt: skip
        run = partial(run, data=data)
    seeds = max(claim.seeds for claim in module.CLAIMS)
    began = time.perf_counter()
    runs = []
    for seed in range(seeds):
        runs.append(run(seed))
        if progress:
            progress(seed + 1, seeds)
    verdicts = [judge(claim, runs[: claim.seeds]) for claim in module.CLAIMS]
    return {
        "slug": module.__name__.rsplit(".", 1)[1].replace("_", "-"),
        "paper": asdict(module.PAPER),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "runs": runs,
        "note": getattr(module, "NOTE", ""),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }


def write_record(record: Mapping[str, object], folder: Path) -> Path:
    """Store a record as `folder`/SLUG.json, whole or not at all."""
    path = folder / f"{record['slug']}.json"
    write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))
    return path
