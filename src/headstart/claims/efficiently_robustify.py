"""A large model tuned in its last layers, under a small robust teacher, bears worse inputs and keeps the clean ones."""

from __future__ import annotations

from statistics import fmean
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.distill.efficiently_robustify import PAPER as PAPER
from headstart.distill.efficiently_robustify import Robustify
from headstart.distill.three_heads import HEADS, ThreeHeads, head_report
from headstart.testing.material import digits

CLAIMS = (
    Claim(says="UCI digits: accuracy on clean inputs stays within half a point of the original large model's.",
          metric="clean", better="robustified", than="original", by=-0.005, seeds=4),
    Claim(says="On corruptions like those of training (noise, a missing patch) it is higher by two points or more.",
          metric="seen", better="robustified", than="original", by=0.02, seeds=4),
    Claim(says="On others (blur, low contrast, salt and pepper) it is higher.",
          metric="unseen", better="robustified", than="original", seeds=4),
    Claim(says="Clean accuracy is above that of the whole model fine-tuned on augmented inputs alone.",
          metric="clean", better="robustified", than="all tuned", seeds=4),
    Claim(says="On the corruptions of training it is no worse than its small teacher.",
          metric="seen", better="robustified", than="teacher", by=-1e-9, seeds=4),
)  # fmt: skip

NOTE = (
    "With 1,000 instead of 1,297 digits to train on the third statement failed on seed 0 (0.801 against 0.818). "
    "Entropy takes the clean head for 85 percent of the corruptions of training, where the unclean head is 2.7 "
    "points better; and at this size tuning everything is no slower and better on those corruptions."
)


def _noise(x: Tensor) -> Tensor:
    return (x + 0.35 * torch.randn_like(x)).clamp(0, 1)


def _patch(x: Tensor) -> Tensor:
    """A 3x3 square of each picture is black."""
    at, along = torch.randint(x.shape[3] - 2, (2, len(x), 1)), torch.arange(x.shape[3])
    rows, columns = ((along >= first) & (along < first + 3) for first in at)  # (n, 8)
    hole: Tensor = rows[:, None, :, None] & columns[:, None, None, :]
    return x * ~hole


def _seen(x: Tensor) -> Tensor:
    """Each picture with noise or without a patch."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, _noise(x), _patch(x))


def _salt(x: Tensor) -> Tensor:
    drawn = torch.rand_like(x)
    return torch.where(drawn < 0.075, 0.0, torch.where(drawn > 0.925, 1.0, x))


SEEN = {"noise": _noise, "patch": _patch}
UNSEEN = {
    "blur": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "low contrast": lambda x: 0.5 + 0.3 * (x - 0.5),
    "salt and pepper": _salt,
}


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def run(seed: int) -> dict[str, dict[str, float]]:
    """1,297 digits to train on, 500 to test; large: width 24, small: width 6; layer "6" and the heads are tuned."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1297], order[1297:]
    clean = Batches(x=x[train], y=y[train], batch_size=32, seed=seed)
    worse = Batches(x=x[train], y=y[train], batch_size=32, seed=seed, augment=_seen)
    both = Batches(
        x=x[train], y=y[train], batch_size=32, seed=seed,
        augment=lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, _seen(x)),
    )  # fmt: skip
    epoch = len(train) // 32

    def plan(model: nn.Module, stream: Batches, epochs: int) -> Plan:
        return Plan(model=model, stream=stream, steps=epochs * epoch, optimizer=adamw(1e-3))

    with seeded(seed):
        large, small = _convolutions(24), _convolutions(6)
    original = fit(plan(large, clean, 20), device="cpu", seed=seed).model
    teacher = fit(plan(small, both, 40), device="cpu", seed=seed).model
    method = Robustify(teacher, _seen, "6")
    tuned = fit(method(plan(original, clean, 15)), device="cpu", seed=seed)
    whole = fit(plan(original, worse, 15), device="cpu", seed=seed)
    with seeded(1000 + seed):
        tests = {
            "clean": [x[test]],
            "seen": [change(x[test]) for change in SEEN.values()],
            "unseen": [change(x[test]) for change in UNSEEN.values()],
        }

    def judged(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {name: fmean(float((model(some).argmax(1) == y[test]).double().mean()) for some in inputs)
                    for name, inputs in tests.items()}  # fmt: skip

    arms = {"original": original, "teacher": teacher, "robustified": tuned.model, "all tuned": whole.model}
    found = {arm: judged(model) for arm, model in arms.items()}
    for name, inputs in tests.items():
        reports = [head_report(cast(ThreeHeads, tuned.model), some, y[test]) for some in inputs]
        for k, head in enumerate(HEADS):
            arm = found.setdefault(f"{head} head", {})
            arm[name] = fmean((r.clean, r.unclean, r.combined)[k] for r in reports)
            arm[f"chosen on {name}"] = fmean(r.shares[k] for r in reports)
    found["robustified"]["seconds"], found["all tuned"]["seconds"] = tuned.seconds, whole.seconds
    return found
