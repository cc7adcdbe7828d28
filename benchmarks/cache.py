"""What the evidence cache costs over the bare forward pass, and what reading it back costs.

    python benchmarks/cache.py

The bare pass decodes and preprocesses each chunk once for each model and calls the model: what a person would write,
keeping the features in memory. Interleaved, one thread, processor seconds; the ratio is the median over repetitions.
The target is a ratio of at most 1.03. Writes benchmarks/results/cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from headstart.core.taps import tapped
from headstart.run.cache import Cache
from headstart.tasks import Examples, load_task
from headstart.zoo.mini import WEIGHTS, mini_sources
from headstart.zoo.source import Source


def bare(examples: Examples, source: Source, chunk: int) -> float:
    """Load, decode, preprocess, forward, keep the features; processor seconds."""
    began = time.process_time()
    model, kept = source.load(), []
    tap = f"{source.head}:input"
    with tapped(model, [tap]) as seen, torch.inference_mode():
        for first in range(0, len(examples), chunk):
            rows = range(first, min(first + chunk, len(examples)))
            model(source.preprocess([examples.inputs[i] for i in rows]))
            kept.append(seen[tap].flatten(1))
        torch.cat(kept)
    return time.process_time() - began


def cached(examples: Examples, source: Source, chunk: int) -> tuple[float, float]:
    """The same through an empty cache, disk included; then from the cache. Processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), chunk=chunk, device="cpu")
        began = time.process_time()
        cache.evidence(examples, source)
        filled = time.process_time()
        cache.evidence(examples, source)
        return filled - began, time.process_time() - filled


def whole(examples: Examples, sources: list[Source], chunk: int) -> float:
    """The ratio for all sources together: one sweep of the cache over one bare pass after another."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        Cache(Path(folder), chunk=chunk, device="cpu").fill(examples, sources)
        filled = time.process_time() - began
    return filled / sum(bare(examples, source, chunk) for source in sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=WEIGHTS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    examples = load_task("digits").train
    by_family = {str(s.facts["family"]): s for s in mini_sources(chosen.zoo)}
    found = {}
    for source in by_family.values():
        bare(examples, source, 64), cached(examples, source, 64)  # warm up
        ratios, again, seconds = [], [], []
        for _ in range(chosen.repetitions):
            plain = bare(examples, source, 64)
            filled, read = cached(examples, source, 64)
            ratios.append(filled / plain)
            again.append(read / plain)
            seconds.append(plain)
        found[source.name] = {"ratio": round(statistics.median(ratios), 4), "warm": round(statistics.median(again), 4),
                              "bare_seconds": round(statistics.median(seconds), 4)}  # fmt: skip
        print(source.name, found[source.name], flush=True)
    record = {"examples": len(examples), "chunk": 64, "torch": torch.__version__, "sources": found,
              "whole_zoo": round(statistics.median(whole(examples, list(by_family.values()), 64)
                                                  for _ in range(chosen.repetitions)), 4)}  # fmt: skip
    chosen.results.mkdir(parents=True, exist_ok=True)
    (chosen.results / "cache.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"all {len(by_family)} families at once: {record['whole_zoo']}")


if __name__ == "__main__":
    main()
