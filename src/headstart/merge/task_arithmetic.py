"""Add what several fine-tuned models learned to the model they started from, or take it away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.weights import Weights, by_entry

from .elect import Election, Thinned, needs_base

PAPER = Paper(
    title="Editing Models with Task Arithmetic",
    authors="Ilharco et al.",
    year=2022,
    arxiv="2212.04089",
    code="https://github.com/mlfoundations/task_vectors",
)


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """The start plus the sum of what each model learned: several tasks in one model, or with a weight below 0 one less.

    Args:
        scale: what the sum of the changes is multiplied by (lambda), finite; the paper chooses it on validation data,
            near 0.3 to 0.4 for many tasks.
        weights: how much each model counts, < 0 to forget; None counts all alike.
        normalise: divide by the sum of the weights, as a weighted average does.

    Shape: state dicts of one architecture; integer tensors are copied from `base`.

    Use it when: tasks differ, the models share one start, and there is data to choose `scale` on.
    Not when: tasks conflict (see `Ties`), or there is no data (see `Average`).

    Cost: one pass; memory of one part of a model when streamed.

    Raises:
        Refused: no base, weights that do not fit the models, differing names or shapes, NaN.

    Reference: Ilharco et al. 2022, section 2.

    >>> import torch
    >>> base, one, two = ({"w": torch.tensor([value])} for value in (1.0, 2.0, 5.0))
    >>> TaskArithmetic(scale=0.5).merge([one, two], base=base)
    {'w': tensor([3.5000])}
    """

    scale: float = 0.4
    weights: tuple[float, ...] | None = None
    normalise: bool = False
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"

    def __post_init__(self) -> None:
        self._election()

    def _election(self) -> Election:
        return Election(elect=None, combine="mean" if self.normalise else "sum", weights=self.weights, scale=self.scale)

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return self._election().symmetric

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return by_entry(self, models, base, importance)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Thinned:
        """Checks only; nothing is read."""
        needs_base("TaskArithmetic", base, importance)
        return Thinned(self._election(), lambda _name, _k, change, _start: change, len(models))
