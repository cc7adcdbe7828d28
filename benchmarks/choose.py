"""Does `choose` find the source that fine-tunes best, and at what share of the cost of fine-tuning them all?

Trains every source of the embedded zoo on every task (the truth), then lets each score and the procedure choose.

    python benchmarks/choose.py truth --jobs 16     # about 8 s a (task, seed, source) on one core; resumes
    python benchmarks/choose.py compare             # from results/choose_truth.json; about 10 s a (task, seed)

Writes results/choose_truth.json, results/choose.json and results/choose.md. Test labels are looked at twice for each
source (the probe and the fine-tuned model): this is a measurement of the procedure, which itself sees none of them.
Seconds are those of the processor, one thread, so that other work on the machine does not count.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from headstart.run.bootstrap import weighted_tau
from headstart.run.cache import Cache
from headstart.run.choice import Choice
from headstart.run.measure import repeats_for
from headstart.run.probe import cross_validated, fit_probe
from headstart.run.rank import choose
from headstart.run.tune import full_steps, predict, tune
from headstart.tasks import Task, load_task
from headstart.zoo.mini import WEIGHTS, mini_sources
from headstart.zoo.source import Source

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "damage": 16, "digits": 10, "faces": 40, "glyphs": 5, "greek": 5, "scenes": 15, "textures": 30, "tissue": 30,
    "typefaces": 20, "vessels": 30,
}  # a class; 60 to 130 in all  # fmt: skip
SEEDS = (0, 1, 2, 3, 4, 5)
DEVELOPMENT = (0, 1, 2, 3)  # the procedure was tuned looking at these; what is claimed is read off the others
BUDGET = 0.15
Pair = tuple[str, int, str, str]
Row = dict[str, Any]


def task_of(name: str, seed: int) -> Task:
    """Half of the examples are tested on, because these sets are small."""
    return load_task(name, labels_per_class=LABELS[name], seed=seed, test_share=0.5)


def truth(pair: Pair) -> Row:
    """Probe and full fine-tune of one source, judged on the sealed test labels."""
    name, seed, source_name, zoo = pair
    torch.set_num_threads(1)
    task, [source] = task_of(name, seed), [s for s in mini_sources(Path(zoo)) if s.name == source_name]
    labels = task.train.labels
    assert labels is not None
    with tempfile.TemporaryDirectory() as folder:
        cache, began = Cache(Path(folder)), time.process_time()
        features = cache.evidence(task.train, source).features
        operations = cache.operations(task.train, source)
        extracted = time.process_time()
        probed = cross_validated(features, labels, repeats=repeats_for(len(labels)), seed=seed)
        weight, bias = fit_probe(features, labels, len(task.classes), strength=probed.strength)
        fitted = time.process_time()
        x = source.preprocess(list(task.train.inputs))
        steps = full_steps(len(labels))
        model = tune(source.load(), source.head, x, labels, len(task.classes), weight=weight, bias=bias, steps=steps,
                     seed=seed, device="cpu")  # fmt: skip
        tuned = time.process_time()
        probe = task.judge(cache.evidence(task.test, source).features @ weight.T + bias)
        full = task.judge(predict(model, source.preprocess(list(task.test.inputs))))
    return {
        "task": name, "seed": seed, "source": source.name, "fingerprint": source.fingerprint,
        "labels": len(labels), "tested": full.n, "looks": task.looks, "steps": steps, "operations": operations,
        "probe": probe.accuracy, "tuned": full.accuracy, "probe_cv": probed.accuracy,
        "seconds": {"features": extracted - began, "probe": fitted - extracted, "tune": tuned - fitted},
    }  # fmt: skip


def make_truth(path: Path, zoo: Path, jobs: int, tasks: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Train what `path` does not hold yet; it is written after every pair, so a stopped run goes on."""
    sources = {s.name: s for s in mini_sources(zoo)}
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in rows if r["source"] in sources and r["fingerprint"] == sources[r["source"]].fingerprint]
    have = {(r["task"], r["seed"], r["source"]) for r in rows}
    pairs = [(t, s, n, str(zoo)) for s in seeds for t in tasks for n in sources if (t, s, n) not in have]
    pool = multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 else None
    for done, row in enumerate(pool.imap_unordered(truth, pairs) if pool else map(truth, pairs), 1):
        rows.append(row)
        rows.sort(key=lambda r: (r["task"], r["seed"], r["source"]))
        temporary = path.with_suffix(".tmp")
        temporary.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
        temporary.replace(path)
        print(f"{done}/{len(pairs)} {row['task']} {row['seed']} {row['source']}: probe {row['probe']:.3f}, "
              f"fine-tuned {row['tuned']:.3f}, {row['seconds']['tune']:.1f} s", flush=True)  # fmt: skip
    return rows


def columns(choice: Choice, true: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Every way to rank -> source -> figure."""
    table: dict[str, dict[str, float]] = {}
    for row in choice.ranking:
        for score, found in row.scores.items():
            table.setdefault(score, {})[row.name] = found.value
    table["probe of every source"] = {name: row["probe_cv"] for name, row in true.items()}
    table["choose"] = {row.name: row.predicted.value for row in choice.ranking}
    return table


def regret(figures: Mapping[str, float], true: Mapping[str, float], pick: str | None = None) -> float:
    """Points lost by taking the top source instead of the best; equal tops count with their mean."""
    top = max(figures.values())
    chosen = [true[name] for name, value in figures.items() if (value == top if pick is None else name == pick)]
    return 100 * (max(true.values()) - statistics.fmean(chosen))


def compare(rows: Sequence[Row], sources: Sequence[Source], note: Callable[[str], None]) -> Row:
    """Run `choose` on every case and set it beside each score and beside chance."""
    cases: list[Row] = []
    for name, seed in sorted({(r["task"], r["seed"]) for r in rows}):
        true = {r["source"]: r for r in rows if (r["task"], r["seed"]) == (name, seed)}
        with tempfile.TemporaryDirectory() as folder:
            task, cache, began = task_of(name, seed), Cache(Path(folder)), time.process_time()
            choice = choose(task, sources, cache=cache, budget=BUDGET, seed=seed)
            seconds = time.process_time() - began
            warm = choose(task, sources, cache=cache, budget=BUDGET, seed=seed).seconds
            assert task.looks == 0
        whole = sum(sum(r["seconds"].values()) - r["seconds"]["probe"] for r in true.values())
        case: Row = {"task": name, "seed": seed, "best": choice.best, "cost": choice.cost, "seconds": seconds,
                     "of_all": seconds / whole, "warm": warm, "close": list(choice.close), "ways": {},
                     "stages": {s.name: [round(s.cost, 4), round(s.seconds, 2), s.says] for s in choice.stages}}  # fmt: skip
        for way, figures in columns(choice, true).items():
            pick = choice.best if way == "choose" else None
            case["ways"][way] = {
                kind: {
                    "tau": weighted_tau([figures[n] for n in figures], [true[n][kind] for n in figures]),
                    "regret": regret(figures, {n: r[kind] for n, r in true.items()}, pick),
                }
                for kind in ("probe", "tuned")
            }
        tuned = {n: r["tuned"] for n, r in true.items()}
        case["chance"] = {k: 100 * (max(r[k] for r in true.values()) - statistics.fmean(r[k] for r in true.values()))
                          for k in ("probe", "tuned")}  # fmt: skip
        reached = [(row, true[row.name]["tuned" if row.basis == "fine-tune" else "probe"]) for row in choice.ranking]
        case["covered"] = statistics.fmean(row.predicted.low <= value <= row.predicted.high for row, value in reached)
        case["error"] = statistics.fmean(row.predicted.value - value for row, value in reached)
        cases.append(case)
        assert choice.best is not None
        note(f"{name} {seed}: {choice.best} reaches {tuned[choice.best]:.3f} of {max(tuned.values()):.3f}; "
             f"{choice.cost:.1%} of the operations, {case['of_all']:.1%} of the seconds, warm {warm:.2f} s")  # fmt: skip
    return {"budget": BUDGET, "sources": len(sources), "cases": cases}


def table(cases: Sequence[Row]) -> dict[str, Row]:
    """Means over the cases for every way to choose."""

    def mean(values: Sequence[float]) -> float:
        return round(statistics.fmean([v for v in values if math.isfinite(v)]), 3)

    ways = {way for case in cases for way in case["ways"]}
    found = {}
    for way in sorted(ways, key=lambda w: (w == "choose", w)):
        of = [case["ways"][way] for case in cases if way in case["ways"]]
        found[way] = {f"{what}_{kind}": mean([case[kind][what] for case in of])
                      for what in ("tau", "regret") for kind in ("probe", "tuned")}  # fmt: skip
        found[way]["worst_tuned"] = round(max(case["tuned"]["regret"] for case in of), 2)
    found["any source, by chance"] = {
        f"regret_{k}": mean([case["chance"][k] for case in cases]) for k in ("probe", "tuned")
    }
    return found


def page(found: Row) -> str:
    """The table as Markdown."""
    lines = [
        "# Which source to start from: `python benchmarks/choose.py`", "",
        f"{found['sources']} embedded sources; tasks {', '.join(sorted({c['task'] for c in found['cases']}))}; 60 to 130 "
        "labels. Means over the cases; tau is Kendall's, weighted towards",
        "the top, against the test accuracy of a probe or of a full fine-tune of every source; regret is in points of",
        "test accuracy lost by taking the first source instead of the best one.", "",
    ]  # fmt: skip
    for title, held in (("Seeds the procedure was not tuned on", True), ("Seeds it was tuned on", False)):
        cases = [case for case in found["cases"] if (case["seed"] not in DEVELOPMENT) is held]
        if cases:
            seeds = ", ".join(map(str, sorted({case["seed"] for case in cases})))
            lines += [f"## {title} ({seeds}; {len(cases)} cases)", "", *section(cases, found["budget"])]
    return "\n".join(lines)


def section(cases: Sequence[Row], budget: float) -> list[str]:
    """One table, and what the procedure cost."""
    lines = ["| ranked by | tau, probe | tau, fine-tuned | regret, probe | regret, fine-tuned | worst |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for way, row in table(cases).items():
        figures = [row.get(k, "") for k in ("tau_probe", "tau_tuned", "regret_probe", "regret_tuned", "worst_tuned")]
        lines.append(f"| {way} | " + " | ".join(f"{f:.2f}" if f != "" else "" for f in figures) + " |")
    mean = {k: statistics.fmean(case[k] for case in cases) for k in ("cost", "of_all", "warm", "covered", "error")}
    return [
        *lines, "",
        f"`choose` cost {mean['cost']:.1%} of the operations of fine-tuning every source (allowed: {budget:.0%}) and",
        f"{mean['of_all']:.1%} of the seconds; {mean['warm']:.2f} s when everything is cached. Its 95 % intervals held",
        f"{mean['covered']:.0%} of the test accuracies; predictions were {100 * mean['error']:+.1f} points off on average.", "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "compare", "all"], nargs="?", default="all")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the truth, one thread each")
    parser.add_argument("--zoo", type=Path, default=WEIGHTS, help="folder of embedded models")
    parser.add_argument("--tasks", nargs="+", choices=sorted(LABELS), default=sorted(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / "choose_truth.json"
    rows = json.loads(path.read_text()) if chosen.what == "compare" else make_truth(
        path, chosen.zoo, chosen.jobs, chosen.tasks, chosen.seeds)  # fmt: skip
    if chosen.what != "truth":
        rows = [row for row in rows if row["task"] in chosen.tasks]
        found = compare(rows, mini_sources(chosen.zoo), lambda line: print(line, flush=True))
        (chosen.results / "choose.json").write_text(json.dumps(found, indent=1) + "\n")
        (chosen.results / "choose.md").write_text(page(found))
        print(page(found))


if __name__ == "__main__":
    main()
