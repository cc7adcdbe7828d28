"""What a step of aTLAS costs with inner products for gradients, against autograd graphs through the sum.

Eight task vectors of a perceptron of 8.5 million weights; one thread, CPU time, two processes for each way and
round: one for time, one for memory that gives back at once what is freed.

    python benchmarks/atlas.py

Writes benchmarks/results/atlas.json. `plain` is the model's own forward and backward, which every way contains.
`held` is what the vectors take, `step` the memory a step adds at its peak, weights and their gradients included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from headstart.core.rng import seeded
from headstart.merge import Atlas

WIDTH, VECTORS, BATCH, STEPS = 2048, 8, 128, 7
WAYS = ("plain", "inner products, half", "inner products, full", "graph, half", "graph, full", "graph, stacked")


def resident(field: str = "VmRSS") -> float:
    """MB of this process in memory now, or at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def prepared(way: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A forward pass, and what is trained."""
    with seeded(0):
        model = nn.Sequential(
            nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(),
            nn.Linear(WIDTH, 10),
        )  # fmt: skip
        vectors = {str(k): {name: 1e-3 * torch.randn_like(p) for name, p in model.named_parameters()}
                   for k in range(VECTORS)}  # fmt: skip
    if way == "plain":
        return model, list(model.parameters())
    if way.startswith("inner products"):
        composed = Atlas(vectors=vectors, half=way.endswith("half")).apply(model)
        return composed, [composed.coefficients]
    base = {name: p.detach() for name, p in model.named_parameters()}
    free = torch.zeros(VECTORS, len(base), requires_grad=True)
    if way == "graph, stacked":
        stacked = {name: torch.stack([vector[name].flatten() for vector in vectors.values()]) for name in base}

        def weights() -> dict[str, Tensor]:
            return {name: p + (free[:, j] @ stacked[name]).view_as(p) for j, (name, p) in enumerate(base.items())}

    else:
        dtype = torch.float16 if way == "graph, half" else torch.float32
        kept = [{name: change.to(dtype) for name, change in vector.items()} for vector in vectors.values()]

        def weights() -> dict[str, Tensor]:
            return {name: p + sum(free[i, j] * vector[name].float() for i, vector in enumerate(kept))
                    for j, (name, p) in enumerate(base.items())}  # fmt: skip

    return lambda x: functional_call(model, weights(), (x,)), [free]


def measure(way: str) -> dict[str, float]:
    """Milliseconds of the median step, MB of the vectors and of a step's peak."""
    torch.set_num_threads(1)
    x, y = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    F.cross_entropy(nn.Linear(64, 10)(x), y).backward()  # loads what every way needs
    before = resident()
    forward, params = prepared(way)
    gc.collect()
    held = resident() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    at, times, optimizer = resident(), [], torch.optim.AdamW(params, lr=1e-4)
    for _ in range(STEPS):
        began = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        if way != "plain":  # an optimizer of all weights is no part of the comparison
            optimizer.step()
        times.append(1e3 * (time.process_time() - began))
    return {"ms": statistics.median(times[1:]), "held_mb": held, "step_mb": resident("VmHWM") - at}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "atlas.json")
    parser.add_argument("--only", choices=WAYS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    eager = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory leaves at once, which takes time
    for _ in range(options.rounds):
        for way in WAYS:
            memory, clock = (
                json.loads(subprocess.run([sys.executable, __file__, "--only", way], check=True, capture_output=True,
                                          text=True, env=env).stdout)
                for env in (eager, os.environ)
            )  # fmt: skip
            runs[way].append(memory | {"ms": clock["ms"]})
    rows = {way: {key: round(statistics.median(run[key] for run in found), 1) for key in found[0]}
            for way, found in runs.items()}  # fmt: skip
    for way, row in rows.items():
        print(f"{way:<24} {row['ms']:>8.1f} ms {row['held_mb']:>8.1f} MB held {row['step_mb']:>8.1f} MB a step")
    record = {
        "vectors": VECTORS, "width": WIDTH, "batch": BATCH, "rounds": options.rounds, "rows": rows,
        "torch": torch.__version__, "python": platform.python_version(), "threads": 1,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
