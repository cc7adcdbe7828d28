"""The ensemble of highest OSBORN beats the average one; the score follows accuracy after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from headstart.choose.ensemble_leep import ELEEP, MSLEEP, expected_predictions
from headstart.choose.osborn import PAPER as PAPER
from headstart.choose.osborn import Osborn
from headstart.core.claim import Claim
from headstart.core.evidence import Evidence, extract
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.surgery import with_head
from headstart.testing.material import digits
from headstart.worlds import glyphs

CLAIMS = (
    Claim(
        says="Ten models for UCI digits, all ensembles of three: the one of highest score is more accurate than the "
        "mean of all 120 on at least 4 of 5 seeds.",
        metric="pick above the mean", better="OSBORN", than="never", by=0.79,
    ),
    Claim(
        says="Over the 120 ensembles, the score's correlation with accuracy is above 0 on at least 4 of 5 seeds.",
        metric="correlation above 0", better="OSBORN", than="never", by=0.79,
    ),
    Claim(says="That correlation (Pearson's) is 0.2 or more in the mean.", metric="correlation", better="OSBORN",
          than="never", by=0.2),
)  # fmt: skip
NOTE = (
    "How many letters the sources knew was left open. With 52 the correlation was 0.01 and -0.16 on two seeds "
    "beside the record (10 and 11); with the 26 taken here, 0.27 and 0.22: the entropy of a model's own classes grows "
    "with their number, so letters look far in task, though they fine-tune as well as digits. Conditioned the other "
    "way, on classes that are the same for all models, the score correlates by 0.55 (as published by 0.24). E-LEEP and "
    "MS-LEEP need no source data and order these ensembles better (0.61 and 0.59; picks 0.766 against 0.752). Cohesion "
    "alone says nothing of accuracy (-0.03). The greedy choice is as accurate as the best-scored of all 120."
)
VERSIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "plain": lambda x, g: x,
    "rotated": lambda x, g: x.rot90(1, (2, 3)),
    "inverted": lambda x, g: 1 - x,
    "noisy": lambda x, g: (x + 0.4 * torch.randn(x.shape, generator=g)).clamp(0, 1),
    "mirrored": lambda x, g: x.flip(3),
    "halved": lambda x, g: torch.cat([x[..., :4], torch.zeros_like(x[..., 4:])], 3),
}
POOL = [("digits", v) for v in VERSIONS] + [("upper", v) for v in ("plain", "rotated", "inverted", "noisy")]
WEIGHTS = {
    "OSBORN": (1.0, 1.0, 1.0), "domain alone": (1.0, 0.0, 0.0), "task alone": (0.0, 1.0, 0.0),
    "cohesion alone": (0.0, 0.0, 1.0), "without domain": (0.0, 1.0, 1.0), "without task": (1.0, 0.0, 1.0),
    "without cohesion": (1.0, 1.0, 0.0),
}  # fmt: skip
SPLITS = 3


def run(seed: int) -> dict[str, dict[str, float]]:
    """Ten sources, 300 target rows to score them by; three splits of 50 labels to fine-tune on, others to test on."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    scored, rest = order[:300], order[300:]
    splits = [rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(k))] for k in range(SPLITS)]
    drawn = {characters: glyphs.boxed(2000, seed, classes=characters) for characters in ("digits", "upper")}
    zoo, outputs = list[Evidence](), list[Tensor]()
    for characters, version in POOL:
        own, labels = drawn[characters]
        own = VERSIONS[version](own, torch.Generator().manual_seed(seed))
        model = source(own, labels, seed)
        seen, known = (
            extract(model, [pair], head="head") for pair in ((x[scored], y[scored]), (own[:300], labels[:300]))
        )
        zoo.append(Evidence(features=seen.features, logits=seen.logits, labels=seen.labels, source=known))
        outputs.append(torch.stack([tuned(model, x, y, rows) for rows in splits]))
    said = torch.stack(outputs)  # (10, splits, rows, classes) probabilities
    subsets: list[tuple[int, ...]] = list(combinations(range(len(zoo)), 3))
    truth = torch.stack([y[rows[50:]] for rows in splits])
    accuracy = np.array([float((said[list(s)].mean(0).argmax(2) == truth).float().mean()) for s in subsets])
    cached = expected_predictions(zoo)
    pool = Osborn(unit=True).pool(zoo)
    scores = {n: replace(pool, weights=w).scores(subsets, standardise=True).numpy() for n, w in WEIGHTS.items()}
    turned = Osborn(unit=True, direction="target given source").pool(zoo)
    scores["target given source"] = turned.scores(subsets, standardise=True).numpy()
    for name, score in (("E-LEEP", ELEEP()), ("MS-LEEP", MSLEEP())):
        scores[name] = np.array([score.score_predictions(cached[list(s)]) for s in subsets])
    arms = {name: _judged(values, accuracy) for name, values in scores.items()}
    greedy = subsets.index(tuple(sorted(pool.standardised().select(3))))
    alone = {f"{v} {c}": float((said[m].argmax(2) == truth).float().mean()) for m, (c, v) in enumerate(POOL)}
    return arms | {
        "OSBORN, greedy": {"accuracy": float(accuracy[greedy])},
        "all ensembles": {"accuracy": float(accuracy.mean())},
        "best ensemble": {"accuracy": float(accuracy.max())},
        "never": {"pick above the mean": 0.0, "correlation above 0": 0.0, "correlation": 0.0},
        "one model, fine-tuned": alone,
    }


def source(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A convolutional network with 64 features after 300 steps on these characters."""
    with seeded(seed):
        model = nn.Sequential()
        for k, (inputs, outputs) in enumerate(((1, 16), (16, 32))):
            model.add_module(f"conv{k}", nn.Conv2d(inputs, outputs, 3, padding=1))
            model.add_module(f"relu{k}", nn.ReLU())
            model.add_module(f"pool{k}", nn.MaxPool2d(2))
        model.add_module("flat", nn.Flatten())
        model.add_module("middle", nn.Linear(128, 64))
        model.add_module("bend", nn.ReLU())
        model.add_module("head", nn.Linear(64, int(y.amax()) + 1))
    stream = Batches(x=x, y=y, batch_size=64, seed=seed)
    plan = Plan(model=model, stream=stream, steps=300, optimizer=adamw(3e-3))
    return fit(plan, device="cpu", seed=seed).model.eval()


def tuned(model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Probabilities for all but the first 50 rows after 60 steps on all weights from the labels of those."""
    plan = Plan(model=with_head(model, 10, "head"), stream=Batches(x=x[rows[:50]], y=y[rows[:50]]), steps=60,
                optimizer=adamw(1e-3))  # fmt: skip
    model = fit(plan, device="cpu").model.eval()
    with torch.no_grad():
        return model(x[rows[50:]]).softmax(1)  # type: ignore[no-any-return]


def _judged(scores: np.ndarray, accuracy: np.ndarray) -> dict[str, float]:
    correlation, picked = float(np.corrcoef(scores, accuracy)[0, 1]), float(accuracy[scores.argmax()])
    return {"correlation": correlation, "accuracy": picked, "correlation above 0": float(correlation > 0),
            "pick above the mean": float(picked > accuracy.mean())}  # fmt: skip
