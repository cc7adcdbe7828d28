"""Ways to move what a source knows to a task, and the baselines that show when nothing moved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from headstart.core.evidence import extract
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.statistics import ClassStatistics
from headstart.core.surgery import with_head
from headstart.zoo import Source

from .heads import gaussian_head, gaussian_head_with_unlabelled, headed, reset
from .prepared import Prepared, Shuffled, jitter
from .probe import cross_validated, fit_probe


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every route starts from.

    Args:
        source: where the model comes from.
        model: with its pretrained weights and its own head.
        classes: of the task.
        train: the labelled examples.
        labels: (n,) theirs.
        features: (n, d) the model's features of them.
        spare: unlabelled examples that a route may learn from, prepared; None without any.
        spare_features: the model's features of those.
        steps: optimizer steps of a route that trains.
        batch_size: examples a step.
        augment: whether pictures are jittered while training.
        seed: of everything random.
    """

    source: Source
    model: nn.Module = field(repr=False)
    classes: int
    train: Prepared
    labels: Tensor
    features: Tensor
    spare: Prepared | None = None
    spare_features: Tensor | None = None
    steps: int
    batch_size: int
    augment: bool
    seed: int

    @property
    def rate(self) -> float:
        """Learning rate of AdamW: 1e-3 up to a million parameters, then falling with the square root of the size."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return 1e-3 / math.sqrt(max(1.0, millions))

    def plan(self, model: nn.Module, rows: Tensor, *, rate: float, steps: int | None = None) -> Plan:
        """Train `model` on these rows."""
        stream = Shuffled(examples=self.train, chosen=rows, labels=self.labels, batch_size=self.batch_size,
                          seed=self.seed, augment=jitter if self.augment else None)  # fmt: skip
        return Plan(model=model, stream=stream, steps=steps or self.steps, optimizer=adamw(lr=rate), schedule=cosine)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A model to start from and the plan that trains it further; no plan means that it is finished.

    Attributes:
        plain: the model before any training, with the task's head.
        plan: what is left to do; its result is a plain module of the same architecture.
        frozen: names of weights that are said to stay as they are.
        seconds: what solving it has cost so far.
    """

    plain: nn.Module
    plan: Plan | None = None
    frozen: tuple[str, ...] = ()
    seconds: float = 0.0


Route = Callable[[Start, Tensor], Way]


def probe(start: Start, rows: Tensor) -> Way:
    """Logistic regression on frozen features, solved, not trained."""
    began = time.perf_counter()
    weight, bias = _logistic(start.features[rows], start.labels[rows], start.classes)
    return _closed(start, weight, bias, began)


def bayes(start: Start, rows: Tensor) -> Way:
    """One Gaussian a class on frozen features, solved; unlabelled examples join in where there are some."""
    began = time.perf_counter()
    weight, bias = _gaussian(start.features[rows], start.labels[rows], start.classes, start.spare_features)
    return _closed(start, weight, bias, began)


def lpft(start: Start, rows: Tensor) -> Way:
    """Solve the probe first, then fine-tune everything from there, so that the features are not torn up."""
    solved = probe(start, rows)
    plain = solved.plain.requires_grad_(True)
    return Way(plain=plain, plan=start.plan(plain, rows, rate=start.rate), seconds=solved.seconds)


def lora(start: Start, rows: Tensor) -> Way:
    """Low-rank changes beside every layer, from the solved probe; folded into plain weights afterwards."""
    from headstart.adapt.lora import LoRA

    solved = probe(start, rows)
    plan = start.plan(solved.plain, rows, rate=3 * start.rate).under(
        LoRA(rank=4, head=start.source.head, seed=start.seed)
    )
    return Way(plain=solved.plain, plan=plan, seconds=solved.seconds)


def full(start: Start, rows: Tensor) -> Way:
    """Fine-tune everything under a new head that starts at zero."""
    plain = with_head(start.model, start.classes, start.source.head).requires_grad_(True)
    return Way(plain=plain, plan=start.plan(plain, rows, rate=start.rate))


def scratch(start: Start, rows: Tensor) -> Way:
    """The same network from random weights, by the recipe of `full`, with the same number of steps."""
    plain = reset(with_head(start.model, start.classes, start.source.head), start.seed)
    return Way(plain=plain, plan=start.plan(plain, rows, rate=start.rate))


def patient_scratch(start: Start, rows: Tensor) -> Way:
    """From scratch with all that helps it: ten times the steps, at least 300 of them, and jittered pictures."""
    steps = max(300, 10 * start.steps)
    return scratch(replace(start, steps=steps, augment=start.source.modality == "image"), rows)


def random_features(start: Start, rows: Tensor, *, like: str) -> Way:
    """The same network with random weights, frozen, under the solved head of the route `like` ("bayes", else a probe).

    Its batch statistics are of the task: with those of a fresh network it would be crippled.
    """
    began = time.perf_counter()
    model = reset(with_head(start.model, start.classes, start.source.head), start.seed)
    _settle(model, start.train, rows)
    head, batches = start.source.head, (start.train.rows(part) for part in torch.split(rows, 128))
    features, labels = extract(model, batches, head=head).features, start.labels[rows]
    if like == "bayes":
        spare = None if start.spare is None else extract(model, start.spare.batches(), head=head).features
        weight, bias = _gaussian(features, labels, start.classes, spare)
    else:
        weight, bias = _logistic(features, labels, start.classes)
    return Way(plain=headed(model, start.source.head, weight, bias), seconds=time.perf_counter() - began)


ALL: dict[str, Route] = {"probe": probe, "bayes": bayes, "lpft": lpft, "lora": lora, "full": full}
TRAINED = ("lpft", "lora", "full")


def _gaussian(features: Tensor, labels: Tensor, classes: int, spare: Tensor | None) -> tuple[Tensor, Tensor]:
    statistics = ClassStatistics.of(features, labels, classes)
    return gaussian_head(statistics) if spare is None else gaussian_head_with_unlabelled(statistics, spare)


def _logistic(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    fewest = int(labels.bincount()[torch.unique(labels)].min())
    if fewest < 2:  # nothing to choose the strength on
        return fit_probe(features, labels, classes)
    strength = cross_validated(features, labels, folds=min(5, fewest), repeats=1).strength
    return fit_probe(features, labels, classes, strength=strength)


def _closed(start: Start, weight: Tensor, bias: Tensor, began: float) -> Way:
    head = start.source.head
    plain = headed(start.model, head, weight, bias)
    for name, p in plain.named_parameters():
        p.requires_grad_(name.startswith(f"{head}."))
    frozen = tuple(name for name in plain.state_dict() if not name.startswith(f"{head}."))
    return Way(plain=plain, frozen=frozen, seconds=time.perf_counter() - began)


@torch.no_grad()
def _settle(model: nn.Module, examples: Prepared, rows: Tensor) -> None:
    """Let batch normalisation see the task once: with a random network's default statistics it would be crippled."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if layers:
        for layer in layers:
            layer.momentum = None  # a plain average over the batches
        model.train()
        for part in torch.split(rows, 128):
            model(examples.rows(part))
        model.eval()
        for layer in layers:
            layer.momentum = 0.1
