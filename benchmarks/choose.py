"""How well does each score, and `choose` itself, find the source that fine-tunes best, and at what cost?

    python benchmarks/choose.py --jobs 2       # from results/choose_truth.json; about 8 s a (task, seed) on one core

Reads the accuracies that `benchmarks/choose_truth.py` measured for every source of the embedded zoo, and lets every score of the
library and the budgeted procedure choose. The procedure and its defaults were settled on the tasks of DEVELOPMENT; on the others
nothing was tried before. Test labels are looked at twice for each source: this measures the procedure, which sees none of them.
Writes results/choose.json and results/choose.md. Seconds are those of the processor, one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from choose_truth import RESULTS, task_of
from scipy.stats import t as student

from headstart.core.validate import Refused
from headstart.run.bootstrap import weighted_tau
from headstart.run.cache import Cache
from headstart.run.rank import choose
from headstart.run.scores import every_score
from headstart.zoo.mini import WEIGHTS, mini_sources

DEVELOPMENT = ("digits", "faces", "glyphs", "textures", "tissue")
BUDGET = 0.1
KINDS = ("probe", "tuned")
Row = dict[str, Any]


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation; NaN where one is constant."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return math.nan


def regret(figures: Mapping[str, float], true: Mapping[str, float]) -> float:
    """Points lost by taking the top source instead of the best; equal tops count with their mean."""
    top = max(figures.values())
    return 100 * (max(true.values()) - statistics.fmean(true[name] for name, value in figures.items() if value == top))


def against(
    figures: Mapping[str, float], true: Mapping[str, Row], usual: Mapping[str, Row], pick: str | None = None
) -> Row:
    """How figures of the sources go with their accuracies, both truths; the pick is the top figure unless named."""
    chosen = figures if pick is None else {pick: 1.0}
    return {
        kind: {
            "tau": weighted_tau(columns := list(figures.values()), [true[name][kind] for name in figures]),
            "pearson": pearson(columns, [true[name][kind] for name in figures]),
            "regret": regret(chosen, {name: row[kind] for name, row in usual.items()}),
            "seen": regret(chosen, {name: row[kind] for name, row in true.items()}),
        }
        for kind in KINDS
    }


def compare(case: tuple[str, int, list[Row]]) -> Row:
    """One task and seed: every score on the evidence of every source, then `choose` as a user calls it."""
    torch.set_num_threads(1)
    name, seed, every = case
    rows = [row for row in every if row["seed"] == seed]
    true = {row["source"]: row for row in rows}
    usual = {source: {kind: statistics.fmean(row[kind] for row in every if row["source"] == source) for kind in KINDS}
             for source in true}  # fmt: skip
    sources = [source for source in mini_sources(WEIGHTS) if source.name in true]
    task = task_of(name, seed)
    whole = sum(sum(row["seconds"].values()) - row["seconds"]["probe"] for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        cache, began = Cache(Path(folder)), time.process_time()
        choice = choose(task, sources, cache=cache, budget=BUDGET, seed=seed)
        seconds = time.process_time() - began
        warm = choose(task, sources, cache=cache, budget=BUDGET, seed=seed).seconds
        ways, cost = {}, {}
        for way, score in every_score().items():
            figures, began = {}, time.process_time()
            for source in sources:
                try:
                    figures[source.name] = score.score(cache.evidence(task.train, source))
                except Refused:
                    continue
            cost[way] = (time.process_time() - began) / len(sources)
            if len(figures) > 2:
                ways[way] = against(figures, true, usual)
    assert task.looks == 0
    assert choice.best is not None
    ways["probe of every source"] = against({name: row["probe_cv"] for name, row in true.items()}, true, usual)
    predicted = {row.name: row.predicted.value for row in choice.ranking}
    ways["choose"] = against(predicted, true, usual, choice.best)
    for kind in KINDS:  # what cannot be beaten without knowing the future: the source that is best over all seeds
        best = max(usual, key=lambda name, kind=kind: usual[name][kind])
        ways.setdefault("best source in hindsight", {})[kind] = against({best: 1.0}, true, usual)[kind]
    reached = [
        (row.predicted, true[row.name]["tuned" if row.basis == "fine-tune" else "probe"]) for row in choice.ranking
    ]
    return {
        "task": name, "seed": seed, "best": choice.best, "close": list(choice.close), "ways": ways, "score_seconds": cost,
        "cost": choice.cost, "seconds": seconds, "of_all": seconds / whole, "warm": warm,
        "covered": statistics.fmean(one.low <= value <= one.high for one, value in reached),
        "error": statistics.fmean(one.value - value for one, value in reached),
        "chance": {kind: 100 * (max(v := [row[kind] for row in usual.values()]) - statistics.fmean(v)) for kind in KINDS},
    }  # fmt: skip


def over_tasks(cases: Sequence[Row], read: Any) -> tuple[float, float]:
    """Mean over tasks of the mean over seeds, and half the width of its 95 % t-interval over tasks."""
    by_task: dict[str, list[float]] = {}
    for case in cases:
        value = read(case)
        if value is not None and math.isfinite(value):
            by_task.setdefault(case["task"], []).append(value)
    means = [statistics.fmean(values) for values in by_task.values()]
    if len(means) < 2:  # no interval over one task
        return (means or [math.nan])[0], math.nan
    return statistics.fmean(means), float(student.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / len(
        means
    ) ** 0.5


def table(cases: Sequence[Row]) -> list[str]:
    """One row for every way to choose, best first by the fine-tuned accuracy that its pick loses."""

    def read(way: str, kind: str, what: str) -> Any:
        return lambda case: case["ways"].get(way, {}).get(kind, {}).get(what)

    ways = list({way: None for case in cases for way in case["ways"]})
    ways.sort(key=lambda way: over_tasks(cases, read(way, "tuned", "regret"))[0])
    lines = ["| ranked by | regret, tuned | τ, tuned | r, tuned | seen, tuned | regret, probe | τ, probe | r, probe | ms a source |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for way in ways:
        cells = []
        for kind in reversed(KINDS):
            for what in ("regret", "tau", "pearson", *(("seen",) if kind == "tuned" else ())):
                mean, half = over_tasks(cases, read(way, kind, what))
                cells.append(f"{mean:.2f} ± {half:.2f}" if math.isfinite(mean) else "")
        taken = over_tasks(cases, lambda case, way=way: case["score_seconds"].get(way))[0]
        lines.append(f"| {way} | {' | '.join(cells)} | {f'{1000 * taken:.1f}' if math.isfinite(taken) else ''} |")
    chance = [over_tasks(cases, lambda case, kind=kind: case["chance"][kind])[0] for kind in reversed(KINDS)]
    return [*lines, f"| any source, by chance | {chance[0]:.2f} | | | | {chance[1]:.2f} | | | |"]


def default_set(cases: Sequence[Row]) -> list[str]:
    """The scores shown without asking: the five that lose least on the tasks of development, at under 5 ms a source."""
    seen = [case for case in cases if case["task"] in DEVELOPMENT]
    cheap = [way for way in seen[0]["score_seconds"] if way in seen[0]["ways"]
             and over_tasks(seen, lambda case, way=way: case["score_seconds"][way])[0] < 0.005]  # fmt: skip
    return sorted(cheap, key=lambda way: figure(seen, "tuned", "regret", way))[:5]


def figure(cases: Sequence[Row], kind: str, what: str, way: str = "choose") -> float:
    """The mean over tasks of one figure."""
    return over_tasks(cases, lambda case: case["ways"][way][kind][what])[0]


def procedure(cases: Sequence[Row]) -> list[str]:
    """What `choose` reached and cost, task by task."""
    lines = ["| task | regret, tuned | worst | seen | seen, best in hindsight | regret, probe | cost | of the seconds | intervals hold | bias |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in [*sorted({case["task"] for case in cases}), "all"]:
        of = [case for case in cases if name in (case["task"], "all")]

        read = partial(figure, of)
        worst = max((case["ways"]["choose"]["tuned"]["regret"] for case in of), default=math.nan)
        mean = {k: over_tasks(of, lambda case, k=k: case[k])[0] for k in ("cost", "of_all", "covered", "error")}
        lines.append(f"| {name} | {read('tuned', 'regret'):.2f} | {worst:.2f} | {read('tuned', 'seen'):.2f} | "
                     f"{read('tuned', 'seen', 'best source in hindsight'):.2f} | {read('probe', 'regret'):.2f} | "
                     f"{mean['cost']:.1%} | {mean['of_all']:.1%} | {mean['covered']:.0%} | {100 * mean['error']:+.1f} |")  # fmt: skip
    return lines


def page(found: Row) -> str:
    """The tables as Markdown."""
    cases = found["cases"]
    held_out = [case for case in cases if case["task"] not in DEVELOPMENT]
    seen = [case for case in cases if case["task"] in DEVELOPMENT]
    return "\n".join([
        "# Which source to start from: `python benchmarks/choose.py`", "",
        f"{found['sources']} embedded sources, {len({c['task'] for c in cases})} tasks, {len(cases)} cases (a task with a seed), 60",
        "to 130 labels. Truth: the test accuracy of a logistic probe and of a full fine-tune of every source on every case",
        "(`results/choose_truth.json`). Regret is in points of accuracy lost by taking the first source instead of the best, a",
        "source's accuracy being its mean over the seeds of the task. `seen` takes the accuracies of the one seed instead: the best of",
        "fourteen on one small test owes much to luck, as the row of the source that is best in hindsight shows. τ is Kendall's,",
        "weighted towards the top; r is Pearson's; both against the one seed. Means over seeds, then over tasks, ± half a 95 %",
        "t-interval over tasks.", "",
        "## Every score, all tasks", "", *table(cases), "",
        f"Shown without asking: {', '.join(found['default'])}: the five that lose least on the tasks of development at under 5 ms a",
        "source.", "",
        f"## `choose` on tasks nothing was tuned on (budget {found['budget']:.0%})", "", *procedure(held_out), "",
        "The tasks were defined before any source was tried on them. One rule was made after a look at a first run here (four",
        "seeds): that fine-tunes are run only where the budget buys a quarter of their steps on every fold. All else was settled on",
        "the tasks of the next section. Cost is in counted operations, as a share of fine-tuning every source; seconds include",
        "loading and what is not counted.",
        "Intervals are 90 % and are for the test that was read: where `choose` predicts by a probe the probe's test accuracy, where",
        "by a fine-tune the fine-tuned model's.", "",
        f"## `choose` on the tasks it was tuned on ({', '.join(DEVELOPMENT)})", "", *procedure(seen), "",
        "## Every score, tasks nothing was tuned on", "", *table(held_out), "",
        "## Every score, tasks of development", "", *table(seen), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--print", action="store_true", help="only print the page again from results/choose.json")
    chosen = parser.parse_args()
    path = chosen.results / "choose.json"
    if not chosen.print:
        rows = json.loads((chosen.results / "choose_truth.json").read_text())
        keys = sorted({(r["task"], r["seed"]) for r in rows if not chosen.tasks or r["task"] in chosen.tasks})
        jobs = [(name, seed, [row for row in rows if row["task"] == name]) for name, seed in keys]
        cases = []
        with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
            for case in pool.imap(compare, jobs):
                cases.append(case)
                print(f"{case['task']} {case['seed']}: {case['best']} loses {case['ways']['choose']['tuned']['seen']:.2f} points at "
                      f"{case['cost']:.1%} of the operations, {case['of_all']:.1%} of the seconds", flush=True)  # fmt: skip
        found = {
            "budget": BUDGET,
            "sources": len({r["source"] for r in rows}),
            "default": default_set(cases),
            "cases": cases,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
    text = page(json.loads(path.read_text()))
    (chosen.results / "choose.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
