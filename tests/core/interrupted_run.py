"""Run by test_interrupted: a slow training that writes checkpoints, so that it can be killed in mid-flight."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.stream import Batches


def plan() -> Plan:
    """Dropout, batch statistics and an augmentation, so that all random state matters."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    torch.random.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 2))
    stream = Batches(x=x, y=(x[:, 0] > 0).long(), batch_size=16, augment=lambda t: t + 0.1 * torch.randn_like(t))
    return Plan(model=model, stream=stream, steps=40, optimizer=adamw(0.01))


def slow(_done: int, _total: int) -> None:
    """Time to be killed in."""
    time.sleep(0.05)


if __name__ == "__main__":
    fit(plan(), device="cpu", checkpoint=Path(sys.argv[1]), every=1, progress=slow)
