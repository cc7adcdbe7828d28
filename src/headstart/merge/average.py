"""Average the weights of several models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import require
from headstart.core.weights import Weights, by_entry

PAPER = Paper(
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference "
    "time",
    authors="Wortsman et al.",
    year=2022,
    arxiv="2203.05482",
    code="https://github.com/mlfoundations/model-soups",
)


@dataclass(frozen=True, kw_only=True)
class Average:
    """One model that is the mean of several fine-tuned from the same start; costs nothing extra to run.

    Args:
        weights: how much each model counts, >= 0, in the order of the models; divided by their sum. None counts all
            alike, as the paper's uniform soup does.

    Use it when: the models share one pretrained start and one architecture, and there is no data to merge with.
    Not when: they were trained from different starts (align them first) or for conflicting tasks (see `Ties`).

    Cost: one pass; memory of one part of a model when streamed.

    Notes: sums in float64, so k copies of a model give it back bit for bit up to float32.

    Raises:
        Refused: no model, weights that do not fit the models, differing names or shapes, NaN.

    Reference: Wortsman et al. 2022, section 2 (uniform soup).

    >>> Average().merge([{"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}])
    {'w': tensor([2., 2.])}
    """

    weights: tuple[float, ...] | None = None
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"

    def __post_init__(self) -> None:
        given = (1.0,) if self.weights is None else self.weights
        good = all(math.isfinite(w) and w >= 0 for w in given) and sum(given) > 0
        require(good, "Average needs finite weights >= 0, not all 0", self.weights, "Pass one positive number a model.")

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return len(set(self.weights or ())) <= 1

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The mean of each tensor; integer tensors are copied from `base`, else from the first model."""
        return by_entry(self, models, base, importance)

    def combine_part(
        self, name: str, rows: Iterable[Tensor], base: Tensor | None, importance: Iterable[Tensor] | None, start: int
    ) -> Tensor:
        """See `Entrywise`."""
        require(importance is None, "Average counts whole models", "importance=", "Leave it out, or pass weights=.")
        total, given, k = torch.zeros(()), self.weights, 0
        for k, row in enumerate(rows, 1):
            weight = 1.0 if given is None else given[k - 1] if k <= len(given) else 0.0
            total = total + weight * row.double()
        require(given is None or len(given) == k, f"Average needs one weight for each of {k} models", len(given or ()),
                "Pass as many weights as models.")  # fmt: skip
        return total / (k if given is None else sum(given))


def greedy_soup(
    models: Sequence[Weights], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """The average of those models that make it better, best one first (the paper's greedy soup).

    Args:
        models: fine-tuned from one start for one task, with different settings.
        score: weights -> a number on validation data, higher is better.

    Returns:
        The averaged weights, and the models in them in the order they were taken.

    Cost: 2 k - 1 evaluations of k models.

    Raises:
        Refused: no model, differing names or shapes, NaN in weights or scores.

    Reference: Wortsman et al. 2022, recipe 1.

    >>> models = [{"w": torch.tensor([value])} for value in (3.0, 0.0, 9.0)]
    >>> greedy_soup(models, lambda weights: -abs(float(weights["w"]) - 2))
    ({'w': tensor([1.5000])}, [0, 1])
    """
    alone = [score(Average().merge([model])) for model in models]
    require(all(map(math.isfinite, alone)), "A greedy soup needs finite scores", alone, "Leave such models out.")
    order = sorted(range(len(models)), key=lambda k: -alone[k])
    taken = order[:1]
    best, soup = alone[order[0]] if order else 0.0, Average().merge([models[k] for k in taken])
    for k in order[1:]:
        tried = Average().merge([models[j] for j in (*taken, k)])
        if (value := score(tried)) >= best:
            best, soup, taken = value, tried, [*taken, k]
    return soup, taken
