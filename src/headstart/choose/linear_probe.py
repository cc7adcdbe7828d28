"""Score a model by a linear classifier on its features, on examples that were left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.paper import Paper
from headstart.core.validate import require

PAPER = Paper(
    title="Understanding intermediate layers using linear classifier probes",
    authors="Alain & Bengio",
    year=2016,
    arxiv="1610.01644",
    departs="Cross-validates where the paper holds out one test set.",
)
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """The accuracy of a linear classifier on frozen features, over examples it was not fitted on; higher is better.

    Args:
        folds: parts of the cross-validation, >= 2; each class is dealt out to them as evenly as it can be.
        strength: inverse of the squared penalty on weights, > 0, of multinomial logistic regression on features
            that have mean 0 and variance 1 in the training part.
        seed: of the dealing.
        closed_form: in place of all this, a ridge regression on one-hot labels with exact leave-one-out and the best
            of five penalties: no chance in it, and several times as fast.

    Shape: features (n, d), labels (n,); between 0 and 1.

    Use it when: a head on frozen features is what will be trained, and a second for each model can be spared.
    Not when: thousands of models or classes are to be ranked, or for what full fine-tuning will reach.

    Cost: folds fits of O(n min(n, d) c) a round, at most 500 rounds; closed form O(n d min(n, d)), once.

    Notes: shifting features and scaling each of them changes nothing. The order of examples decides who is dealt to
    which fold, the names of classes do not. The closed form standardises on all examples, without their labels;
    where features say nothing it falls below chance, as each example makes its own class rarer by leaving.

    Raises:
        Refused: fewer than two classes, no labels, NaN, folds < 2, strength <= 0.

    Reference: Alain and Bengio 2016, section 3.

    >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> evidence = Evidence(features=features, labels=torch.tensor([0, 0, 1, 1]))
    >>> LinearProbe(folds=2).score(evidence), LinearProbe(closed_form=True).score(evidence)
    (1.0, 1.0)
    """

    folds: int = 5
    strength: float = 1.0
    seed: int = 0
    closed_form: bool = False

    def __post_init__(self) -> None:
        require(self.folds >= 2, "LinearProbe needs folds >= 2", self.folds, "Pass a number such as 5.")
        require(self.strength > 0, "LinearProbe needs strength > 0", self.strength, "Pass a number such as 1.")

    def score(self, evidence: Evidence) -> float:
        """Accuracy over left-out examples."""
        features, labels = evidence.need("features", "labels")
        labels, classes = classes_of(labels.cpu())
        x = features.double().cpu()
        if self.closed_form:
            return closed_form(x, labels)[0]
        first = [int((labels == c).nonzero()[0]) for c in range(classes)]  # names of classes shall not matter
        labels = torch.tensor(first).argsort().argsort()[labels]
        fold, hits = folds_of(labels, self.folds, self.seed), 0
        for k in range(self.folds):
            train, held = fold != k, fold == k
            z, mean, scale = standardised(x[train])
            new = (x[held] - mean) / scale
            if z.shape[1] > len(z):  # the penalty is blind to rotation, and the weights stay in the span of the rows
                axes = torch.linalg.qr(z.T).Q
                z, new = z @ axes, new @ axes
            weight, bias = logistic(
                z.numpy(), labels[train].numpy(), classes, self.strength, tolerance=1e-4, rounds=500
            )
            hits += int((torch.from_numpy(new.numpy() @ weight.T + bias).argmax(1) == labels[held]).sum())
        return hits / len(labels)


def folds_of(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold (n,) of each example; every class is dealt out as evenly as it can be.

    >>> folds_of(torch.tensor([0, 0, 1, 1]), 2, seed=0).bincount().tolist()
    [2, 2]
    """
    require(folds >= 2, "Cross-validation needs folds >= 2", folds, "Pass 2 or more.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[torch.sort(labels[order], stable=True).indices]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def closed_form(features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Exact leave-one-out accuracy of a ridge classifier, and which examples (n,) it gets right.

    One singular value decomposition serves every penalty: with hat matrix H, the residual of a left-out example is
    its residual divided by 1 - H_ii. The penalty with the smallest left-out squared error is taken.

    Cost: O(n d min(n, d)), once.

    >>> closed_form(torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.tensor([0, 0, 1, 1]))[0]
    1.0
    """
    x, _, _ = standardised(features)
    y = F.one_hot(labels).double()
    share = y.mean(0)
    y = y - share
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ y
    best, right = float("inf"), torch.zeros(len(labels), dtype=torch.bool)
    for penalty in (s.square().mean() * 10.0**power for power in (-2, -1, 0, 1, 2)):
        shrink = torch.where(s > 0, s.square() / (s.square() + penalty), 0.0)  # no spread, no penalty: guards 0 / 0
        hat = (u.square() @ shrink + 1 / len(y)).clamp(max=1 - 1e-9)  # 1 where n <= d and no penalty: guards 0 / 0
        left_out = y - (y - u @ (shrink[:, None] * projected)) / (1 - hat)[:, None]
        error = float((left_out - y).square().sum())
        if error < best:
            best, right = error, (left_out + share).argmax(1) == labels
    return float(right.double().mean()), right


def standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns with mean 0 and variance 1 in float64, with that mean and scale; constant columns become 0."""
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-7 * (scale.amax() + mean.abs()), scale, torch.inf)
    return (x - mean) / scale, mean, scale


def logistic(
    z: Array, y: NDArray[np.int64], classes: int, strength: float, *, tolerance: float = 1e-3, rounds: int = 300
) -> tuple[Array, Array]:
    """Weight (classes, k) and bias (classes,); a class that `y` lacks gets no weight and a bias below all others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = np.unique(y)
    weight, bias = np.zeros((classes, z.shape[1])), np.full(classes, -30.0)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, tol=tolerance, max_iter=rounds).fit(z, y)
    two = len(present) == 2  # one column of coefficients: half for the second class, minus half for the first
    weight[present] = np.concatenate([-model.coef_, model.coef_]) / 2 if two else model.coef_
    bias[present] = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
    return weight, bias
