"""Merge linear layers so that the merged one gives what each model's gave on that model's own inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import finite, require
from headstart.core.weights import Weights, aligned, by_tensor

from .fisher_average import sources
from .layer_inputs import gram_matrices as gram_matrices

PAPER = Paper(
    title="Dataless Knowledge Fusion by Merging Weights of Language Models",
    authors="Xisen Jin and Xiang Ren and Daniel Preotiuc-Pietro and Pengxiang Cheng",
    year=2023,
    arxiv="2212.09849",
    code="https://github.com/bloomberg/dataless-model-merging",
    departs="Solves for the change from the average, so that directions no model has seen keep the average, and treats "
    "convolutions as linear layers on their patches.",
)


@dataclass(frozen=True, kw_only=True)
class RegMean:
    """One model out of several whose linear layers answer each model's inputs as that model's did, in least squares.

    W = argmin Σ_i |X_i Wᵀ - X_i W_iᵀ|², from the Gram matrices G_i = X_iᵀ X_i of the layers' inputs alone:
    Wᵀ = (Σ G_i)⁻¹ Σ G_i W_iᵀ. All other tensors are averaged.

    Args:
        alpha: what the entries of G_i off the diagonal are multiplied by, in [0, 1]; the paper's 0.9 (0.1 for T5). 1 is
            the least squares solution itself, 0 weighs each input by its mean square.

    Shape: state dicts of one architecture; importance by names of weights (out, ...): (d, d) with d the numbers of a
    row of the weight, from `gram_matrices`.

    Use it when: models share a start, and a few hundred inputs of each task are at hand, without labels.
    Not when: no inputs are left (see `Ties`), or one layer's inputs are too wide for d² numbers.

    Cost: O(d³ + k out d²) a layer in float64; memory of one layer's weights and Gram matrices. Measuring: one forward
    pass and O(d²) an example and layer.

    Notes: Gram matrices are sums: a model measured on twice the examples counts twice. Inputs that no model has seen
    keep the average's weights. Where the sum of the matrices is singular, which takes alpha = 1, the solution nearest
    to the average is taken, with a warning. A weight tied to another follows it.

    Raises:
        Refused: no Gram matrices, one of another shape, not symmetric, negative or NaN; differing names or shapes.

    Reference: Jin et al. 2023, equation 3 and section 3.3.

    >>> import torch
    >>> models = [{"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[0.0, 1.0]])}]
    >>> RegMean().merge(models, importance=[{"w": torch.diag(torch.tensor([3.0, 1.0]))}, {"w": torch.eye(2)}])
    {'w': tensor([[0.7500, 0.5000]])}
    """

    alpha: float = 0.9
    scope: ClassVar[Literal["tensor", "model"]] = "model"
    symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "RegMean needs 0 <= alpha <= 1", self.alpha, "The paper uses 0.9.")

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return self.survey(models, base=base, importance=importance).merge(models, base=base)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Solved:
        """Finds out which tensors have Gram matrices, their own or those of a tensor they are tied to."""
        names = aligned(models, base)
        require(importance is not None, "RegMean needs importance=, the Gram matrices of each model's inputs", None,
                "Pass [gram_matrices(model, inputs) for each model].")  # fmt: skip
        assert importance is not None
        require(len(importance) == len(models), f"RegMean needs Gram matrices of each of {len(models)} models",
                len(importance), "Measure the others.")  # fmt: skip
        return Solved(self.alpha, importance, sources(models, importance, names))


@dataclass(frozen=True)
class Solved:
    """Merges tensor by tensor, once it is known which tensors have Gram matrices (`source`: under which name)."""

    alpha: float
    grams: Sequence[Weights]
    source: Mapping[str, str]
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric: ClassVar[bool] = True

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged tensors of these models."""

        def combine(name: str, stacked: Tensor, _base: Tensor | None, _importance: Tensor | None) -> Tensor:
            mean = stacked.double().mean(0)
            if name not in self.source or mean.ndim < 2:
                return mean
            flat = mean.flatten(1)
            whole, pulled = flat.new_zeros(flat.shape[1], flat.shape[1]), torch.zeros_like(flat.T)
            for one, model in zip(self.grams, stacked, strict=True):
                own = self._gram(name, one[self.source[name]].to(flat), flat.shape[1])
                whole += own
                pulled += own @ (model.to(flat).flatten(1) - flat).T
            return mean + _solve(name, whole, pulled).T.reshape(mean.shape)

        return by_tensor(combine, models, base)

    def _gram(self, name: str, given: Tensor, d: int) -> Tensor:
        must = f"The Gram matrix of {name!r} must be symmetric, ({d}, {d}) and >= 0"
        require(given.shape == (d, d), must, tuple(given.shape), "Measure it with gram_matrices.")
        finite(f"the Gram matrix of {name!r}", given, "Measure it again.")
        scale = float(given.diagonal().abs().max()) if d else 0.0
        odd = float((given - given.T).abs().max()) if d else 0.0
        good = odd <= 1e-2 * scale and bool((given.diagonal() >= 0).all())
        require(good, must, f"a difference of {odd:.3g} or a negative diagonal", "Measure it with gram_matrices.")
        return self.alpha * given + (1 - self.alpha) * given.diagonal().diag()


def _solve(name: str, whole: Tensor, pulled: Tensor) -> Tensor:
    """X with whole X = pulled, of least norm where `whole` is singular; inputs never seen have zero rows in both."""
    scale = whole.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # with 1 on the diagonal a small pivot means a dependent input
    even = whole / scale / scale[:, None]
    even.diagonal().copy_(torch.ones_like(scale))
    factor, failed = torch.linalg.cholesky_ex(even)
    if not failed and (not len(even) or float(factor.diagonal().square().min()) > 1e-12):
        solved: Tensor = torch.cholesky_solve(pulled / scale[:, None], factor)
        return solved / scale[:, None]
    values, vectors = torch.linalg.eigh(whole)
    kept = values > 1e-12 * values[-1]
    warnings.warn(f"the inputs of {name!r} span {int(kept.sum())} of {len(values)} directions; the others keep the "
                  "average. Measure on more examples, or use alpha < 1.", stacklevel=2)  # fmt: skip
    seen = vectors[:, kept]
    nearest: Tensor = seen @ (seen.T @ pulled / values[kept, None])
    return nearest
