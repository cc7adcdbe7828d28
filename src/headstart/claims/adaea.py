"""Weighing surrogates by whether their steps harm the others restores transfer when one of them is badly scaled."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor, nn

from headstart.attack.adaea import PAPER as PAPER
from headstart.attack.adaea import AdaEA
from headstart.attack.ensemble import fused
from headstart.attack.mifgsm import MIFGSM
from headstart.core.ascent import misclassify
from headstart.core.claim import Claim

from .transfer_attack_baselines import ENSEMBLES, RADIUS, fooled, sharper, trained

ADAPTIVE = ("AdaEA", "AdaEA, weights per batch")
HELD_OUT, TOGETHER = "held-out models fooled", "share of ensembles with a positive rank correlation"
_SETTING = ": UCI digits, radius 0.15, mean of three ensembles."
CLAIMS = tuple(
    claim
    for arm in ADAPTIVE
    for claim in (
        Claim(says=f"With six times larger logits of the transformer, {arm} fools held-out models at least six points "
              "more than averaged logits" + _SETTING,
              metric=HELD_OUT, better=f"{arm}, one sharper", than="logits, one sharper", by=0.06, seeds=3),
        Claim(says=f"With six times larger logits of the transformer, {arm} gains three points (less refutes it).",
              metric=HELD_OUT, better=f"{arm}, one sharper", than="logits, one sharper", by=0.03, seeds=3),
        Claim(says=f"With six times larger logits of the transformer, {arm} loses at most three points to averaged "
              "probabilities.",
              metric=HELD_OUT, better=f"{arm}, one sharper", than="probabilities, one sharper", by=-0.03, seeds=3),
        Claim(says=f"With members as they are, {arm} is at most three points below averaged logits.",
              metric=HELD_OUT, better=arm, than="logits", by=-0.03, seeds=3),
        Claim(says=f"With members as they are, {arm} is at most three points above averaged logits.",
              metric=HELD_OUT, better="logits", than=arm, by=-0.03, seeds=3),
        Claim(says=f"The mean weight of a member by {arm} and how often its own perturbations fool held-out models "
              "rise together (Spearman > 0) in at least eight of nine ensembles.",
              metric=TOGETHER, better=arm, than="eight of nine", seeds=3),
    )
)  # fmt: skip

NOTE = (
    "Weights of each example by itself, which make it independent of its batch, do not do what the paper's weights per "
    "batch do. Of all examples and steps in seed 0 with one sharper member, that member is still sure of half (its "
    "loss is below 1 after its own step). There the others' steps leave it near zero, so that their ratios are near "
    "zero and it gets 0.7 to 0.95 of the weight; on the other half it gets 0.15 to 0.22. Mean losses over a batch are "
    "those of that other half. Averaged probabilities do better with a sharper member than in the card's pilot, and "
    "with weights per batch that member keeps so much weight (0.07 to 0.23, times six) that it is the loudest or near "
    "it. With a hardened member in place of the first (ensemble 1, seed 0): 0.423 in logits, 0.392 with weights per "
    "example, 0.407 per batch."
)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Means over three ensembles of three, each judged by the five models outside it."""
    models, x, y = trained(seed)
    attack = MIFGSM(radius=RADIUS)
    sources = {name for ensemble in ENSEMBLES for name in ensemble}
    alone = {name: attack.perturb(x, [misclassify(models[name], y)]) for name in sorted(sources)}
    found: dict[str, list[float]] = {}
    signs: dict[str, list[float]] = {arm: [] for arm in ADAPTIVE}
    shares: dict[str, dict[str, float]] = {arm: {} for arm in ADAPTIVE}
    for e, ensemble in enumerate(ENSEMBLES):
        own = {name: models[name] for name in ensemble}
        victims = [model for name, model in models.items() if name not in ensemble]
        for suffix, members in {"": list(own.values()), ", one sharper": sharper(own)}.items():
            moved = {
                "logits": attack.perturb(x, [fused(members, y)]),
                "probabilities": attack.perturb(x, [fused(members, y, by="probabilities")]),
            }
            for arm in ADAPTIVE:
                moved[arm], weights = _adaptive(members, x, y, per_sample=arm == "AdaEA")
                shares[arm] |= {f"weight of {n} in ensemble {e}{suffix}": w for n, w in zip(own, weights, strict=True)}
                if not suffix:
                    success = [fmean(fooled(victims, x, alone[name], y)) for name in ensemble]
                    signs[arm].append(float(_spearman(weights, success) > 0))
            for arm, inputs in moved.items():
                found.setdefault(arm + suffix, []).append(fmean(fooled(victims, x, inputs, y)))
    arms = {arm: {HELD_OUT: fmean(values)} for arm, values in found.items()}
    for arm in ADAPTIVE:
        arms[arm] |= {TOGETHER: fmean(signs[arm]), **shares[arm]}
    just_below = 8 / 9 - 1e-6  # a claim asks for more than what it is compared with
    return arms | {"eight of nine": {TOGETHER: just_below}}


def _adaptive(members: list[nn.Module], x: Tensor, y: Tensor, *, per_sample: bool) -> tuple[Tensor, list[float]]:
    """The pictures are grey, so that there is nothing to filter."""
    attack = AdaEA(radius=RADIUS, step_size=RADIUS / 10, decay=1.0, drf=None, per_sample=per_sample)
    moved, fusion = attack.traced(x, [misclassify(model, y) for model in members])
    return moved, fusion.weights.mean((0, 2)).tolist()


def _spearman(a: list[float], b: list[float]) -> float:
    ranks = torch.tensor([a, b]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])
