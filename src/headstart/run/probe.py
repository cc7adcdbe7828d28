"""Linear heads on frozen features: an exact leave-one-out ridge, and cross-validated logistic regression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from headstart.core.validate import require

STRENGTHS = (0.003, 0.03, 0.3)
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What cross-validation says about a logistic head.

    Attributes:
        accuracy: mean over repeats of the out-of-fold accuracy.
        right: (n,) share of repeats in which each example was classified correctly while held out.
        strength: the inverse penalty with the lowest out-of-fold log loss.
    """

    accuracy: float
    right: Tensor
    strength: float


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
    x, _, _ = _standardised(features)
    y = F.one_hot(labels).double()
    y = y - y.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ y
    best, right = float("inf"), torch.zeros(len(labels), dtype=torch.bool)
    for penalty in (s.square().mean() * 10.0**power for power in (-2, -1, 0, 1, 2)):
        shrink = s.square() / (s.square() + penalty)
        hat = (u.square() @ shrink + 1 / len(y)).clamp(max=1 - 1e-9)  # 1 where n <= d and no penalty: guards 0 / 0
        left_out = y - (y - u @ (shrink[:, None] * projected)) / (1 - hat)[:, None]
        error = float((left_out - y).square().sum())
        if error < best:
            best, right = error, left_out.argmax(1) == labels
    return float(right.double().mean()), right


def cross_validated(
    features: Tensor,
    labels: Tensor,
    *,
    folds: int = 5,
    repeats: int = 3,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Probed:
    """Repeated stratified cross-validation of multinomial logistic regression on standardised features.

    The features are rotated to at most n dimensions first, which changes nothing: the L2 penalty is blind to rotation.

    Cost: folds x repeats x strengths fits, about 5 ms each for 100 examples.
    """
    x, _, _ = _standardised(features)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    z, y = (u * s).numpy(), labels.numpy()
    classes = int(y.max()) + 1
    losses, rights = np.zeros(len(strengths)), np.zeros((len(strengths), len(y)))
    for repeat in range(repeats):
        fold = folds_of(labels, folds, seed * 1_000 + repeat).numpy()
        for k in range(folds):
            train, held = fold != k, fold == k
            for i, strength in enumerate(strengths):
                weight, bias = _logistic(z[train], y[train], classes, strength)
                logits = torch.from_numpy(z[held] @ weight.T + bias)
                losses[i] += float(F.cross_entropy(logits, labels[held], reduction="sum"))
                rights[i, held] += (logits.argmax(1).numpy() == y[held]) / repeats
    best = int(losses.argmin())
    right = torch.from_numpy(rights[best])
    return Probed(accuracy=float(right.mean()), right=right, strength=strengths[best])


def fit_probe(features: Tensor, labels: Tensor, classes: int, *, strength: float = 0.03) -> tuple[Tensor, Tensor]:
    """Weight (classes, d) and bias (classes,) of a logistic head on the raw features, float32.

    Standardisation is folded into the head, so it can be put into the model as it is.

    Args:
        features: (n, d).
        labels: (n,), in 0..classes-1.
        classes: outputs of the head.
        strength: inverse L2 penalty (C of scikit-learn) on standardised features.

    >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    >>> weight, bias = fit_probe(x, torch.tensor([0, 0, 1, 1]), 2, strength=1.0)
    >>> (x @ weight.T + bias).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    x, mean, scale = _standardised(features)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    rotated, bias = _logistic((u * s).numpy(), labels.numpy(), classes, strength)
    weight = torch.from_numpy(rotated) @ v / scale
    return weight.float(), (torch.from_numpy(bias) - weight @ mean).float()


def _standardised(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns with mean 0 and variance 1 in float64, with that mean and scale; constant columns become 0."""
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-7 * (1 + mean.abs()), scale, torch.inf)
    return (x - mean) / scale, mean, scale


def _logistic(z: Array, y: NDArray[np.int64], classes: int, strength: float) -> tuple[Array, Array]:
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
        model = LogisticRegression(C=strength, tol=1e-3, max_iter=300).fit(z, y)
    two = len(present) == 2  # one column of coefficients: half for the second class, minus half for the first
    weight[present] = np.concatenate([-model.coef_, model.coef_]) / 2 if two else model.coef_
    bias[present] = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
    return weight, bias
