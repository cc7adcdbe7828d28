"""Score a model by how well its own classes predict the target's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper

PAPER = Paper(
    title="LEEP: A New Measure to Evaluate Transferability of Learned Representations",
    authors="Nguyen et al.",
    year=2020,
    arxiv="2002.12462",
)


@dataclass(frozen=True, kw_only=True)
class LEEP:
    """How likely the labels are if all that is known of an example is the model's own classes; 0 is the best.

    The mean log likelihood of the labels under the mixture sum over s of p(s | x) p(y | s), p(y | s) being counted on
    the same examples.

    Shape: logits (n, s) over the source classes, labels (n,); at most 0, and -entropy(y) for a model that says nothing.

    Use it when: the models were trained with labels, and their classes may resemble the target's.
    Not when: a model has no classifier of its own (self-supervised), or models differ much in number of classes.

    Cost: O(n s), two passes over the logits; neither the n x c predictions nor an n x s copy is formed.

    Notes: does not look at the features. Logits become probabilities by a softmax in float64.

    Raises:
        Refused: no logits, no labels, fewer than two classes, NaN.

    Reference: Nguyen et al. 2020, equations 1 and 2.

    >>> logits = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    >>> evidence = Evidence(features=logits, logits=logits, labels=torch.tensor([4, 4, 2]))
    >>> round(LEEP().score(evidence), 6)
    0.0
    """

    def score(self, evidence: Evidence) -> float:
        """The mean log expected empirical prediction."""
        return float(expected_prediction_of(evidence).log().mean())


def expected_prediction_of(evidence: Evidence) -> Tensor:
    """The probability (n,) that what a model says of each example gives to its label; float64, above 0."""
    logits, labels = evidence.need("logits", "labels")
    return expected_prediction(logits, classes_of(labels)[0], lambda part: part.double().softmax(1))


def expected_prediction(
    rows: Tensor, labels: Tensor, probabilities: Callable[[Tensor], Tensor] = Tensor.double
) -> Tensor:
    """For each example, sum over s of p(s | x) p(y | s): the expected empirical prediction of its own label, (n,).

    Args:
        rows: (n, s), whatever `probabilities` reads.
        labels: (n,) in 0..c-1.
        probabilities: (b, s) of `rows` -> (b, s) of p(s | x), rows summing to 1, float64; by default they are that.

    Cost: O(n s), in parts that stay in the processor's cache, so `probabilities` reads each row twice.

    Notes: at least 1 / (n s²): p(y | s) counts the example itself, and some p is at least 1 / s.
    """
    size = max(1, 12_000 // rows.shape[1])  # larger pieces of memory are handed back to the system at each turn
    parts = list(zip(torch.split(rows, size), torch.split(labels, size), strict=True))
    joint = torch.zeros(int(labels.max()) + 1, rows.shape[1], dtype=torch.float64, device=rows.device)  # (c, s)
    for part, y in parts:
        joint.index_add_(0, y, probabilities(part))
    mass = joint.sum(0)
    conditional = torch.where(mass > 0, joint / mass, 0.0)  # a source class that nothing belongs to says nothing
    return torch.cat([conditional[y].mul_(probabilities(part)).sum(1) for part, y in parts])
