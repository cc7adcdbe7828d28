"""What a candidate model says about target examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .statistics import ClassStatistics
from .stream import as_batch, each
from .surgery import head_of
from .taps import tapped
from .validate import finite, require


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one candidate model says about one target sample; axis 0 is the example in every field.

    Attributes:
        features: (n, d) floating, the input of the model's head.
        labels: (n,) integers, the target's classes.
        logits: (n, c) floating, over the candidate's own (source) classes.
        source: what the same model says about examples of its own training data, for scores that compare the two.

    Raises:
        Refused: fields of different lengths, NaN or infinity, labels that are not integers, a source of another width.

    >>> Evidence(features=torch.zeros(3, 2)).need("labels")
    Traceback (most recent call last):
    headstart.core.validate.Refused: This needs evidence with labels; got features only. Pass labels= to Evidence.
    """

    features: Tensor
    labels: Tensor | None = None
    logits: Tensor | None = None
    source: Evidence | None = None

    def __post_init__(self) -> None:
        n = len(self.features)
        require(self.features.ndim == 2 and n > 0, "Evidence needs features of shape (n, d), n > 0",
                tuple(self.features.shape), "Flatten each example's features to one row.")  # fmt: skip
        finite("features", self.features)
        for name in ("labels", "logits"):
            value = getattr(self, name)
            require(value is None or len(value) == n, f"{name} must have one row for each of {n} examples",
                    None if value is None else tuple(value.shape), "Align the two.")  # fmt: skip
        if self.logits is not None:
            finite("logits", self.logits)
        if self.labels is not None:
            require(self.labels.ndim == 1 and not self.labels.is_floating_point(), "labels must be integers (n,)",
                    f"{self.labels.dtype} {tuple(self.labels.shape)}", "Pass class indices.")  # fmt: skip
        if self.source is not None:
            width, own = self.source.features.shape[1], self.features.shape[1]
            require(width == own, "source= must be evidence of the same model at the same layer",
                    f"{width} features, not {own}", "Extract both at one layer.")  # fmt: skip

    def need(self, *names: str) -> tuple[Tensor, ...]:
        """The named tensors, or a refusal naming the missing ones."""
        values = {name: getattr(self, name) for name in names}
        missing = [name for name, value in values.items() if value is None]
        have = [name for name in ("features", "labels", "logits") if getattr(self, name) is not None]
        require(not missing, f"This needs evidence with {', '.join(missing)}", f"{', '.join(have)} only",
                f"Pass {', '.join(f'{name}=' for name in missing)} to Evidence.")  # fmt: skip
        return tuple(values.values())

    def take(self, rows: Tensor) -> Evidence:
        """The evidence of some examples only (an index or mask tensor); used by the bootstrap."""
        fields = ("features", "labels", "logits")
        return replace(self, **{f: getattr(self, f)[rows] for f in fields if getattr(self, f) is not None})


class Score(Protocol):
    """Evidence -> a number, higher is better, always a Python float."""

    def score(self, evidence: Evidence) -> float: ...


@runtime_checkable
class StatisticsScore(Score, Protocol):
    """A score that needs no more than `ClassStatistics`, so it streams, adds over shards and resamples cheaply."""

    def score_from(self, statistics: ClassStatistics) -> float: ...


class SetScore(Protocol):
    """Evidence of several models on the same examples -> a number for the set, higher is better."""

    def score_set(self, evidence: Sequence[Evidence]) -> float: ...


def classes_of(labels: Tensor) -> tuple[Tensor, int]:
    """Labels renumbered to the classes present, 0..c-1, and c. Refuses fewer than two classes.

    >>> classes_of(torch.tensor([7, 3, 7]))
    (tensor([1, 0, 1]), 2)
    """
    present, renumbered = torch.unique(labels, return_inverse=True)
    require(len(present) >= 2, "A score needs at least two classes", len(present), "Label examples of another class.")
    return renumbered, len(present)


def forward_features(
    model: nn.Module, inputs: Iterable[Any], *, head: str | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """Each batch's features (n, d) and output, without gradient, in eval mode; the model's mode is given back.

    Args:
        model: any module with a linear head.
        inputs: batches for `model(...)`: tensors, mappings, `Batch` or (x, y) pairs; streamed.
        head: dotted name of the head, whose input is the features; by default the last linear layer.

    Cost: one forward pass and one hook; nothing is kept.
    """
    tap = f"{head or head_of(model)}:input"
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with tapped(model, [tap]) as seen:
            for batch in inputs:
                x = each(lambda t: t.to(device), as_batch(batch).x)
                with torch.inference_mode():
                    output = model(x)
                yield seen[tap].flatten(1).clone(), output
    finally:
        for module, mode in modes.items():
            module.training = mode


def extract(model: nn.Module, stream: Iterable[Any], *, head: str | None = None) -> Evidence:
    """Features, logits and labels of a finite stream of batches, on the CPU.

    Memory: the result, n (d + c) floats. For statistics that never hold all features see `ClassStatistics`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> extract(model, [(torch.zeros(5, 4), torch.arange(5) % 2)]).features.shape
    torch.Size([5, 8])
    """
    batches = [as_batch(batch) for batch in stream]
    require(bool(batches), "extract needs at least one batch", "none", "Pass a non-empty stream.")
    pairs = [(f.cpu(), out.cpu()) for f, out in forward_features(model, batches, head=head)]
    labels = [batch.y for batch in batches if batch.y is not None]
    return Evidence(
        features=torch.cat([f for f, _ in pairs]),
        logits=torch.cat([out for _, out in pairs]),
        labels=torch.cat(labels) if len(labels) == len(batches) else None,
    )


def extract_statistics(
    model: nn.Module, stream: Iterable[Any], classes: int, *, head: str | None = None
) -> ClassStatistics:
    """What a `StatisticsScore` needs of a labelled stream, without ever holding its features; on the model's device.

    Args:
        model: any module with a linear head.
        stream: batches with labels in 0..classes-1, as many as there are.
        classes: how many there are.
        head: dotted name of the head; by default the last linear layer.

    Memory: O(d² + classes d) and one batch.

    Raises:
        Refused: no batches, a batch without labels, labels outside 0..classes-1.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> extract_statistics(model, [(torch.ones(5, 4), torch.arange(5) % 2)] * 3, classes=2).n
    15.0
    """
    waiting: list[Tensor] = []

    def batches() -> Iterator[Any]:
        for batch in map(as_batch, stream):
            require(batch.y is not None, "Statistics need labels in every batch", None, "Pass (x, y) batches.")
            waiting.append(batch.y)
            yield batch

    pairs = (
        (features, waiting.pop(0).to(features.device)) for features, _ in forward_features(model, batches(), head=head)
    )
    return ClassStatistics.stream(pairs, classes)
