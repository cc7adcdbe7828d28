"""Score a model by how much its predicted class leaves open about the label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence
from headstart.core.paper import Paper
from headstart.core.validate import require

PAPER = Paper(
    title="Transferability and Hardness of Supervised Classification Tasks",
    authors="Tran et al.",
    year=2019,
    arxiv="1908.08142",
    departs="Adds nothing to empty cells, as several codes do: a pair of classes never seen together counts 0.",
)


@dataclass(frozen=True, kw_only=True)
class NCE:
    """The negative conditional entropy of the labels given the model's predicted classes; 0 is the best.

    Where each predicted class z goes with one label y the labels have no entropy left; where z tells nothing it is
    that of the labels themselves. Probabilities are counts over the examples.

    Shape: logits (n, s) over the source classes, labels (n,); between -entropy(y) and 0.

    Use it when: only predicted classes are known, or two labellings of the same examples are to be compared.
    Not when: probabilities are known (`LEEP` reads more out of them), or s is near n: single examples explain all.

    Cost: O(n s) for the predictions, then O(n): counts of pairs, never a loop over examples.

    Notes: does not look at the features. Of equal logits the first counts.

    Raises:
        Refused: no logits, no labels, fewer than two classes, NaN.

    Reference: Tran et al. 2019, section 3.1.

    >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> evidence = Evidence(features=logits, logits=logits, labels=torch.tensor([5, 5, 3, 4]))
    >>> round(NCE().score(evidence), 4)
    -0.3466
    """

    def score(self, evidence: Evidence) -> float:
        """Minus the entropy in nats."""
        logits, labels = evidence.need("logits", "labels")
        require(bool((labels != labels[0]).any()), "A score needs at least two classes", 1,
                "Label examples of another class.")  # fmt: skip
        return -conditional_entropy(labels, logits.argmax(1))


def conditional_entropy(labels: Tensor, given: Tensor) -> float:
    """What `given` leaves open about `labels`, in nats: H(labels | given) of two labellings of the same examples.

    Args:
        labels: (n,) integers, n > 0.
        given: (n,) integers.

    Cost: O(n) where the numbers are about as few as the examples; else a sort.

    >>> conditional_entropy(torch.tensor([0, 0, 1, 1]), torch.tensor([9, 9, 3, 3]))
    0.0
    """
    require(len(labels) == len(given) > 0, "conditional_entropy needs one class of both kinds for each example",
            (len(labels), len(given)), "Align the two.")  # fmt: skip
    (y, classes), (z, width) = _from_zero(labels), _from_zero(given)
    pairs = torch.add(z, y, alpha=width)
    if classes * width < 4 * len(y):
        table = torch.bincount(pairs, minlength=classes * width)
        counts, mass = table, table.view(classes, width).sum(0)
    else:  # more cells than it takes to sort
        counts, mass = torch.unique(pairs, return_counts=True)[1], torch.bincount(z)
    whole = _weighted(mass)
    left_open = whole - _weighted(counts)  # sum of m log m over given classes, less that over pairs
    return left_open / len(y) if left_open > 1e-13 * whole else 0.0  # below is what rounding makes of zero


def _weighted(counts: Tensor) -> float:
    """The sum of c log c over counts (k,), read off how often each count occurs: few logarithms, however many cells."""
    often = torch.bincount(counts).double()
    c = torch.arange(len(often), dtype=torch.float64, device=counts.device)
    return float(torch.xlogy(c, c) @ often)


def _from_zero(values: Tensor) -> tuple[Tensor, int]:
    """Integers from 0, equal where the given ones are, and how many there may be: about the number of examples."""
    low, high = map(int, values.aminmax())
    if high - low < 4 * len(values):
        return (values.long() - low if low else values.long()), high - low + 1
    present, numbers = torch.unique(values, return_inverse=True)
    return numbers, len(present)
