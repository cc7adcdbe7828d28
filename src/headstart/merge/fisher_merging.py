"""Average models, each weight of each model as much as its own predictions depend on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.shards import spec_of
from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, aligned

from .fisher_average import Measured, size_of, sources

PAPER = Paper(
    title="Merging Models with Fisher-Weighted Averaging",
    authors="Michael Matena and Colin Raffel",
    year=2022,
    arxiv="2111.09832",
    code="https://github.com/mmatena/model_merging",
    departs="Says what happens where no Fisher information is left (0 / 0), and can take the floor relative to each "
    "model's own Fisher.",
)


@dataclass(frozen=True, kw_only=True)
class FisherMerging:
    """One model out of several, in which each entry follows the models whose predictions depend on it.

    θ = Σ c_i F_i θ_i / Σ c_i F_i entry by entry, with F_i the diagonal Fisher information of model i on its own task
    (`importance`, from `diagonal_fisher`) and c_i = λ_i / |F_i|.

    Args:
        weights: λ_i >= 0, one a model, not all 0; only their ratios count. None takes all alike; the paper searches
            them (`search_weights`).
        normalize: divide λ_i by |F_i|, the root of the sum of squares over all merged tensors (paper). Without it, a
            model that is sure of everything has a small Fisher and loses its say.
        floor: the least Fisher an entry counts with, >= 0; the paper's 1e-6.
        floor_on: "target" raises the Fisher of the first model only (paper: where no model cares, its value stays);
            "all" raises that of all.
        relative: take the floor as a share of each model's root mean square Fisher.

    Shape: state dicts of one architecture; importance by the same names and shapes, >= 0.

    Use it when: the models share a pretrained start, and a few hundred inputs of each task are at hand (no labels).
    Not when: the models have no common start: the formula runs and the result is garbage.

    Cost: reads importance twice and weights twice (to find tied ones); memory of one tensor from each model.

    Notes: tensors that no Fisher names, such as running statistics and frozen weights, are averaged with weights λ_i;
    recompute running statistics after merging. A tied weight takes the Fisher of the name it is stored under, and is
    counted once. Where all c_i F_i are 0, the first model's value stays (floor_on "target", λ_0 > 0), else the average
    with weights c_i is taken. Leave heads that differ out of `models`.

    Raises:
        Refused: no importance, one that is negative, NaN, of another shape, lacks a tensor that another names, or is 0
            everywhere; weights that do not fit the models; differing names or shapes.

    Reference: Matena and Raffel 2022, equation 3 and section 3.

    >>> import torch
    >>> models = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}]
    >>> fishers = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 1.0])}]
    >>> FisherMerging().merge(models, importance=fishers)
    {'w': tensor([0.7500, 0.2500])}
    """

    weights: tuple[float, ...] | None = None
    normalize: bool = True
    floor: float = 1e-6
    floor_on: Literal["target", "all"] = "target"
    relative: bool = False
    scope: ClassVar[Literal["tensor", "model"]] = "model"

    def __post_init__(self) -> None:
        given = (1.0,) if self.weights is None else self.weights
        good = all(math.isfinite(w) and w >= 0 for w in given) and sum(given) > 0
        require(good, "FisherMerging needs finite weights >= 0, not all 0", self.weights, "Pass one a model.")
        require(0 <= self.floor < math.inf, "FisherMerging needs a finite floor >= 0", self.floor, "The paper's: 1e-6.")
        one_of("floor_on", self.floor_on, ["target", "all"])

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return self.floor_on == "all" and len(set(self.weights or ())) <= 1

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return self.survey(models, base=base, importance=importance).merge(models, base=base)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Measured:
        """One pass over the importance: how large it is, and how much of it lies below the floor."""
        names = aligned(models, base)
        require(importance is not None, "FisherMerging needs importance=, the Fisher of each model", None,
                "Pass [diagonal_fisher(model, inputs) for each model].")  # fmt: skip
        assert importance is not None
        require(len(importance) == len(models), f"FisherMerging needs a Fisher of each of {len(models)} models",
                len(importance), "Measure the others.")  # fmt: skip
        source = sources(models, importance, names)
        shapes = {name: spec_of(models[0], name).shape for name in dict.fromkeys(source.values())}
        found = [size_of(shapes, one, k, self._least(k), self.relative) for k, one in enumerate(importance)]
        low = max((share for k, (_, _, share) in enumerate(found) if self._least(k)), default=0.0)
        if low > 0.5:
            warnings.warn(f"{low:.0%} of a model's Fisher lies below the floor of {self.floor} and tells no weights "
                          "apart; lower floor=, or set relative=True with one such as 1e-3.", stacklevel=3)  # fmt: skip
        norms, floors = [norm for norm, _, _ in found], [floor for _, floor, _ in found]
        empty = [k for k, norm in enumerate(norms) if norm == 0]
        require(not (self.normalize and empty), "FisherMerging can normalize a Fisher that is not 0 everywhere",
                f"model {empty}", "Measure where the model is less sure, or set normalize=False.")  # fmt: skip
        if not self.normalize:
            norms = [1.0] * len(models)
        return Measured(self.weights, self.floor_on == "target", importance, source, norms, floors)

    def _least(self, k: int) -> float:
        """The floor of model k, as given."""
        return self.floor if k == 0 or self.floor_on == "all" else 0.0
