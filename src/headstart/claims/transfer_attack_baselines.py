"""Attacks on several surrogates carry over best when their logits are averaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.attack.ensemble import fused
from headstart.attack.mifgsm import MIFGSM
from headstart.attack.mifgsm import PAPER as PAPER
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.harden import AdversarialTraining
from headstart.nets.patches import PatchTransformer
from headstart.testing.material import digits

from .transfer_attacks import Times

METHODS = ("attack.mifgsm",)
RADIUS = 0.15
HARDEN = AdversarialTraining(radius=RADIUS, steps=4, step_size=RADIUS / 4, random_start=False)
CLAIMS = (
    *(
        Claim(says="Three surrogates fused in logits fool held-out models at least eight points more often than when "
              f"fused in {way}: UCI digits, radius 0.15, mean of three ensembles.",
              metric="fooled", better="logits", than=way, by=0.08, seeds=3)
        for way in ("loss", "probabilities")
    ),
    *(
        Claim(says=f"Random signs of the same size fool at least ten points less often than an attack fused in {way}.",
              metric="fooled", better=way, than="random signs", by=0.1, seeds=3)
        for way in ("loss", "probabilities")
    ),
    Claim(says="Averaged logits lose at least ten points when those of the transformer are six times larger.",
          metric="fooled", better="logits", than="logits, one sharper", by=0.1, seeds=3),
    *(
        Claim(says=f"Fused in {way}, six times larger logits of the transformer gain at least five points.",
              metric="fooled", better=f"{way}, one sharper", than=way, by=0.05, seeds=3)
        for way in ("loss", "probabilities")
    ),
)  # fmt: skip
NOTE = (
    "The order of the paper holds in every seed, the eight points do not. Neither longer training (1,200 steps, seed "
    "0, without the hardened model: 0.532 in logits, 0.482 in loss, 0.522 in probabilities) nor three times sharper "
    "logits (400 steps: 0.457, 0.430, 0.474) opens the gap. Which member is made sharper matters: with "
    "the perceptron in the third ensemble averaged logits lose 11 points and the others gain 3.6 and 3.8."
)
WAYS: tuple[Literal["logits", "loss", "probabilities"], ...] = ("logits", "loss", "probabilities")
ENSEMBLES = (
    ("convolutions", "perceptron", "attention"),
    ("convolutions", "residual", "attention"),
    ("convolutions", "attention, 4x4 patches", "perceptron"),
)


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.inner(x))


def _convolutions(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, size, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, size, padding="same"),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def _residual() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), _Residual(block), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


def _perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: _convolutions(3),
    "convolutions 5x5": lambda: _convolutions(5),
    "residual": _residual,
    "perceptron": lambda: _perceptron(128),
    "perceptron, deeper": lambda: _perceptron(96, 64),
    "attention": lambda: PatchTransformer(10),
    "attention, 4x4 patches": lambda: PatchTransformer(10, patch=4),
    "convolutions, hardened": lambda: _convolutions(3),
}


@cache
def trained(seed: int) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The eight models after 400 steps on 1,200 digits; the other 597 and their classes."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    stream, models = Batches(x=x[train], y=y[train], batch_size=64, seed=seed), {}
    for k, (name, make) in enumerate(MODELS.items()):
        with seeded(10 * seed + k):
            plan = Plan(model=make(), stream=stream, steps=400, optimizer=adamw(2e-3), schedule=cosine)
        models[name] = freeze(fit(HARDEN(plan) if "hardened" in name else plan, device="cpu", seed=seed).model).eval()
    return models, x[test], y[test]


def sharper(members: dict[str, nn.Module]) -> list[nn.Module]:
    """The members, the transformer among them with six times larger logits."""
    return [nn.Sequential(model, Times(6)) if "attention" in name else model for name, model in members.items()]


def fooled(victims: list[nn.Module], x: Tensor, moved: Tensor, y: Tensor) -> list[float]:
    """Of the examples that each victim gets right, the share that it then gets wrong."""
    pairs = [(victim(x).argmax(1) == y, victim(moved).argmax(1) != y) for victim in victims]
    return [float(wrong[right].float().mean()) for right, wrong in pairs]


def run(seed: int) -> dict[str, dict[str, float]]:
    """Of three ensembles of three, how often the five models outside each are fooled, mean."""
    models, x, y = trained(seed)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    scores: dict[str, list[float]] = {}
    for ensemble in ENSEMBLES:
        members, victims = {n: models[n] for n in ensemble}, [m for n, m in models.items() if n not in ensemble]
        moved: dict[str, Tensor] = {"random signs": (x + RADIUS * signs).clamp(0, 1)}
        for by in WAYS:
            moved[by] = MIFGSM(radius=RADIUS).perturb(x, [fused(list(members.values()), y, by=by)])
            moved[f"{by}, one sharper"] = MIFGSM(radius=RADIUS).perturb(x, [fused(sharper(members), y, by=by)])
        for arm, found in moved.items():
            scores.setdefault(arm, []).append(fmean(fooled(victims, x, found, y)))
    return {arm: {"fooled": fmean(values)} for arm, values in scores.items()}
