"""What moves one model's features leaves another model alone until the two are aligned; what moves inputs does not."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from statistics import fmean

import torch
from torch import Tensor, nn

from headstart.attack.pgd import PGD
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.measure.representation_vs_data_space import PAPER as PAPER
from headstart.measure.representation_vs_data_space import SpaceTransfer, representation_vs_data_space
from headstart.measure.split import Split
from headstart.testing.material import digits

LAYER = "3"  # Linear(128, 64), before the ReLU
ATTACK = PGD(radius=0.1, steps=10, random_start=False)
CLAIMS = (
    Claim(says="A displacement of features by a quarter of their length fools its own model at least 60 % of the time: "
          "perceptrons on UCI digits, 20 steps.", metric="fooled", better="home", than="0.6", by=0.0, seeds=3),
    Claim(says="The same displacement fools models of other seeds within three points as often as a random direction.",
          metric="nearness to random", better="raw", than="chance", by=-0.03, seeds=3),
    Claim(says="It fools an exactly rotated copy of its own model within three points as often as a random direction.",
          metric="nearness to random", better="raw, rotated copy", than="chance", by=-0.03, seeds=3),
    Claim(says="It fools models of other seeds at most 0.3 times as often as its own.",
          metric="fooled", better="0.3 of home", than="raw", seeds=3),
    Claim(says="Perturbed inputs as strong at home (within five points) fool models of other seeds at least half as "
          "often.", metric="fooled", better="data", than="half of data at home", seeds=3),
    Claim(says="They fool the rotated copy exactly as often as the model itself, to half a point.",
          metric="nearness to home", better="data, rotated copy", than="chance", by=-0.005, seeds=3),
    Claim(says="Turned by the rotation between the features of 1,200 unlabelled inputs, the displacement fools models "
          "of other seeds at least half as often as its own.",
          metric="fooled", better="aligned", than="half of home", seeds=3),
    Claim(says="So turned, it fools the rotated copy exactly as often as its own model, to half a point.",
          metric="nearness to home", better="aligned, rotated copy", than="chance", by=-0.005, seeds=3),
    Claim(says="Features alike under every rotation say nothing of raw transfer: linear CKA with the copy is 1.",
          metric="nearness to 1", better="CKA, rotated copy", than="chance", by=-1e-4, seeds=3),
)  # fmt: skip


def _perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def rotated(model: nn.Module, seed: int) -> nn.Module:
    """The same function, its features turned: M e and h ∘ M⁻¹ for a random rotation M."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    layers = list(model.children())
    old, new, back = layers[3], nn.Linear(128, 64), nn.Linear(64, 64, bias=False)
    assert isinstance(old, nn.Linear)
    with torch.no_grad():
        new.weight.copy_(turn @ old.weight.double())
        new.bias.copy_(turn @ old.bias.double())
        back.weight.copy_(turn.T)
    return freeze(nn.Sequential(*layers[:3], new, back, *layers[4:])).eval()


def run(seed: int) -> dict[str, dict[str, float]]:
    """Three perceptrons on 1,200 digits and a rotated copy of the first; the other 597 are moved."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:]
    models = [_trained(x[train], y[train], 10 * seed + k) for k in range(3)]

    def study(source: nn.Module, **targets: nn.Module) -> tuple[list[SpaceTransfer], list[float]]:
        divided = {name: Split(model, LAYER) for name, model in targets.items()}
        found = representation_vs_data_space(
            Split(source, LAYER), divided, x[test], y[test], x[train],
            lambda radius: replace(ATTACK, radius=radius).perturb, relative=[0.25], seed=seed,
        )  # fmt: skip
        return list(found.rows), [found.likeness[row.target].cka for row in found.rows]

    others = [study(models[i], other=models[j])[0][0] for i, j in permutations(range(3), 2)]
    (copy,), (cka,) = study(models[0], copy=rotated(models[0], seed))
    assert copy.raw is not None
    home, data_home = fmean(row.home for row in others), fmean(row.data_home for row in others)
    raw = fmean(row.raw or 0.0 for row in others)
    return {
        "home": {"fooled": home},
        "0.6": {"fooled": 0.6},
        "half of home": {"fooled": home / 2},
        "0.3 of home": {"fooled": 0.3 * home},
        "raw": {"fooled": raw, "nearness to random": -fmean(abs((row.raw or 0.0) - row.random) for row in others)},
        "raw, rotated copy": {"fooled": copy.raw, "nearness to random": -abs(copy.raw - copy.random)},
        "random": {"fooled": fmean(row.random for row in others)},
        "random, rotated copy": {"fooled": copy.random},
        "data": {"fooled": fmean(row.data for row in others), "radius": fmean(row.radius for row in others),
                 "matched": fmean(row.matched for row in others)},
        "half of data at home": {"fooled": data_home / 2},
        "data, rotated copy": {"fooled": copy.data, "nearness to home": -abs(copy.data - copy.data_home)},
        "aligned": {"fooled": fmean(row.procrustes for row in others)},
        "aligned by ridge": {"fooled": fmean(row.ridge for row in others)},
        "aligned, rotated copy": {"fooled": copy.procrustes, "nearness to home": -abs(copy.procrustes - copy.home)},
        "CKA, rotated copy": {"nearness to 1": -abs(1 - cka)},
        "chance": {"nearness to random": 0.0, "nearness to home": 0.0, "nearness to 1": 0.0},
    }  # fmt: skip


def _trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    with seeded(seed):
        fresh = _perceptron()
    plan = Plan(model=fresh, stream=Batches(x=x, y=y, batch_size=64, seed=seed), steps=600, optimizer=adamw(2e-3),
                schedule=cosine)  # fmt: skip
    return freeze(fit(plan, device="cpu", seed=seed).model).eval()
