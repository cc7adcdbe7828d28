"""Aligning clusters of tokens beside whole features brings other encoders' tokens nearer to the reference too."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor, nn

from headstart.attack.alignment import HeldOut, held_out
from headstart.attack.foa import FOA
from headstart.attack.foa import PAPER as PAPER
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.worlds import glyphs

RADIUS, PAIRS, CLUSTERS = 0.2, 48, 4
SIGNIFICANT = 54.5 / 96  # 55 of 96 or more: one-sided sign test p = 0.0925, 54: p = 0.130
CLAIMS = (
    *(
        Claim(says=f"Aligning {arm} on three encoders raises the cosine of a fourth's feature with the reference by "
              f"at least 0.1 over {than}: small vision transformers, glyphs of 16x16, radius 0.2, 48 pairs a seed.",
              metric="cosine", better=arm, than=than, by=0.1, seeds=2)
        for arm in ("global", "global and local") for than in ("clean", "noise")
    ),
    Claim(says="With the clusters the fourth encoder's transport similarity is higher than without.",
          metric="transport", better="global and local", than="global", seeds=2),
    Claim(says="It is so in enough of 96 pairs for p < 0.1 in a sign test.",
          metric="share of pairs", better="global and local", than="p of 0.1", seeds=2),
    Claim(says="The cosine of the features is lower by at most 0.01.",
          metric="cosine", better="global and local", than="global", by=-0.01, seeds=2),
)  # fmt: skip
NOTE = (
    "54 of the 96 pairs gain where 55 were asked for: 30 of 48 with the first seed, 24 of 48 with the second. The gain "
    "is small beside what pairs differ by, and 96 pairs are few: on 96 others, looked at afterwards, the models of the "
    "second seed gain in 74 (+0.015). Clusters from ten starts in place of one change nothing. With 1,800 pictures to "
    "train on the first seed gained in 33 of 48. Weights that follow growth do as well as equal ones."
)


class Transformer(nn.Module):
    """Pictures (n, 1, 16, 16) to logits; `encoder` gives the [CLS] feature and the tokens of the patches."""

    def __init__(self, width: int, patch: int, depth: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(width, patch, depth), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x)[0])
        return logits


class Encoder(nn.Module):
    def __init__(self, width: int, patch: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn((16 // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature (n, d) and tokens (n, p, d)."""
        patches = self.patches(x).flatten(2).mT
        said = self.layers(torch.cat([self.first.expand(len(x), -1, -1), patches], 1) + self.place)
        return said[:, 0], said[:, 1:]


SHAPES = ((32, 4, 3), (48, 4, 3), (32, 4, 4), (40, 4, 4))
TRAIN, EPOCHS, BATCH = 1440, 20, 90
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ARMS = {
    "global": {"local": 0.0, "temperature": math.inf},
    "global and local": {"temperature": math.inf},
    "global and local, weighted": {},
}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Four transformers; 48 pictures are brought near 48 others on three of them and looked at by the fourth."""
    x, y = glyphs.boxed(TRAIN, 2 * seed, classes=CHARACTERS, size=16)
    test, labels = glyphs.boxed(36 * 8, 2 * seed + 1, classes=CHARACTERS, size=16)
    models = [_trained(x, y, shape, 10 * seed + k) for k, shape in enumerate(SHAPES)]
    accuracy = fmean(float((model(test).argmax(1) == labels).float().mean()) for model in models)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    source, reference = test[order[:PAIRS]], test[order[PAIRS : 2 * PAIRS]]
    encoders = [model.get_submodule("encoder") for model in models]
    found: dict[str, list[HeldOut]] = {arm: [] for arm in ARMS}
    for k, other in enumerate(encoders):
        members = tuple(encoder for encoder in encoders if encoder is not other)
        for arm, settings in ARMS.items():
            attack = FOA(encoders=members, reference=reference, radius=RADIUS, steps=30, step_size=RADIUS / 10,
                         clusters=CLUSTERS, crop=None, seed=seed, **settings)  # type: ignore[arg-type] # fmt: skip
            moved = attack.perturb(source)
            found[arm].append(held_out({"": other}, reference, source, moved, clusters=CLUSTERS, seed=k)[""])
    cosines = {arm: torch.stack([h.whole["after"] for h in told]) for arm, told in found.items()}
    transport = {arm: torch.stack([h.parts["after"] for h in told]) for arm, told in found.items()}
    for view, arm in (("before", "clean"), ("noise", "noise")):
        cosines[arm] = torch.stack([h.whole[view] for h in found["global"]])
        transport[arm] = torch.stack([h.parts[view] for h in found["global"]])
    wins = {arm: float((mean.mean(0) > transport["global"].mean(0)).float().mean()) for arm, mean in transport.items()}
    return {
        **{arm: {"cosine": float(cosines[arm].mean()), "transport": float(transport[arm].mean()),
                 "share of pairs": wins[arm]} for arm in cosines},
        "p of 0.1": {"share of pairs": SIGNIFICANT},
        "clean accuracy": {"accuracy": accuracy},
    }  # fmt: skip


def _trained(x: Tensor, y: Tensor, shape: tuple[int, int, int], seed: int) -> nn.Module:
    with seeded(seed):
        fresh = Transformer(*shape, classes=len(CHARACTERS))
    plan = Plan(model=fresh, stream=Batches(x=x, y=y, batch_size=BATCH, seed=seed), steps=EPOCHS * TRAIN // BATCH,
                optimizer=adamw(4e-3), schedule=cosine)  # fmt: skip
    return freeze(fit(plan, device="cpu", seed=seed).model).eval()
