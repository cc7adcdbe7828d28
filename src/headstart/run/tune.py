"""Fine-tune a source from a head that already works, and try it out on a held-out fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.stream import Batches, each
from headstart.core.surgery import with_head
from headstart.core.validate import Refused

from .probe import fit_probe, folds_of

if TYPE_CHECKING:
    from headstart.tasks import Examples
    from headstart.zoo import Source

    from .cache import Cache

FOLDS = 3
BATCH = 32
LEARNING_RATE = 1e-3


def full_steps(n: int) -> int:
    """Optimizer steps of a whole fine-tune on n examples: 40 epochs, at most 1,000 steps.

    >>> full_steps(100), full_steps(100_000)
    (120, 1000)
    """
    return min(40 * max(1, n // BATCH), 1_000)


def training_cost(operations: int, steps: int, n: int) -> int:
    """Floating point operations of a fine-tune; a backward pass counts as two forward passes."""
    return 3 * operations * steps * min(BATCH, n)


def tune(
    model: nn.Module,
    head: str,
    x: Any,
    labels: Tensor,
    classes: int,
    *,
    weight: Tensor,
    bias: Tensor,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Fine-tune every weight of a source from a head that already works, so that the first steps do not harm it.

    Args:
        model: the source's module; it stays as it is.
        head: dotted name of its final linear layer, which is replaced.
        x: preprocessed examples, a tensor or mapping of tensors.
        labels: (n,) class indices.
        classes: outputs of the new head.
        weight: (classes, d) and
        bias: (classes,) of the head at the start, from `fit_probe`.
        steps: optimizer steps; the learning rate falls to zero along a cosine.
        learning_rate: of AdamW.
        seed: of the order of examples and of dropout.
        device: "auto", "cpu" or "cuda".
        progress: called with (steps done, steps).

    Cost: `training_cost`.

    Reference: Kumar et al. 2022, "Fine-tuning can distort pretrained features", LP-FT.
    """
    start = with_head(model, classes, head)
    layer = start.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    plan = Plan(
        model=start.requires_grad_(True),
        stream=Batches(x=x, y=labels, batch_size=BATCH, seed=seed),
        steps=steps,
        optimizer=adamw(lr=learning_rate),
        schedule=cosine,
    )
    return fit(plan, device=device, seed=seed, progress=progress).model


@dataclass(frozen=True, kw_only=True)
class Pull:
    """One short fine-tune: which source, which fold is held out, for how many steps, from a head of which strength."""

    source: Source
    fold: int
    steps: int
    strength: float


def pull(cache: Cache, examples: Examples, classes: int, seed: int, job: Pull) -> dict[str, list[int]]:
    """Train on the other folds; which held-out examples the probe and the fine-tuned model get right (0 or 1)."""
    source, labels = job.source, examples.labels
    assert labels is not None
    fold = folds_of(labels, FOLDS, seed)
    train, held = torch.nonzero(fold != job.fold)[:, 0], torch.nonzero(fold == job.fold)[:, 0]
    features = cache.evidence(examples, source).features
    weight, bias = fit_probe(features[train], labels[train], classes, strength=job.strength)
    x = source.preprocess([examples.inputs[i] for i in range(len(examples))])
    probe = (features[held] @ weight.T + bias).argmax(1) == labels[held]
    try:
        model = tune(
            source.load(), source.head, each(lambda t: t[train], x), labels[train], classes,
            weight=weight, bias=bias, steps=job.steps, seed=seed, device=cache.placed(),
        )  # fmt: skip
        tuned = predict(model, each(lambda t: t[held], x), cache.chunk).argmax(1) == labels[held]
    except Refused:  # the loss left the finite numbers: this source gets nothing from fine-tuning
        tuned = torch.zeros_like(probe)
    return {"rows": held.tolist(), "probe": probe.int().tolist(), "tuned": tuned.int().tolist()}


def predict(model: nn.Module, x: Any, chunk: int = 64) -> Tensor:
    """Logits (n, c) on the CPU of a model in eval mode, `chunk` examples at a time."""
    n = len(x if isinstance(x, Tensor) else next(iter(x.values())))
    device, parts = next(model.parameters()).device, []
    for first in range(0, n, chunk):
        rows = slice(first, first + chunk)
        with torch.inference_mode():
            parts.append(model(each(partial(_rows, rows, device), x)).cpu())
    return torch.cat(parts).clone()


def _rows(rows: slice, device: torch.device, tensor: Tensor) -> Tensor:
    return tensor[rows].to(device)
