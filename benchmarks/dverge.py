"""What an epoch of DVERGE through `fit` costs over a hand-written one: the same training, interleaved, one thread.

    python benchmarks/dverge.py

Three convolutional members on 1,200 digits, 10 steps a distillation, the layer drawn anew each epoch; features are cut
out of the hand-written model by slicing, so neither side computes what lies behind the layer. Ratios are of processor
seconds within a pair of runs, the median over pairs; the losses of both must agree. Writes
benchmarks/results/dverge.json. The target is a ratio of at most 1.2.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches, Parts
from headstart.harden import DVERGE, Ensemble
from headstart.testing.material import digits

RADIUS, STEPS, LAYERS = 0.25, 10, ("0", "2", "4", "7")


def member() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def by_hand(
    models: list[nn.Sequential], source: Batches, target: Batches, depths: list[int], epoch: int
) -> list[float]:
    """The loop a person would write; the loss of each step."""
    models = copy.deepcopy(models)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for m in models]
    losses = []
    for step, s, t in zip(range(epoch * len(depths)), source, target, strict=False):
        made = []
        for model in models:
            trunk = model[: depths[step // epoch] + 1]
            with torch.no_grad():
                wanted = trunk(t.x)
            z, momentum = s.x.clone(), torch.zeros_like(s.x)
            for _ in range(STEPS):
                z.requires_grad_()
                slope = torch.autograd.grad(-F.mse_loss(trunk(z), wanted), z)[0]
                momentum = momentum + slope / slope.abs().flatten(1).sum(1).clamp_min(1e-12).view(-1, 1, 1, 1)
                z = z.detach() + RADIUS / STEPS * momentum.sign()
                z = (s.x + (z - s.x).clamp(-RADIUS, RADIUS)).clamp(0, 1)
            made.append(z)
        total = 0.0
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss = torch.stack([F.cross_entropy(model(z), s.y) for j, z in enumerate(made) if j != i]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dverge.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = digits()
    epoch = 1200 // 64
    with seeded(0):
        models = [member() for _ in range(3)]
    source = Batches(x=x[:1200], y=y[:1200], batch_size=64)
    plan = Plan(model=Ensemble(models), stream=source, steps=options.epochs * epoch, optimizer=adamw(1e-3))
    made = DVERGE(radius=RADIUS, steps=STEPS, layers=LAYERS, seed=2)(plan)
    assert isinstance(made.stream, Parts)
    target = made.stream.streams["target"]
    assert isinstance(target, Batches)
    depths = [int(names[0]) for names in made.terms["task"].rounds]
    seconds: dict[str, list[float]] = {"fit": [], "hand": []}
    worst = 0.0
    for _ in range(options.pairs + 1):
        began = time.process_time()
        mine = fit(made, device="cpu").history["task"]
        between = time.process_time()
        theirs = by_hand(models, source, target, depths, epoch)
        seconds["fit"].append(between - began)
        seconds["hand"].append(time.process_time() - between)
        worst = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    pairs = list(zip(*(each[1:] for each in seconds.values()), strict=True))  # the first pair warms up
    record = {
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "ratios": [round(a / b, 3) for a, b in pairs],
        **{
            f"{name}_s_an_epoch": round(statistics.median(each[1:]) / options.epochs, 3)
            for name, each in seconds.items()
        },
        "layers": [str(depth) for depth in depths],
        "largest_difference_of_losses": float(f"{worst:.2g}"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
