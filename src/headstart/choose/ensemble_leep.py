"""Score a set of models, to be used as an ensemble, by how well their own classes predict the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.core.evidence import Evidence
from headstart.core.paper import Paper
from headstart.core.validate import finite, require

from .leep import expected_prediction_of

PAPER = Paper(
    title="Transferability Metrics for Selecting Source Model Ensembles",
    authors="Agostinelli et al.",
    year=2022,
    arxiv="2111.13011",
)


def same_examples(evidence: Sequence[Evidence]) -> Tensor:
    """The labels (n,) that all models of a set share; refuses an empty set and models that saw other examples."""
    require(len(evidence) > 0, "A set score needs at least one model", 0, "Pass one Evidence for each model.")
    first, *others = (e.need("labels")[0] for e in evidence)
    for k, labels in enumerate(others, 1):
        same = len(labels) == len(first) and torch.equal(labels.to(first.device).long(), first.long())
        got = f"{len(labels)} after {len(first)}" if len(labels) != len(first) else "other labels"
        require(same, "All models of a set need evidence on the same examples, in one order", f"{got} in model {k}",
                "Extract from all models with one unshuffled stream.")  # fmt: skip
    return first


def expected_predictions(evidence: Sequence[Evidence]) -> Tensor:
    """Each model's expected empirical prediction of each label, (k, n): all that the scores of any subset need.

    Args:
        evidence: of each model, with logits and labels, on the same examples.

    Cost: O(n s) a model; then a score of k models costs O(k n), whichever they are.

    Raises:
        Refused: no model, other examples, no logits, no labels, fewer than two classes.

    >>> from itertools import combinations
    >>> g = torch.Generator().manual_seed(0)
    >>> zoo = [Evidence(features=x, logits=x, labels=torch.arange(20) % 2) for x in torch.randn(4, 20, 3, generator=g)]
    >>> cached = expected_predictions(zoo)
    >>> max(combinations(range(4), 2), key=lambda pair: ELEEP().score_predictions(cached[list(pair)]))
    (1, 3)
    """
    same_examples(evidence)
    return torch.stack([expected_prediction_of(e).cpu() for e in evidence])


@dataclass(frozen=True, kw_only=True)
class ELEEP:
    """How likely the labels are when the models of a set vote with equal weight; 0 is the best.

    The mean log of the models' average expected empirical prediction: LEEP of the ensemble. A model that fails where
    the others succeed costs little.

    Shape: of each model, logits (n, s) over its own classes; the labels (n,) of all are the same; at most 0.

    Use it when: choosing which few of many models with classifiers to fine-tune and average.
    Not when: models have no classifier of their own, or one model is wanted (see `LEEP`).

    Cost: O(n s) a model; any subset O(k n) from `expected_predictions`.

    Notes: of one model this is LEEP; of k, never less than the mean of their LEEPs (`MSLEEP` / k).

    Raises:
        Refused: no model, other examples, no logits, no labels, fewer than two classes, NaN.

    Reference: Agostinelli et al. 2022, section 3 (E-LEEP).

    >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    >>> pair = [Evidence(features=x, logits=x, labels=torch.tensor([0, 1, 0])) for x in logits]
    >>> ELEEP().score_set(pair) > MSLEEP().score_set(pair) / 2
    True
    """

    def score_set(self, evidence: Sequence[Evidence]) -> float:
        """The mean log of the averaged predictions."""
        return self.score_predictions(expected_predictions(evidence))

    def score_predictions(self, predictions: Tensor) -> float:
        """The same from the rows of `expected_predictions` of the models in the set, (k, n)."""
        return float(_checked(predictions).mean(0).log().mean())


@dataclass(frozen=True, kw_only=True)
class MSLEEP:
    """The sum of the LEEPs of a set's models, each judged as if it stood alone; 0 is the best.

    The mean log likelihood of the labels under all models as independent witnesses.

    Shape: of each model, logits (n, s) over its own classes; the labels (n,) of all are the same; at most 0.

    Use it when: comparing sets of equally many models, as the plainest baseline for `ELEEP`.
    Not when: sets differ in size: each further model lowers the sum.

    Cost: O(n s) a model; any subset O(k n) from `expected_predictions`.

    Notes: of one model this is LEEP. The best set of k models is the k models of highest LEEP.

    Raises:
        Refused: no model, other examples, no logits, no labels, fewer than two classes, NaN.

    Reference: Agostinelli et al. 2022, section 3 (MS-LEEP).

    >>> logits = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    >>> evidence = Evidence(features=logits, logits=logits, labels=torch.tensor([0, 1, 0]))
    >>> MSLEEP().score_set([evidence, evidence]) == 2 * MSLEEP().score_set([evidence])
    True
    """

    def score_set(self, evidence: Sequence[Evidence]) -> float:
        """The sum over models of the mean log prediction."""
        return self.score_predictions(expected_predictions(evidence))

    def score_predictions(self, predictions: Tensor) -> float:
        """The same from the rows of `expected_predictions` of the models in the set, (k, n)."""
        return float(_checked(predictions).log().mean(1).sum())


def _checked(predictions: Tensor) -> Tensor:
    whole = predictions.ndim == 2 and predictions.numel() > 0
    require(whole, "Predictions must be (models, examples), neither of them 0", tuple(predictions.shape),
            "Pass rows of expected_predictions(evidence).")  # fmt: skip
    finite("predictions", predictions)
    low, high = float(predictions.min()), float(predictions.max())
    require(low > 0 and high <= 1 + 1e-9, "Predictions must lie in (0, 1]", f"{low} to {high}",
            "Pass rows of expected_predictions(evidence).")  # fmt: skip
    return predictions.double()
