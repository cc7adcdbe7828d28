"""What `fit` costs over a hand-written loop: the same training, interleaved, one thread, in CPU time.

The ratio is that of the median steps, so neither a busy machine nor the few milliseconds of starting decide it.

    python benchmarks/loop.py

Writes benchmarks/results/loop.json. The target is a ratio of at most 1.05 for a step of about 5 ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.stream import Batches


def model_of(width: int) -> nn.Module:
    """A perceptron with batch normalisation and dropout; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def by_hand(model: nn.Module, stream: Batches, steps: int) -> list[float]:
    """The loop a person would write for the same training; when each step ended, in CPU seconds."""
    ended = [time.process_time()]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for batch, _ in zip(stream, range(steps), strict=False):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch.x), batch.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        ended.append(time.process_time())
    return ended


def by_fit(model: nn.Module, stream: Batches, steps: int) -> list[float]:
    """The same through `fit`."""
    ended = [time.process_time()]
    plan = Plan(model=model, stream=stream, steps=steps, optimizer=adamw(1e-3))
    fit(plan, device="cpu", progress=lambda _done, _total: ended.append(time.process_time()))
    return ended


def compare(width: int, steps: int, repetitions: int) -> dict[str, float]:
    """Milliseconds of the median step of both, the median of the neighbours' ratios, and what starting costs more."""
    x, y = torch.randn(4096, 64), torch.randint(10, (4096,))
    stream = Batches(x=x, y=y, batch_size=128)
    step: dict[str, list[float]] = {"by_hand": [], "by_fit": []}
    first: dict[str, list[float]] = {"by_hand": [], "by_fit": []}
    for k in range(repetitions + 1):  # the first pair warms up
        for run in (by_hand, by_fit) if k % 2 else (by_fit, by_hand):
            ended = run(model_of(width), stream, steps)
            if k:
                each = [1e3 * (b - a) for a, b in itertools.pairwise(ended)]
                step[run.__name__].append(statistics.median(each[1:]))
                first[run.__name__].append(each[0])
    ratios = [ours / hand for hand, ours in zip(step["by_hand"], step["by_fit"], strict=True)]
    return {
        "width": width,
        "steps": steps,
        "repetitions": repetitions,
        "hand_ms": round(statistics.median(step["by_hand"]), 3),
        "fit_ms": round(statistics.median(step["by_fit"]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "lowest": round(min(ratios), 4),
        "highest": round(max(ratios), 4),
        "more_at_the_start_ms": round(statistics.median(first["by_fit"]) - statistics.median(first["by_hand"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=13)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loop.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(width, steps, options.repetitions) for width, steps in ((128, 100), (512, 60), (768, 40))]
    print(f"{'width':>6} {'by hand':>10} {'fit':>10} {'ratio':>7}  {'(range)':<15} {'more at the start':>18}")
    for row in rows:
        spread = f"({row['lowest']:.3f}-{row['highest']:.3f})"
        times = f"{row['hand_ms']:>7.2f} ms {row['fit_ms']:>7.2f} ms {row['ratio']:>7.3f}"
        print(f"{row['width']:>6} {times}  {spread:<15} {row['more_at_the_start_ms']:>15.1f} ms")
    record = {"rows": rows, "torch": torch.__version__, "python": platform.python_version(), "threads": 1}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
