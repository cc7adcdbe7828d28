"""Heads in closed form: logistic regression and shared-covariance Gaussians, folded into a plain linear layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from headstart.core.statistics import ClassStatistics
from headstart.core.surgery import with_head
from headstart.core.taps import layer_of


def gaussian_head(statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
    """Weight (c, d) and bias (c,) of the best linear head if each class were a Gaussian of one shared covariance.

    Features are scaled by their pooled within-class deviation; their correlation is shrunk towards the identity by the
    oracle approximating shrinkage of Chen et al. (2010), equation 23, which needs no tuning. Every class is held to be
    equally likely.

    Cost: O(d³), from one pass over the features.

    >>> x, y = torch.tensor([[0.0, 1.0], [0.2, 0.8], [3.0, 1.1], [3.1, 0.9]]), torch.tensor([0, 0, 1, 1])
    >>> weight, bias = gaussian_head(ClassStatistics.of(x, y, 2))
    >>> (x @ weight.T + bias).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    counts = statistics.counts
    means = statistics.sums / counts.clamp(min=1)[:, None]
    n, d = statistics.n - float((counts > 0).sum()), len(statistics.gram)
    within = statistics.gram - statistics.sums.T @ means
    if n < 1:  # one example a class says nothing about the spread within one: take that of all examples
        n, mean = max(1.0, statistics.n - 1), statistics.sums.sum(0) / max(1.0, statistics.n)
        within = statistics.gram - statistics.n * mean[:, None] * mean
    scale = (within.diagonal() / n).clamp(min=0).sqrt()
    # guards constant features: below this share of its size a deviation is rounding error of the sums
    scale = torch.maximum(scale, 1e-4 * (statistics.gram.diagonal() / (n + 1)).sqrt() + 1e-12)
    s = within / n / scale[:, None] / scale[None, :]
    trace, squares, one = s.trace(), s.square().sum(), torch.eye(d, dtype=s.dtype)
    shrink = ((1 - 2 / d) * squares + trace**2) / ((n + 1 - 2 / d) * (squares - trace**2 / d).clamp(min=1e-12))
    shrink = shrink.clamp(0.0, 1.0)
    s = (1 - shrink) * s + (shrink * trace / d + 1e-6) * one  # 1e-6 guards the factorisation of a singular matrix
    scaled = means / scale
    weight = torch.cholesky_solve(scaled.T, torch.linalg.cholesky(s)).T
    bias = -0.5 * (weight * scaled).sum(1)
    bias = torch.where(counts > 0, bias, bias.new_full((), float(bias.min()) - 30.0))  # a class never seen
    return (weight / scale).float(), bias.float()


def gaussian_head_with_unlabelled(
    statistics: ClassStatistics, unlabelled: Tensor, *, rounds: int = 10
) -> tuple[Tensor, Tensor]:
    """`gaussian_head` to which examples without labels contribute as well: expectation maximisation.

    Each round gives every unlabelled example a share in each class (its posterior under the head so far) and solves
    the head anew from all examples. Labels stay what they are. It helps where classes form clusters in the features
    and harms where they do not, so let held-out labels decide.

    Args:
        statistics: of the labelled features.
        unlabelled: (m, d) features.
        rounds: at most; it stops earlier when no example changes its most probable class.

    Cost: O(rounds (m d c + d³)).

    Reference: Nigam et al., Text classification from labeled and unlabeled documents using EM, 2000, section 5.
    """
    weight, bias = gaussian_head(statistics)
    x = unlabelled.double()
    gram = x.T @ x
    before = None
    for _ in range(rounds):
        share = (x @ weight.double().T + bias.double()).softmax(1)
        joined = replace(  # what the head does not read is left as it was
            statistics,
            gram=statistics.gram + gram,
            sums=statistics.sums + share.T @ x,
            counts=statistics.counts + share.sum(0),
        )
        weight, bias = gaussian_head(joined)
        now = share.argmax(1)
        if before is not None and torch.equal(now, before):
            break
        before = now
    return weight, bias


def headed(model: nn.Module, head: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy of the model whose head is this linear map; every parameter may be trained."""
    new = with_head(model, len(bias), head)
    layer = layer_of(new, head)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return new.requires_grad_(True)


def reset(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new random weights: what the architecture is worth without its pretraining.

    Layers re-initialise themselves. Parameters that belong to no such layer (a class token, a position table, a layer
    scale) are drawn from N(0, 0.02²) when they are matrices, else set to one, or to zero for a bias.
    """
    import copy

    from headstart.core.rng import seeded

    new = copy.deepcopy(model).requires_grad_(True)
    with seeded(seed), torch.no_grad():
        for module in new.modules():
            own = getattr(module, "reset_parameters", None)
            if callable(own):
                own()
                continue
            for name, p in module.named_parameters(recurse=False):
                if p.ndim > 1:
                    p.normal_(0.0, 0.02)
                else:
                    p.fill_(0.0 if "bias" in name else 1.0)
    return new
