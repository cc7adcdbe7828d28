"""The model-selection study that applied papers run, done so that its answer can be trusted; `riceleafbd` uses it.

Candidates are trained on the same examples, chosen by macro-F1 on validation, and each reads the test once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a trained candidate said, logits (n, c) on validation and test, and what it cost."""

    validation: Tensor
    test: Tensor
    parameters: int
    seconds: float


def measured(logits: Tensor, labels: Tensor) -> Metrics:
    """Accuracy and unweighted means over the classes of precision, recall and F1; an absent prediction counts 0.

    >>> import torch
    >>> measured(torch.eye(2)[[0, 0, 0, 0]], torch.tensor([0, 0, 1, 1]))["macro F1"]
    0.333...
    """
    from sklearn.metrics import precision_recall_fscore_support

    y, said = labels.numpy(), logits.argmax(1).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(y, said, average="macro", zero_division=0)
    return {"accuracy": float((y == said).mean()), "macro precision": float(precision), "macro recall": float(recall),
            "macro F1": float(f1)}  # fmt: skip


def mcnemar(one: Tensor, other: Tensor, labels: Tensor) -> float:
    """Exact two-sided p of as large a difference between two classifiers on the same examples; 1 when they agree."""
    from scipy.stats import binomtest

    right, wrong = (logits.argmax(1) == labels for logits in (one, other))
    b, c = int((right & ~wrong).sum()), int((~right & wrong).sum())
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def chosen(candidates: Mapping[str, Candidate], labels: Tensor) -> str:
    """The highest macro-F1 on validation; within one standard error of it the candidate with fewer parameters."""
    scores = {name: measured(one.validation, labels)["macro F1"] for name, one in candidates.items()}
    best = max(scores.values())
    error = (best * (1 - best) / len(labels)) ** 0.5
    return min((name for name in scores if scores[name] >= best - error),
               key=lambda name: (candidates[name].parameters, -scores[name]))  # fmt: skip


def arms(
    candidates: Mapping[str, Candidate], scratch: str, validation: Tensor, test: Tensor, pretrained: str | None = None
) -> dict[str, Metrics]:
    """Every candidate's figures, then `pretrained` (by validation), `from scratch`, `chosen` and `best` (by test).

    Args:
        candidates: what was trained.
        scratch: the one that started from nothing.
        validation: labels (n,).
        test: labels (m,), looked at here for the first time.
        pretrained: the candidate to compare with `scratch`; by default the one validation prefers.
    """
    figures = {
        name: measured(one.test, test)
        | {"validation macro F1": measured(one.validation, validation)["macro F1"],
           "McNemar p": mcnemar(one.test, candidates[scratch].test, test),
           "parameters": float(one.parameters), "seconds": one.seconds}
        for name, one in candidates.items()
    }  # fmt: skip
    others = {name: one for name, one in candidates.items() if not name.startswith("scratch")}
    return figures | {
        "pretrained": figures[pretrained or chosen(others, validation)],
        "from scratch": figures[scratch],
        "chosen": figures[chosen(candidates, validation)],
        "best": max(figures.values(), key=lambda row: row["accuracy"]),
    }
