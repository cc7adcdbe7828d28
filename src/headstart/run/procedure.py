"""The stages of a choice: measure every source, probe it, race the best few, conclude."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from headstart.zoo import Skipped

from .bootstrap import agreement
from .cache import Progress
from .choice import Choice, Ranked, Stage
from .forecast import Forecast, labels_to_decide, ranking
from .measure import Setting, measure, probe
from .race import Finalist, expected, race
from .tune import FOLDS, Pull, full_steps, pull, training_cost

if TYPE_CHECKING:
    from headstart.tasks import Task
    from headstart.zoo import Source

FINALISTS = 4


@dataclass
class Procedure:
    """The stages of one `choose`, and what they have found so far."""

    setting: Setting
    crew: Callable[..., Iterator[Any]]
    here: bool
    budget: float
    progress: Progress | None
    skipped: list[Skipped]
    sources: dict[str, Source] = field(default_factory=dict)
    forecasts: dict[str, Forecast] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def measure(self, fitting: Sequence[Source]) -> None:
        """Stage 1: features, scores and the closed form of every source."""
        setting, began = self.setting, time.perf_counter()
        keyed = [(s, setting.key("scores", s, scores=repr(dict(setting.scores)))) for s in fitting]
        new = [source for source, key in keyed if setting.cache.find(key) is None]
        failed: list[Skipped] = []
        if new and self.here:
            failed = setting.cache.fill(setting.examples, new, progress=self.progress)
        lost = {skip.name for skip in failed}
        results = self.results(
            "scores", partial(measure, setting), [pair for pair in keyed if pair[0].name not in lost]
        )
        for source, found in results:
            if "why" in found:
                failed.append(Skipped(name=source.name, why=found["why"]))
            else:
                self.sources[source.name] = source
                self.forecasts[source.name] = Forecast(name=source.name, measured=found, probed=None, gain=None)
        self.skipped += failed
        measured = [f.measured for f in self.forecasts.values()]
        cost = sum(self.n * m["operations"] + m["counted"] for m in measured)
        self.note("scores", list(self.forecasts), cost, began, "features, scores with intervals, leave-one-out ridge")

    def probe(self) -> None:
        """Stage 2: a cross-validated logistic probe of every source; beside the features it costs next to nothing."""
        began = time.perf_counter()
        keyed = [(source, self.setting.key("probe", source)) for source in self.sources.values()]
        cost = 0
        for source, found in self.results("probes", partial(probe, self.setting), keyed):
            self.forecasts[source.name] = replace(self.forecasts[source.name], probed=found)
            cost += found["counted"]
        self.note(
            "probes", list(self.sources), cost, began, "logistic regression on the features, repeated cross-validation"
        )

    def race(self) -> None:
        """Stage 3: short fine-tunes of the finalists, with what is left of the budget."""
        began = time.perf_counter()
        probed = sorted((f for f in self.forecasts.values() if f.probed), key=lambda f: (-f.accuracy, f.name))
        finalists = [
            Finalist(
                source=self.sources[f.name],
                accuracy=f.accuracy,
                strength=(f.probed or {})["strength"],
                operations=f.measured["operations"],
            )
            for f in varied(probed, {name: str(s.facts.get("family", name)) for name, s in self.sources.items()})
        ]
        allowance = (self.budget - sum(stage.cost for stage in self.stages)) * self.whole
        gains, cost = race(finalists, self.pulls, n=self.n, allowance=allowance)
        likely = expected(gains, list(self.forecasts))
        for name, forecast in self.forecasts.items():
            self.forecasts[name] = replace(forecast, gain=gains.get(name), expected=likely.get(name))
        says = f"up to {max(g.steps for g in gains.values())} of {full_steps(self.n)} steps" if gains else (
            "one source only" if len(finalists) < 2 else "the budget leaves no room for a fine-tune")  # fmt: skip
        self.note("fine-tunes", list(gains), cost, began, says)

    def pulls(self, jobs: list[Pull]) -> Iterator[Mapping[str, list[int]]]:
        """The results of short fine-tunes, each kept in the cache."""
        s = self.setting
        keyed = [(job, s.key("pull", job.source, fold=job.fold, of=FOLDS, steps=job.steps, strength=job.strength))
                 for job in jobs]  # fmt: skip
        work = partial(pull, s.cache, s.examples, s.classes, s.seed)
        return (found for _, found in self.results("fine-tunes", work, keyed))

    def results(
        self, what: str, function: Any, keyed: Sequence[tuple[Any, dict[str, Any]]]
    ) -> Iterator[tuple[Any, Any]]:
        """Each job with its result: from the cache, else computed by the crew and kept (refusals are not kept)."""
        found = [self.setting.cache.find(key) for _, key in keyed]
        computed = iter(self.crew(function, [job for (job, _), have in zip(keyed, found, strict=True) if have is None]))
        for done, ((job, key), have) in enumerate(zip(keyed, found, strict=True), 1):
            value = next(computed) if have is None else have
            if have is None and "why" not in value:
                value = self.setting.cache.keep(key, value)
            if self.progress:
                self.progress(what, done, len(keyed))
            yield job, value

    @property
    def n(self) -> int:
        """Labelled examples in use."""
        return len(self.setting.examples)

    @property
    def whole(self) -> int:
        """Operations of fine-tuning every source."""
        return sum(training_cost(f.measured["operations"], full_steps(self.n), self.n) for f in self.forecasts.values())

    def note(self, name: str, sources: Sequence[str], cost: float, began: float, says: str) -> None:
        """Add a stage to the record."""
        share, seconds = cost / max(1, self.whole), time.perf_counter() - began
        self.stages.append(Stage(name=name, sources=tuple(sources), cost=share, seconds=seconds, says=says))

    def conclude(self, task: Task) -> Choice:
        """The ranking, and how certain it is."""
        rows = ranking(list(self.forecasts.values()), self.setting.seed, len(task.test) or None)
        close = tuple(row.name for row in rows if row.close)
        return Choice(
            task=task.name,
            seed=self.setting.seed,
            best=rows[0].name if rows else None,
            reason=because(rows, self.skipped, task.modality),
            ranking=rows,
            skipped=tuple(self.skipped),
            agreement=agreement(self.figures()),
            stages=tuple(self.stages),
            budget=self.budget,
            cost=sum(stage.cost for stage in self.stages),
            seconds=time.perf_counter() - self.began,
            close=close,
            decide=self.decide(rows[0].name, close[0]) if close else "",
        )

    def figures(self) -> dict[str, dict[str, float]]:
        """Score -> source -> value, the leave-one-out ridge among them."""
        table: dict[str, dict[str, float]] = {"ridge": {n: f.measured["accuracy"] for n, f in self.forecasts.items()}}
        for name, forecast in self.forecasts.items():
            for score, found in forecast.measured["scores"].items():
                table.setdefault(score, {})[name] = found["value"]
        return table

    def decide(self, one: str, other: str) -> str:
        """What would tell two sources apart."""
        pair = [self.forecasts[one], self.forecasts[other]]
        steps = full_steps(self.n)
        cost = sum(training_cost(f.measured["operations"], steps, self.n) * FOLDS for f in pair) / self.whole
        n = labels_to_decide(*pair)
        labels = f"; a difference of this size would be certain with about {n} labelled examples" if n else ""
        return (
            f"Fine-tuning {one} and {other} for all {steps} steps on {FOLDS} folds would say more "
            f"({cost:.0%} of the cost of fine-tuning every source){labels}."
        )


def varied(probed: Sequence[Forecast], families: Mapping[str, str]) -> list[Forecast]:
    """The finalists: the best of each family, then the next best, because what fine-tuning adds goes by family."""
    leaders = list({families[f.name]: f for f in reversed(probed)}.values())
    first = sorted(probed, key=lambda f: f not in leaders)  # stable: each half stays in the order of the probes
    return first[:FINALISTS]


def because(rows: Sequence[Ranked], skipped: Sequence[Skipped], modality: str) -> str:
    """One sentence: why this source, or why none."""
    if not rows:
        failed = (
            f" {len(skipped)} could not be used, the first because it {skipped[0].why.rstrip('.')}." if skipped else ""
        )
        return f"No source fits this kind of data ({modality}).{failed}"
    best = rows[0]
    figure = f"{best.predicted.value:.0%} ({best.predicted.low:.0%} to {best.predicted.high:.0%})"
    close = sum(row.close for row in rows)
    if close:
        return (f"Too close to call: {best.name} is ahead on all evidence, with a predicted accuracy of {figure} by "
                f"{best.basis}; {close} other{'s' * (close > 1)} cannot be told from it.")  # fmt: skip
    return f"{best.name} has the best predicted accuracy of {figure}, by {best.basis}."
