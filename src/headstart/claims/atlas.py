"""Coefficients per tensor carry task vectors to an unseen transformation of digits, from one example a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batch, Batches
from headstart.merge.atlas import PAPER as PAPER
from headstart.merge.atlas import Atlas
from headstart.merge.finetuning_transfer import diff_vector
from headstart.merge.keep_best import clipped
from headstart.testing.material import digits

CLAIMS = (
    Claim(
        says="Near target, one shot: blocks beat fine-tuning all weights.",
        metric="near, 1 shot",
        better="blocks",
        than="fine-tuning",
        seeds=4,
    ),
    Claim(
        says="Near target, one shot: blocks beat fine-tuning in most seeds.",
        metric="near, 1 shot: beats fine-tuning",
        better="blocks",
        than="half",
        seeds=4,
    ),
    Claim(
        says="Near target, four shots: blocks beat fine-tuning all weights.",
        metric="near, 4 shots",
        better="blocks",
        than="fine-tuning",
        seeds=4,
    ),
    Claim(
        says="Near target, four shots: blocks beat fine-tuning in most seeds.",
        metric="near, 4 shots: beats fine-tuning",
        better="blocks",
        than="half",
        seeds=4,
    ),
    Claim(
        says="Far target, four shots: blocks beat one coefficient a vector by at least ten points.",
        metric="far, 4 shots",
        better="blocks",
        than="isotropic",
        by=0.1,
        seeds=4,
    ),
    Claim(
        says="Far target, sixteen shots: blocks beat one coefficient a vector by at least ten points.",
        metric="far, 16 shots",
        better="blocks",
        than="isotropic",
        by=0.1,
        seeds=4,
    ),
)
NOTE = ""
SHOTS = {"near": (1, 4, 16), "far": (4, 16)}
Look = Callable[[Tensor], Tensor]


def run(seed: int) -> dict[str, dict[str, float]]:
    """A base on upright digits, seven models on changed ones, and a shift along both axes that none has seen."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    with seeded(seed):
        fresh = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def tuned(model: nn.Module, look: Look) -> nn.Module:
        stream = Batches(x=look(x[train]), y=y[train], batch_size=128, seed=seed)
        return fit(Plan(model=model, stream=stream, steps=300, optimizer=adamw(1e-3)), device="cpu").model

    base = tuned(fresh, lambda x: x)
    turns = {
        look.__name__: diff_vector(tuned(base, look).state_dict(), base.state_dict())
        for look in (_left, _over, _right, _inverted)
    }
    found: dict[str, dict[str, float]] = {arm: {} for arm in ("base", "blocks", "isotropic", "fine-tuning", "half")}
    for target, pixels in (("near", 1), ("far", 2)):
        shifts = {f"{move}": diff_vector(tuned(base, _shift(*move)).state_dict(), base.state_dict())
                  for move in ((pixels, 0), (-pixels, 0), (0, pixels))}  # fmt: skip
        look = _shift(pixels, pixels)
        found["base"][target] = _accuracy(base, look(x[test]), y[test])
        for k in SHOTS[target]:
            few = train[_few(y[train], k, seed)]
            scores = _adapted(base, {**turns, **shifts}, look(x[few]), y[few])
            of = f"{target}, {k} shot{'s' * (k > 1)}"
            for arm, model in scores.items():
                found[arm][of] = _accuracy(model, look(x[test]), y[test])
            found["blocks"][f"{of}: beats fine-tuning"] = float(found["blocks"][of] > found["fine-tuning"][of])
            found["half"][f"{of}: beats fine-tuning"] = 0.5
    return found


def _adapted(
    base: nn.Module, vectors: Mapping[str, Mapping[str, Tensor]], x: Tensor, y: Tensor
) -> dict[str, nn.Module]:
    """Coefficients in 120 full batches at 0.1 with a cosine; all weights in 200 at 1e-3."""
    whole = Plan(model=base, stream=[Batch(x, y)], steps=200, optimizer=adamw(1e-3))
    mixed = replace(whole, steps=120, optimizer=clipped(adamw(0.1, weight_decay=0.1)), schedule=cosine)
    plans = {
        "blocks": mixed.under(Atlas(vectors=vectors)),
        "isotropic": mixed.under(Atlas(vectors=vectors, blocks="model")),
        "fine-tuning": whole,
    }
    return {arm: fit(plan, device="cpu").model for arm, plan in plans.items()}


def _few(labels: Tensor, k: int, seed: int) -> Tensor:
    """Positions of k examples of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + 100))
    return torch.cat([order[labels[order] == label][:k] for label in range(10)])


def _left(x: Tensor) -> Tensor:
    return x.rot90(1, (2, 3))


def _over(x: Tensor) -> Tensor:
    return x.rot90(2, (2, 3))


def _right(x: Tensor) -> Tensor:
    return x.rot90(3, (2, 3))


def _inverted(x: Tensor) -> Tensor:
    return 1 - x


def _shift(down: int, right: int) -> Look:
    return lambda x: x.roll((down, right), (2, 3))


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())
