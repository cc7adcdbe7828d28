"""A picture moved away from all its captions, as seen in several sizes, is lost by other models more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.attack.sga import PAPER as PAPER
from headstart.attack.sga import SGA
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, Term, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import freeze
from headstart.measure.retrieval_attack import matcher, retrieval_attack
from headstart.worlds.captioned_letters import KINDS, OTHERS, WORDS, captions, pictures

RADIUS, TEST = 0.06, 112
PLACE = {word: k for k, word in enumerate(WORDS)}
FOOLED = "share of the other models' right answers lost at rank 1"
CLAIMS = tuple(
    Claim(says=says + ": letters of 20 pixels, radius 0.06, pictures only, mean of two other dual encoders and of both "
          "directions.", metric=FOOLED, better=better, than=than, by=by, seeds=3)
    for says, better, than, by in (
        ("Captions as a set and four more sizes lose at least five points more than one caption does", "set and sizes",
         "one caption", 0.05),
        ("Captions as a set and four more sizes lose at least three points more than one caption does (less refutes "
         "the paper)", "set and sizes", "one caption", 0.03),
        ("Four more sizes add to what the set of captions loses", "set and sizes", "set", 0.0),
        ("A set of captions loses no less than one caption", "set", "one caption", -1e-9),
        ("A set of captions and four more sizes lose more than random signs", "set and sizes", "random signs", 0.0),
    )
)  # fmt: skip

NOTE = (
    "To stay within the time of a claim encoders learn 600 steps of 96 pictures, not 900, with batch normalisation and "
    "letters of one shape; before that they did not tell letters apart by then. They find 39 to 60 per cent of what is "
    "asked (chance: one). They are easier to disturb than the card's: random signs lose 34 to 40 per cent, there 6 to "
    "18; letters at 0.35 instead of 0.5 from the grey around them, tried first, lost 58 in seed 0, in the same order "
    "of arms. Noise added to the sizes helps here by 5 to 12 points. One replaced word of a caption loses nearly "
    "everything, as the card warns; no statement rests on it."
)


class Dual(nn.Module):
    """Pictures and word numbers into one space."""

    def __init__(self, image: nn.Module, width: int) -> None:
        super().__init__()
        self.image = image
        self.words = nn.EmbeddingBag(len(WORDS) + 1, width, mode="mean")
        self.text = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, 32)
        )

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(x["image"]), dim=1), F.normalize(self.text(self.words(x["words"])), dim=1)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Features of captions; words it does not know share a place."""
        numbers = torch.tensor([[PLACE.get(word, len(PLACE)) for word in text.split()] for text in texts])
        return cast(Tensor, self.text(self.words(numbers)))


class InfoNCE(Term):
    """Each picture finds its caption among the batch's, and the other way round."""

    def forward(self, step: Step) -> Tensor:
        image, text = step.run(step.batch.x).output
        scores, own = image @ text.T / 0.07, torch.arange(len(image))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def _image(first: nn.Module, second: nn.Module, shrink: int, bend: nn.Module, sizes: tuple[int, int]) -> nn.Module:
    pool = nn.MaxPool2d(shrink)
    return nn.Sequential(
        nn.BatchNorm2d(1), first, pool, bend, second, pool, bend, nn.Flatten(), nn.Linear(*sizes),
        nn.BatchNorm1d(sizes[1]), bend, nn.Linear(sizes[1], 32),
    )  # fmt: skip


def _duals() -> list[Dual]:
    small = _image(nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), 2, nn.ReLU(), (800, 128))
    other = _image(nn.Conv2d(1, 12, 5, padding=2), nn.Conv2d(12, 40, 3, padding=1), 2, nn.ReLU(), (1000, 96))
    strided = _image(nn.Conv2d(1, 24, 4, 2, 1), nn.Conv2d(24, 48, 4, 2, 1), 1, nn.GELU(), (1200, 128))
    return [Dual(small, 64), Dual(other, 48), Dual(strided, 64)]


def run(seed: int) -> dict[str, dict[str, float]]:
    """Three dual encoders, 3,000 pictures of five captions; 112 test pictures, each of something else."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*map(torch.arange, KINDS.values()))
    seen = every[torch.randint(len(every), (3000,), generator=generator)]
    shown = every[torch.randperm(len(every), generator=generator)[:TEST]]
    inputs = {"image": pictures(seen, 2 * seed), "words": captions(seen, 2 * seed)}

    def chosen(x: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = torch.arange(len(x["words"]))
        return {"image": x["image"], "words": x["words"][rows, torch.randint(5, rows.shape)]}

    models = []
    with seeded(seed):
        fresh = _duals()
    for model in fresh:
        stream = Batches(x=inputs, batch_size=96, seed=seed, augment=chosen)
        plan = Plan(model=model, stream=stream, steps=600, terms={"match": InfoNCE()}, optimizer=adamw(3e-3),
                    schedule=cosine)  # fmt: skip
        models.append(cast(Dual, freeze(fit(plan, device="cpu", seed=seed).model).eval()))
    x, texts = pictures(shown, 2 * seed + 1), captions(shown, 2 * seed + 1).flatten(0, 1)
    words = [" ".join(WORDS[k] for k in row) for row in texts.tolist()]
    of = torch.arange(TEST).repeat_interleave(5)
    source = models[0]
    full = SGA(encode_image=source.image, encode_text=source.read, candidates=OTHERS, radius=RADIUS, seed=seed)
    sizes = replace(full, words=0)
    flat = replace(sizes, scales=())
    first, signs = words[::5], torch.randint(2, x.shape, generator=generator) * 2 - 1
    both = full.perturb_pairs(x, words, of)
    moved: dict[str, tuple[Tensor, Sequence[str]]] = {
        "random signs": ((x + RADIUS * signs).clamp(0, 1), words),
        "one caption": (flat.perturb_pairs(x, first, torch.arange(TEST)).x, words),
        "set": (flat.perturb_pairs(x, words, of).x, words),
        "set and sizes": (sizes.perturb_pairs(x, words, of).x, words),
        "set and sizes without noise": (replace(sizes, noise=0.0).perturb_pairs(x, words, of).x, words),
        "captions only": (x, both.text.captions),
        "pictures and captions": (both.x, both.text.captions),
    }
    victims = {name: matcher(m.image, m.read) for name, m in zip(("own", "other", "strided"), models, strict=True)}
    found: dict[str, dict[str, float]] = {"clean": {}}
    for arm, (changed, said) in moved.items():
        result = retrieval_attack(victims, x, words, of, changed, said)
        sides = {"TR": result.texts, "IR": result.images}
        found[arm] = {FOOLED: fmean(float(side.success[1:, 0].mean()) for side in sides.values())}
        for side, found_by in sides.items():
            for k, name in enumerate(victims):
                found[arm][f"{side} {name}"] = float(found_by.success[k, 0])
                found["clean"][f"{side} {name}"] = float(found_by.recall[k, 0])
    return found
