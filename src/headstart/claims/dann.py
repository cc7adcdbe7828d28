"""Adversarial features carry a classifier to a domain without labels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from headstart.align.dann import DANN, annealed
from headstart.align.dann import PAPER as PAPER
from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.testing.material import digits
from headstart.worlds.glyphs import FONTS

CLAIMS = (
    Claim(
        says="Two moons, the target turned by 35 degrees (figure 2 of the paper): target accuracy rises by at least "
        "five points over the source alone.",
        metric="moons, target accuracy",
        better="DANN",
        than="source only",
        by=0.05,
        seeds=3,
    ),
    Claim(
        says="Two moons: accuracy on the source falls by less than two points.",
        metric="moons, source accuracy",
        better="DANN",
        than="source only",
        by=-0.02,
        seeds=3,
    ),
    Claim(
        says="Digits rendered from fonts to handwritten UCI digits: the mean gain is positive.",
        metric="digits, target accuracy",
        better="DANN",
        than="source only",
    ),
)


NOTE = (
    "Single runs beside the record. Moons with the paper's single examples (45,000 steps at 0.05), one seed: 0.793 to "
    "0.913. Fonts bent, cropped and recoloured by worlds.glyphs at 8x8 instead of upright and filling the frame, three "
    "seeds: 0.563 to 0.519, no gain; that source is itself only fitted to a loss of 0.4 within these steps."
)


def run(seed: int) -> dict[str, dict[str, float]]:
    """Source only is DANN with strength 0: the same batches, steps, rates and initial weights."""
    scores = [{**_moons(seed, moons), **_digits(seed, fonts)} for moons, fonts in ((0.0, 0.0), (6.0, 1.0))]
    return dict(zip(("source only", "DANN"), scores, strict=True))


def _moons(seed: int, strength: float) -> dict[str, float]:
    """The paper's toy: 150 examples a domain, 15 sigmoid units, a linear domain head, λ = 6 throughout, 300 passes.

    Ten examples at ten times the rate a step instead of one, which takes a tenth of the time.
    """
    from sklearn.datasets import make_moons

    turn = math.radians(35)
    rotation = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def cloud(draw: int) -> tuple[Tensor, Tensor]:
        x, y = make_moons(150, noise=0.05, random_state=2 * seed + draw)
        points = torch.tensor(x, dtype=torch.float32)
        return 2 * (points - points.mean(0)), torch.tensor(y)

    (xs, ys), (xt, yt) = cloud(0), cloud(1)
    xt = xt @ rotation
    with seeded(seed):
        model = nn.Sequential(nn.Linear(2, 15), nn.Sigmoid(), nn.Linear(15, 2))
    source, target = Batches(x=xs, y=ys, batch_size=10, seed=seed), Batches(x=xt, batch_size=10, seed=seed)
    plan = Plan(model=model, stream=source, steps=300 * 15, optimizer=sgd(0.5, momentum=0.0))
    tactic = DANN(target, hidden=0, gamma=math.inf, strength=strength, seed=seed)
    fitted = fit(tactic(plan), device="cpu", seed=seed).model
    return {"moons, source accuracy": _accuracy(fitted, xs, ys), "moons, target accuracy": _accuracy(fitted, xt, yt)}


def _digits(seed: int, strength: float) -> dict[str, float]:
    """Perceptron 64-128-64, SGD 0.05 with momentum 0.9 under the paper's rate, 1,200 steps of 64 and 64."""
    (xs, ys), (xt, yt) = _fonts(seed), digits()
    with seeded(seed):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    source, target = Batches(x=xs, y=ys, batch_size=64, seed=seed), Batches(x=xt, batch_size=64, seed=seed)
    plan = Plan(model=model, stream=source, steps=1200, optimizer=sgd(0.05, momentum=0.9), schedule=annealed)
    fitted = fit(DANN(target, strength=strength, seed=seed)(plan), device="cpu", seed=seed).model
    return {"digits, target accuracy": _accuracy(fitted, xt, yt)}


def _fonts(seed: int) -> tuple[Tensor, Tensor]:
    """1,500 digits in 14 fonts, turned by up to 15 degrees and, as UCI did, fitted to the frame and averaged to 8x8."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 48) for name in FONTS["train"]]
    rng, labels, pictures = np.random.default_rng(seed), torch.arange(1500) % 10, []
    for label in labels.tolist():
        page = Image.new("L", (128, 128))
        font = fonts[rng.integers(len(fonts))]
        ImageDraw.Draw(page).text((64, 64), str(label), fill=255, font=font, anchor="mm")
        page = page.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        page = page.crop(page.getbbox())
        width = min(32, round(32 * page.width / page.height * rng.uniform(0.8, 1.2)))
        frame = Image.new("L", (32, 32))
        frame.paste(page.resize((width, 32), Image.Resampling.BILINEAR), ((32 - width) // 2, 0))
        pictures.append(np.asarray(frame.resize((8, 8), Image.Resampling.BOX), np.float32) / 255)
    return torch.tensor(np.stack(pictures))[:, None], labels


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())
