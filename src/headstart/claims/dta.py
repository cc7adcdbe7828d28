"""What was made on a pretrained base alone, without labels, fools the models fine-tuned from it: they inherit."""

from __future__ import annotations

import string
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.attack.dta import DTA
from headstart.attack.dta import PAPER as PAPER
from headstart.attack.pgd import PGD
from headstart.core.ascent import misclassify
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze, with_head
from headstart.harden.adversarial_training import AdversarialTraining
from headstart.measure.inheritance import SCRATCH, SIGNS, Inheritance, inheritance
from headstart.testing.material import digits
from headstart.worlds import glyphs

RADII = (0.1, 0.15)
LAYERS = tuple(f"blocks.{k}" for k in range(4))
FULL, PROBE = "success on full fine-tuning", "success on linear probe"
CLAIMS = (
    Claim(says="DTA at its best layer fools the fine-tuned model 15 points more often than random signs do: base of "
          "glyphs, UCI digits, radius 0.1 and 0.15, 20 steps.",
          metric=FULL, better="DTA, best layer", than=SIGNS, by=0.15, seeds=3),
    Claim(says="It fools the linear probe 30 points more often than random signs do.",
          metric=PROBE, better="DTA, best layer", than=SIGNS, by=0.3, seeds=3),
    Claim(says="What it adds to random signs is more on the fine-tuned model than on one trained from scratch.",
          metric="excess over random signs", better="full fine-tuning", than=SCRATCH, seeds=3),
    Claim(says="What it adds to random signs is more on the linear probe than on the model from scratch.",
          metric="excess over random signs", better="linear probe", than=SCRATCH, seeds=3),
    Claim(says="On the fine-tuned model it is no worse than PGD on the base's cross-entropy with its own answers.",
          metric=FULL, better="DTA, best layer", than="PGD on the base", seeds=3),
    Claim(says="Adversarial fine-tuning with DTA on half of each batch, other seed and radius, halves its success.",
          metric="success of DTA, negative", better="hardened", than="half of plain", seeds=3),
)  # fmt: skip

NOTE = (
    "The best of four layers is taken for each victim and radius with hindsight, as in the card's pilot; 'lowest' and "
    "'shallowest within' choose without a victim. blocks.N is the similarity of a victim's clean tokens to the base's."
)


class ViT(nn.Module):
    """Patches of 4x4, four blocks of width 48, the mean token."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in LAYERS
        ])  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT + self.place)).mean(1))
        return logits


def run(seed: int) -> dict[str, dict[str, float]]:
    """5,000 glyphs for the base; 1,200 digits to train on, 150 others to judge with; means of two radii."""
    with seeded(seed):
        fresh, scratch = ViT(36), ViT(10)

    def plan_of(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> Plan:
        return Plan(model=model, stream=Batches(x=x, y=y, batch_size=64, seed=seed), steps=epochs * (len(y) // 64),
                    optimizer=adamw(lr), schedule=cosine)  # fmt: skip

    learnt = fit(
        plan_of(fresh, *glyphs.loose(5000, seed, classes=string.ascii_uppercase + string.digits, size=16), 7, 2e-3),
        device="cpu",
        seed=seed,
    ).model
    base, (x, y) = freeze(learnt).eval(), digits()
    x = F.interpolate(x, size=16, mode="bilinear").clamp(0, 1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    (train_x, train_y), (test_x, test_y) = ((x[rows], y[rows]) for rows in (order[:1200], order[1200:1350]))
    probe = with_head(base, 10)
    tune = plan_of(with_head(learnt, 10), train_x, train_y, 8, 1e-3)
    attack = DTA(encoder=base, layers=LAYERS[1:2], radius=0.12, steps=6)
    plans = {
        "full fine-tuning": tune,
        "linear probe": plan_of(probe, train_x, train_y, 12, 1e-2),
        "hardened": AdversarialTraining(attack=attack, share=0.5)(tune),
        SCRATCH: plan_of(scratch, train_x, train_y, 15, 2e-3),
    }
    victims = {name: fit(plan, device="cpu", seed=seed).model for name, plan in plans.items()}
    reports = [_judged(base, dict(victims), test_x, test_y, radius) for radius in RADII]
    rates = torch.stack([r.matrix.success for r in reports])  # (radii, sources, victims)
    rates = torch.cat([rates, rates[:, : len(LAYERS)].amax(1, keepdim=True)], 1).mean(0)
    found = {
        source: {f"success on {victim}": rate for victim, rate in zip(victims, row, strict=True)}
        for source, row in zip((*reports[0].matrix.surrogates, "DTA, best layer"), rates.tolist(), strict=True)
    }
    for j, victim in enumerate(victims):
        found[victim] = {
            "excess over random signs": float(rates[-1, j] - rates[-2, j]),
            "success of DTA, negative": -float(rates[-1, j]),
            "clean accuracy": float(reports[0].matrix.clean[j]),
        }
        found[victim] |= dict(zip(LAYERS, reports[0].similarity[j].tolist(), strict=True))  # to the base: the drift
    found["half of plain"] = {"success of DTA, negative": -float(rates[-1, 0]) / 2}
    return found


def _judged(base: nn.Module, victims: dict[str, nn.Module], x: Tensor, y: Tensor, radius: float) -> Inheritance:
    """Each layer, the choices among them, PGD on the base, and PGD on the fine-tuned victim as the ceiling."""
    attack = DTA(encoder=base, layers=LAYERS, radius=radius, seed=1)
    layers = {f"DTA at {name}": replace(attack, layers=(name,)).perturb(x) for name in LAYERS}
    scores = attack.probe(x)
    chosen = {"DTA, lowest": attack.chosen(scores),
              "DTA, shallowest within": replace(attack, select="shallowest_within").chosen(scores)}  # fmt: skip
    pgd = PGD(radius=radius, steps=20, step_size=radius / 5, seed=1)
    moved = {
        **layers,
        **{name: torch.stack([*layers.values()])[choice, torch.arange(len(x))] for name, choice in chosen.items()},
        "PGD on the base": pgd.perturb(x, [misclassify(base, base(x).argmax(1))]),
        "white box": pgd.perturb(x, [misclassify(victims["full fine-tuning"], y)]),
    }
    return inheritance(moved, victims, x, y, base=base, scratch=victims.pop(SCRATCH), layers=LAYERS, radius=radius,
                       resamples=1)  # fmt: skip
