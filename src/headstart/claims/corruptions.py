"""Accuracy falls as pictures get worse, and less for a model that was trained on some kinds of bad pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from headstart.core.claim import Claim
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.measure.corruptions import PAPER as PAPER
from headstart.measure.corruptions import CorruptionAccuracy, accuracy_by_corruption, corruption_error
from headstart.testing.material import digits

CLAIMS = (
    Claim(says="UCI digits at 8x8: accuracy at severity 5 lies ten points below severity 1, mean of 15 corruptions.",
          metric="accuracy", better="severity 1", than="severity 5", by=0.1, seeds=3),
    Claim(says="Severity 1 lies below clean pictures.",
          metric="accuracy", better="clean", than="severity 1", seeds=3),
    Claim(says="Accuracy is lower at severity 5 than at severity 1 under more than half of the corruptions.",
          metric="share of corruptions", better="falling", than="half", seeds=3),
    Claim(says="Training with changed gain and offset, flat noise and erased squares takes a tenth off the mean "
          "corruption error.",
          metric="negated mCE", better="augmented", than="plain", by=0.1, seeds=3),
    Claim(says="It does so too for the corruptions that are unlike those: blurs, elastic, pixelate and JPEG.",
          metric="negated mCE, unlike", better="augmented", than="plain", seeds=3),
)  # fmt: skip
NOTE = (
    "Augmentation raises accuracy under fog, contrast, brightness and frost, which change gain and offset themselves; "
    "in two of three seeds it lowers it under noise, blur and JPEG, where both models err on a few pictures in a "
    "hundred: there the ratio of the mean corruption error is large for a small loss, and undoes the gain. Mean "
    "accuracy rises in two of three seeds."
)
UNLIKE = (
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip


def run(seed: int) -> dict[str, dict[str, float]]:
    """Two small convolutional models on 1,200 digits, 600 steps of 64 each; 200 others as grey pictures of 8x8x3."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1200], order[1200:1400]
    images = (255 * x[test]).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    found = {}
    for name, augment in {"plain": None, "augmented": _augmented}.items():
        model = _trained(x[train], y[train], augment, seed)
        found[name] = accuracy_by_corruption(partial(_classes, model), images, y[test].numpy(), seed=seed)
    plain = found["plain"]
    scores = {
        name: {
            "negated mCE": -corruption_error(accuracy, plain).mean,
            "negated mCE, unlike": -corruption_error(_unlike(accuracy), _unlike(plain)).mean,
            "clean": accuracy.clean,
            "accuracy": accuracy.mean,
        }
        for name, accuracy in found.items()
    }
    for severity in plain.severities:
        at = fmean(row[severity - 1] for row in plain.corrupted.values())
        scores[f"severity {severity}"] = {"accuracy": at}
    scores["clean"] = {"accuracy": plain.clean}
    scores["falling"] = {"share of corruptions": fmean(row[-1] < row[0] for row in plain.corrupted.values())}
    scores["half"] = {"share of corruptions": 0.5}
    scores["plain, by corruption"] = {name: fmean(row) for name, row in plain.corrupted.items()}
    scores["augmented, by corruption"] = {name: fmean(row) for name, row in found["augmented"].corrupted.items()}
    return scores


def _unlike(accuracy: CorruptionAccuracy) -> CorruptionAccuracy:
    return replace(accuracy, corrupted={name: accuracy.corrupted[name] for name in UNLIKE})


def _trained(x: Tensor, y: Tensor, augment: Callable[[Tensor], Tensor] | None, seed: int) -> nn.Module:
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    stream = Batches(x=x, y=y, batch_size=64, seed=seed, augment=augment)
    plan = Plan(model=model, stream=stream, steps=600, optimizer=adamw(2e-3), schedule=cosine)
    return fit(plan, device="cpu", seed=seed).model.eval()


def _augmented(x: Tensor) -> Tensor:
    """Gain in 0.4..1, offset in 0..0.4, flat noise of up to 0.25, and one erased square of 3x3."""
    n = len(x)
    x = x * (0.4 + 0.6 * torch.rand(n, 1, 1, 1)) + 0.4 * torch.rand(n, 1, 1, 1)
    x = x + 0.25 * torch.rand(n, 1, 1, 1) * (2 * torch.rand_like(x) - 1)
    places = torch.arange(8)
    down, right = (torch.randint(6, (n, 1)) for _ in range(2))
    rows, columns = ((places >= at) & (places < at + 3) for at in (down, right))
    erased = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(erased, torch.rand(n, 1, 1, 1), x).clamp(0, 1)


def _classes(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        grey = torch.from_numpy(images).float().mean(3)[:, None] / 255
        return np.asarray(model(grey).argmax(1))
