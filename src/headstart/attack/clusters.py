"""Tokens of a picture as a few clusters, and how much of one picture's clusters is found in another's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from headstart.core.validate import finite, require


def cluster_means(
    tokens: Tensor, clusters: int, draws: Sequence[Generator], *, rounds: int = 100, tolerance: float = 1e-4
) -> Tensor:
    """The means of the clusters that k-means finds among each picture's tokens, with the gradient of a mean.

    Args:
        tokens: (n, p, d), finite.
        clusters: 1 to p.
        draws: one generator for each picture, of the points it starts from: different tokens as far as there are any.
        rounds: at most this many, >= 1.
        tolerance: stop when the means together move less, >= 0; each picture stops on its own.

    Returns:
        (n, clusters, d). Which token belongs to which cluster is taken as given: the gradient goes through the means
        only. A cluster that loses all its tokens keeps its place, without gradient.

    Cost: O(n p d clusters) a round, all pictures together.

    Raises:
        Refused: more clusters than tokens, as many generators as not pictures, NaN.

    >>> tokens = torch.tensor([[[0.0], [1.0], [9.0], [11.0]]])
    >>> sorted(cluster_means(tokens, 2, [Generator().manual_seed(0)]).flatten().tolist())
    [0.5, 10.0]
    """
    n, p, _ = tokens.shape
    require(1 <= clusters <= p, f"k-means needs 1 <= clusters <= {p}, the tokens of a picture", clusters, "Lower it.")
    require(len(draws) == n and rounds >= 1, "k-means needs a generator for each picture and rounds >= 1",
            (len(draws), rounds), f"Pass {n} of them.")  # fmt: skip
    finite("tokens", tokens, "Check the encoder for NaN.")
    points = tokens.detach()
    means = torch.stack([_start(row, clusters, generator) for row, generator in zip(points, draws, strict=True)])
    done = torch.zeros(n, 1, 1, dtype=torch.bool, device=tokens.device)
    for _ in range(rounds):
        moved = _means(points, _belongs(points, means), means)
        shift = (moved - means).flatten(1).norm(dim=1)[:, None, None]
        means = torch.where(done, means, moved)
        done = done | (shift < tolerance)
        if bool(done.all()):
            break
    return _means(tokens, _belongs(points, means), means)


def _start(tokens: Tensor, clusters: int, generator: Generator) -> Tensor:
    """Random tokens, those that repeat an earlier one last."""
    shuffled = tokens[torch.randperm(len(tokens), generator=generator).to(tokens.device)]
    which = torch.unique(shuffled, dim=0, return_inverse=True)[1]
    repeats = (which[:, None] == which).tril(-1).any(1)
    return shuffled[repeats.byte().argsort(stable=True)[:clusters]]


def _belongs(points: Tensor, means: Tensor) -> Tensor:
    """(n, clusters, p): 1 where a token is nearest to a mean."""
    nearest = torch.cdist(points, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
    return F.one_hot(nearest, means.shape[1]).mT.to(points)


def _means(tokens: Tensor, belongs: Tensor, empty: Tensor) -> Tensor:
    counts = belongs.sum(2, keepdim=True)
    return torch.where(counts > 0, belongs @ tokens / counts.clamp_min(1), empty)


def coupling(similarity: Tensor, *, regularisation: float = 0.1, tolerance: float = 1e-2, rounds: int = 100) -> Tensor:
    """How to spread equal shares of m columns over n rows so that alike things meet: Sinkhorn's plan, (..., n, m).

    Args:
        similarity: (..., n, m); 1 - similarity is the cost.
        regularisation: weight of the entropy, > 0 (paper's code: 0.1); as it goes to 0 the plan becomes the best one.
        tolerance: stop when the row factors change by less on average, > 0 (paper's code: 1e-2).
        rounds: at most this many, >= 1 (paper's code: 100).

    Returns:
        (..., n, m) float64, without gradient. Columns sum to 1 / m; rows to 1 / n as nearly as the tolerance asks.

    Notes: POT's `ot.sinkhorn` stops by the error of the marginals, looked at every ten rounds, and takes one problem at
    a time. The published rule stops far earlier, and a batch of many small problems must not wait for each other, so
    the rounds are written here, in logarithms, where a small regularisation divides nothing by zero. Solved to the end
    both give the same plan.

    >>> coupling(torch.eye(2)).round(decimals=3)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    require(regularisation > 0 and tolerance > 0 and rounds >= 1, "Sinkhorn needs regularisation, tolerance > 0 and "
            "rounds >= 1", (regularisation, tolerance, rounds), "The defaults are the paper's code's.")  # fmt: skip
    kernel = (similarity.detach().double() - 1) / regularisation
    rows, columns = kernel.new_zeros(kernel.shape[:-1]), kernel.new_zeros((*kernel.shape[:-2], kernel.shape[-1]))
    u, v = -torch.tensor(kernel.shape[-2:], dtype=kernel.dtype, device=kernel.device).log()  # of 1 / n and 1 / m
    done = torch.zeros(kernel.shape[:-2], dtype=torch.bool, device=kernel.device)
    for _ in range(rounds):
        next_rows = u - (kernel + columns[..., None, :]).logsumexp(-1)
        next_columns = v - (kernel + next_rows[..., None]).logsumexp(-2)
        change = (next_rows.exp() - rows.exp()).abs().mean(-1)
        rows = torch.where(done[..., None], rows, next_rows)
        columns = torch.where(done[..., None], columns, next_columns)
        done = done | (change < tolerance)
        if bool(done.all()):
            break
    return (rows[..., None] + kernel + columns[..., None, :]).exp()


def ot_similarity(
    a: Tensor, b: Tensor, *, regularisation: float = 0.1, tolerance: float = 1e-2, rounds: int = 100
) -> Tensor:
    """The mean cosine of the rows of a with those of b that optimal transport brings them to, in [-1, 1].

    Args:
        a: (..., n, d) vectors, of any length.
        b: (..., m, d).
        regularisation: see `coupling`, as tolerance and rounds.

    Returns:
        (...) like a. The gradient goes through the cosines, not through the plan.

    Cost: O(n m) a round.

    Raises:
        Refused: shapes that do not fit, NaN.

    Reference: Jia et al. 2025, the local optimal transport loss.

    >>> ot_similarity(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 5.0], [3.0, 0.0]]))
    tensor(1.0000)
    """
    good = a.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-1] and min(a.numel(), b.numel()) > 0
    require(
        good, "ot_similarity needs rows (..., n, d) and (..., m, d)", (tuple(a.shape), tuple(b.shape)), "Align them."
    )
    for rows in (a, b):
        finite("rows", rows, "Check the encoder for NaN.")
    cosines = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
    plan = coupling(cosines, regularisation=regularisation, tolerance=tolerance, rounds=rounds)
    return (plan.to(cosines) * cosines).sum((-2, -1))
