"""What one look at the test labels says: calibration, classes, mistakes, the gain over a baseline with its doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 10) -> dict[str, Any]:
    """How far confidence can be believed: reliability bins, expected calibration error, Brier score and log loss.

    >>> import torch
    >>> calibration(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))["ece"]
    0.0
    """
    p = probabilities.double()
    confidence, predicted = p.max(1)
    right = (predicted == labels).double()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    rows, error = [], 0.0
    for k in range(bins):
        inside = bin_of == k
        n = int(inside.sum())
        if n:
            sure, hit = float(confidence[inside].mean()), float(right[inside].mean())
            rows.append({"low": k / bins, "high": (k + 1) / bins, "n": n, "confidence": sure, "accuracy": hit})
            error += n / len(labels) * abs(sure - hit)
    truth = F.one_hot(labels, p.shape[1]).double()
    log_loss = -p.gather(1, labels[:, None]).clamp(min=1e-12).log().mean()  # guards log 0 of a saturated softmax
    return {"bins": rows, "ece": error, "brier": float((p - truth).square().sum(1).mean()), "log_loss": float(log_loss)}


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Recall and precision of each class; None where there is nothing to divide by."""
    hits, rows, columns = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    return [
        {"class": name, "n": n, "recall": hit / n if n else None, "precision": hit / said if said else None}
        for name, hit, n, said in zip(classes, hits, rows, columns, strict=True)
    ]


def mistakes(
    probabilities: Tensor, labels: Tensor, names: Sequence[str], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Every wrong prediction, the most confident first."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True, stable=True)]
    return [
        {"row": i, "name": names[i], "true": classes[int(labels[i])], "predicted": classes[int(predicted[i])],
         "probability": float(confidence[i])}
        for i in wrong.tolist()
    ]  # fmt: skip


def gain(right: Tensor, baseline: Tensor) -> tuple[float, tuple[float, float]]:
    """How much better one model does than another on the same examples, with a 95 % interval.

    The interval is Agresti and Min's (2005) adjusted Wald interval for matched pairs: half an example is added to
    each cell of the 2x2 table, which keeps its coverage near 95 % for small n.

    Args:
        right: (n,) whether the model is right.
        baseline: (n,) whether the baseline is.

    >>> import torch
    >>> gain(torch.tensor([True] * 9 + [False]), torch.tensor([True] * 4 + [False] * 6))[0]
    0.5
    """
    n = len(right)
    better, worse = int((right & ~baseline).sum()), int((~right & baseline).sum())
    b, c, m = better + 0.5, worse + 0.5, n + 2
    centre = (b - c) / m
    half = 1.959963984540054 * ((b + c) - (b - c) ** 2 / m) ** 0.5 / m
    return (better - worse) / n, (max(-1.0, centre - half), min(1.0, centre + half))
