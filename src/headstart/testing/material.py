"""The small real data and models that checks run on."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart.core.evidence import Evidence
from headstart.core.plan import Plan, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batch, Batches
from headstart.core.surgery import freeze, matching, replace_layers

from .subject import Subject


def digits() -> tuple[Tensor, Tensor]:
    """The UCI digits of scikit-learn in a fixed random order: x (1797, 1, 8, 8) in [0, 1], y (1797,)."""
    x, y = _digits()
    return x.clone(), y.clone()  # a method that writes into its input spoils its own copy only


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return x, torch.tensor(data.target, dtype=torch.int64)[order]


def small_model() -> nn.Module:
    """A smooth perceptron for digits; the same weights at each call."""
    with seeded(7):
        return nn.Sequential(
            OrderedDict(
                flat=nn.Flatten(), enter=nn.Linear(64, 32), bend=nn.GELU(), middle=nn.Linear(32, 16), curve=nn.GELU(),
                head=nn.Linear(16, 10),
            )
        )  # fmt: skip


@cache
def trained() -> nn.Module:
    """The small model after 200 steps on digits, in eval mode; callers copy it."""
    from headstart.core.loop import fit

    x, y = digits()
    stream = Batches(x=x[:1000], y=y[:1000], batch_size=64)
    return freeze(fit(Plan(model=small_model(), stream=stream, steps=200, optimizer=sgd(0.1))).model).eval()


def model_of(subject: Subject) -> nn.Module:
    """The subject's own model or the small one."""
    return subject.model() if subject.model else small_model()


def batch_of(subject: Subject) -> Any:
    """The subject's own batch or sixteen digits."""
    x, y = digits()
    return subject.batch() if subject.batch else Batch(x[:16], y[:16])


def plan_of(subject: Subject, steps: int = 4) -> Plan:
    """A short run on digits."""
    x, y = digits()
    stream = Batches(x=x[:256], y=y[:256], batch_size=32)
    return Plan(model=model_of(subject), stream=stream, steps=steps, optimizer=sgd(0.05))


def sample_evidence(n: int = 60, d: int = 5, classes: int = 3, dtype: torch.dtype = torch.float32) -> Evidence:
    """Gaussian classes that overlap, with source logits that know part of the truth; the same at each call."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    features = centres[labels] + torch.randn(n, d, generator=generator)
    logits = torch.randn(n, 4, generator=generator) + 2 * torch.eye(4)[labels % 4]
    return Evidence(features=features.to(dtype), labels=labels, logits=logits.to(dtype))


def sample_set(n: int = 60, classes: int = 3, dtype: torch.dtype = torch.float32) -> list[Evidence]:
    """Evidence of three unlike models on the same examples, each with a `source` of its own; the same at each call."""
    generator = torch.Generator().manual_seed(4)
    labels, models = torch.arange(n) % classes, []

    def seen(labels: Tensor, centres: Tensor, own: Tensor, source: Evidence | None = None) -> Evidence:
        features = centres[labels] + torch.randn(len(labels), centres.shape[1], generator=generator)
        logits = torch.randn(len(labels), len(own), generator=generator) + 2 * own.T[labels % len(own)]
        return Evidence(features=features.to(dtype), labels=labels, logits=logits.to(dtype), source=source)

    for width, sources in ((5, 4), (4, 3), (6, 5)):
        own = torch.eye(sources)
        centres = torch.randn(max(sources, classes), width, generator=generator)
        models.append(seen(labels, centres, own, seen(torch.arange(40) % sources, centres[:sources], own)))
    return models


class LowRank(nn.Module):
    """A linear layer beside which a thin one is trained: the operated layer of `Thin`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.full((2, layer.in_features), 0.1).to(layer.weight))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2).to(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T  # type: ignore[no-any-return]


class Thin:
    """A plain low-rank surgery, to see whether tactics compose with one."""

    def apply(self, model: nn.Module) -> nn.Module:
        return replace_layers(freeze(model), matching(model, "*", nn.Linear), lambda old: LowRank(cast(nn.Linear, old)))

    def fold(self, model: nn.Module) -> nn.Module:
        def folded(layer: nn.Module) -> nn.Module:
            assert isinstance(layer, LowRank)
            weight = layer.layer.weight + layer.up @ layer.down  # a new tensor: the old one is shared
            layer.layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            return layer.layer

        return replace_layers(model, [n for n, m in model.named_modules() if isinstance(m, LowRank)], folded)
