"""What every source of the embedded zoo reaches on every embedded picture task: the truth for benchmarks/choose.py.

    python benchmarks/choose_truth.py --jobs 16     # about 5 s a (task, seed, source) on one core; resumes

A logistic probe and a full fine-tune of each, judged on the sealed test labels, which are looked at twice for each source.
Writes results/choose_truth.json. Seconds are those of the processor, one thread, so that other work does not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from headstart.run.cache import Cache
from headstart.run.measure import repeats_for
from headstart.run.probe import cross_validated, fit_probe
from headstart.run.tune import full_steps, predict, tune
from headstart.tasks import Task, load_task
from headstart.zoo.mini import WEIGHTS, mini_sources

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "damage": 16, "digits": 10, "faces": 40, "glyphs": 5, "greek": 5, "scenes": 15, "textures": 30, "tissue": 30,
    "typefaces": 20, "vessels": 30,
}  # a class; 60 to 130 in all  # fmt: skip
SEEDS = (0, 1, 2, 3, 4, 5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--zoo", type=Path, default=WEIGHTS, help="folder of embedded models")
    parser.add_argument("--tasks", nargs="+", choices=sorted(LABELS), default=sorted(LABELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.results.mkdir(parents=True, exist_ok=True)
    make_truth(chosen.results / "choose_truth.json", chosen.zoo, chosen.jobs, chosen.tasks, chosen.seeds)


if __name__ == "__main__":
    main()
