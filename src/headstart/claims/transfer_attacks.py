"""Every attack of the family carries over from one network to another better than noise of the same size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
CLAIMS = (
    *(
        Claim(says=f"{name} on a convolutional network fools a perceptron at least ten points more often than "
              "random signs.", metric="fooled", better=name, than="random signs", by=0.1, seeds=3)
        for name in ATTACKS
    ),
    Claim(says="PGD fools the network it is made on as often, to two points, when its logits are a hundred times "
          "larger, which changes no answer.", metric="white box", better="sure", than="as trained", by=-0.02, seeds=3),
    Claim(says="By the softmax of float32 it would be fooled at least thirty points less often, and seem robust.",
          metric="white box", better="sure", than="sure, plain softmax", by=0.3, seeds=3),
)  # fmt: skip


class Times(nn.Module):
    """Logits times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


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
    sure = nn.Sequential(surrogate, Times(100))
    plain = PGD(radius=RADIUS).perturb(x, [lambda a: F.cross_entropy(sure(a), y, reduction="none")])
    home = {
        "as trained": moved["PGD"],
        "sure": PGD(radius=RADIUS).perturb(x, [misclassify(sure, y)]),
        "sure, plain softmax": plain,
    }
    own = surrogate(x).argmax(1) == y
    return {
        name: {"white box": float((surrogate(found).argmax(1) != y)[own].float().mean())}
        for name, found in home.items()
    } | {name: {"fooled": float((victim(found).argmax(1) != y)[right].float().mean())} for name, found in moved.items()}
