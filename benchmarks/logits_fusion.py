"""What the exact alpha costs and gains beside the paper's grid of 21 values.

    python benchmarks/logits_fusion.py

Eight rows of float32 logits, normal numbers: the small model resembles the large one, which is half to twice as sure,
row by row, and the expert is the small one with half a logit of change. Time is that of the whole `fuse_logits`, one thread, processor
seconds, interleaved, the median over repetitions; the error is the distance to the alpha of a float64 bisection (of a
grid of 1e-4 around it for the symmetric objective), and what it makes of the fused probabilities. Writes
benchmarks/results/logits_fusion.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from headstart.merge import fuse_logits

GRID = [k / 10 for k in range(21)]
DIRECTIONS = ("forward", "reverse", "symmetric")


def logits(vocabulary: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Large, small, expert."""
    generator = torch.Generator().manual_seed(vocabulary)
    large, small = (2.0 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    small = 0.7 * (large + small)
    return (
        large * torch.linspace(0.5, 2, rows)[:, None],
        small,
        small + 0.5 * torch.randn(rows, vocabulary, generator=generator),
    )


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def gaps(large: Tensor, small: Tensor, expert: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Both divergences of the fused model less those of the expert."""
    fused = large + alpha[:, None] * (expert - small)
    return kl(large, fused) - kl(small, expert), kl(fused, large) - kl(expert, small)


def truth(large: Tensor, small: Tensor, expert: Tensor, direction: str) -> Tensor:
    """Alpha by halving, with softmaxes written out in float64."""
    given = large.double(), small.double(), expert.double()

    def halved(which: int) -> Tensor:
        low, high = torch.zeros(len(large)).double(), torch.full((len(large),), 2.0).double()
        for _ in range(45):
            middle = (low + high) / 2
            above = gaps(*given, middle)[which] > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    if direction != "symmetric":
        return halved(DIRECTIONS.index(direction))
    ends = torch.stack([halved(0), halved(1)])
    low, high = ends.amin(0), ends.amax(0)
    for _ in range(4):  # a grid of 41 inside the bracket, again and again: the objective is smooth there
        tried = low + (high - low) * torch.linspace(0, 1, 41).double()[:, None]
        worst = torch.stack([torch.stack(gaps(*given, alpha)).square().sum(0) for alpha in tried])
        best, width = tried.gather(0, worst.argmin(0)[None])[0], (high - low) / 40
        low, high = best - width, best + width
    return best


def timed(
    given: tuple[Tensor, Tensor, Tensor], direction: str, grid: Sequence[float] | None
) -> tuple[float, Tensor, Tensor]:
    began = time.process_time()
    fused, alpha = fuse_logits(given[0], given[1], [given[2]], direction=direction, grid=grid)
    return time.process_time() - began, fused, alpha[:, 0]


def compare(vocabulary: int, direction: str, repetitions: int, rows: int = 8) -> dict[str, object]:
    given = logits(vocabulary, rows)
    right = truth(*given, direction)
    wanted = given[0].double() + right[:, None] * (given[2].double() - given[1].double())
    row: dict[str, object] = {"vocabulary": vocabulary, "direction": direction, "alpha": round(float(right.mean()), 3)}
    seconds: dict[str, list[float]] = {"exact": [], "grid": []}
    for _ in range(repetitions + 1):
        for name, grid in (("exact", None), ("grid", GRID)):
            took, fused, alpha = timed(given, direction, grid)
            seconds[name].append(took)
            row[f"{name}_error"] = float(f"{(alpha - right).abs().max():.2g}")
            row[f"{name}_kl"] = float(f"{kl(wanted, fused.double()).abs().max():.2g}")
    for name, each in seconds.items():  # the first pair warms up
        row[f"{name}_ms"] = round(1e3 * statistics.median(each[1:]), 2)
    row["ratio"] = round(
        statistics.median(a / b for a, b in zip(seconds["exact"][1:], seconds["grid"][1:], strict=True)), 3
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "logits_fusion.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocabulary in (32_000, 128_000):
        for direction in DIRECTIONS:
            rows.append(compare(vocabulary, direction, options.repetitions))
            print(rows[-1], flush=True)
    record = {"rows": rows, "n": 8, "torch": torch.__version__, "python": platform.python_version(), "threads": 1}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
