"""Every attack of the family carries over from one network to another better than noise of the same size."""

from __future__ import annotations

import torch
from torch import nn

from headstart.attack import DIFGSM, FGSM, MIFGSM, NIFGSM, PGD, SIFGSM, TIFGSM, VMIFGSM
from headstart.attack.mifgsm import PAPER as PAPER
from headstart.core.ascent import Attack, misclassify
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import CrossEntropy, Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.testing.material import digits

METHODS = (
    "attack.difgsm", "attack.fgsm", "attack.nifgsm", "attack.pgd", "attack.sifgsm", "attack.tifgsm", "attack.vmifgsm",
)  # fmt: skip
RADIUS = 0.15
ATTACKS: dict[str, Attack] = {
    "FGSM": FGSM(radius=RADIUS), "PGD": PGD(radius=RADIUS), "MI-FGSM": MIFGSM(radius=RADIUS),
    "NI-FGSM": NIFGSM(radius=RADIUS), "SI-FGSM": SIFGSM(radius=RADIUS), "DI-FGSM": DIFGSM(radius=RADIUS),
    "TI-FGSM": TIFGSM(radius=RADIUS, size=3), "VMI-FGSM": VMIFGSM(radius=RADIUS, neighbours=5),
}  # fmt: skip
CLAIMS = tuple(
    Claim(says=f"{name} on a convolutional network fools a perceptron at least ten points more often than "
          "random signs.", metric="fooled", better=name, than="random signs", by=0.1, seeds=3)
    for name in ATTACKS
)  # fmt: skip


def run(seed: int) -> dict[str, dict[str, float]]:
    """Two networks on 1,200 digits; of 200 others, the share the perceptron gets right and then wrong."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:1400]
    models = []
    with seeded(seed):
        shapes = (
            nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        )
    for model in shapes:
        plan = Plan(model=model, stream=Batches(x=x[train], y=y[train], batch_size=64, seed=seed), steps=300,
                    terms={"task": CrossEntropy()}, optimizer=adamw(2e-3), schedule=cosine)  # fmt: skip
        models.append(freeze(fit(plan, device="cpu", seed=seed).model).eval())
    surrogate, victim = models
    x, y = x[test], y[test]
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    moved = {name: attack.perturb(x, [misclassify(surrogate, y)]) for name, attack in ATTACKS.items()}
    moved["random signs"] = (x + RADIUS * signs).clamp(0, 1)
    right = victim(x).argmax(1) == y
    return {
        name: {"fooled": float((victim(found).argmax(1) != y)[right].float().mean())} for name, found in moved.items()
    }
