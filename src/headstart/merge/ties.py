"""Merge fine-tuned models whose changes interfere: trim, elect signs, average what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, aligned, by_entry

from .elect import Election, Thinned, needs_base
from .sparsify import distinct, grouped, keep_largest

PAPER = Paper(
    title="TIES-Merging: Resolving Interference When Merging Models",
    authors="Yadav et al.",
    year=2023,
    arxiv="2306.01708",
    code="https://github.com/prateeky2806/ties-merging",
    departs="Keeps exactly int(density * d) entries where the official code keeps one more, and all that tie with it.",
)


@dataclass(frozen=True, kw_only=True)
class Ties:
    """One model that does the tasks of several fine-tuned from the same start, without any data.

    Small changes are dropped, each position takes the sign with the larger total change, and only the changes of that
    sign are combined and added to the start.

    Args:
        density: share of its largest changes that each model keeps, in (0, 1]; one number for all or one each. The
            paper's k is 20 % (0.2).
        scale: what the merged change is multiplied by (lambda), finite; the paper's is 1 where there is no data to
            choose it on, else 0.8 to 2.5. With combine="sum" it is nearer to 1 / models.
        trim: "model" ranks the changes of the whole model together, as the paper does, and may empty whole layers;
            "tensor" keeps the same share of every tensor, and at least one entry, as peft and mergekit do.
        combine: "mean" (the paper's), "sum" or "max" of the changes that agree.
        weights: how much each model counts; None counts all alike, as the paper does.
        weigh: "before" the election, as mergekit, or "after" it, as peft, where a mean divides by how many agree.
        elect: the sign with the larger "total" change (the paper's) or of the larger "count" of models.

    Shape: state dicts of one architecture; integer tensors are copied from `base`.

    Use it when: several models were fine-tuned from one start for different tasks.
    Not when: there is data of all tasks to train on together, or the models have no common start.

    Cost: reads every weight twice, and for the last tie half of it again; memory of one part of a model when streamed.

    Notes: where the changes cancel exactly, the sign is the one that won most positions (of the model, or of the
    tensor). Magnitudes are compared as float32; equal ones at the edge are kept in the sorted order of names until the
    count is exact. A tied weight is counted once. Recompute running statistics after merging.

    Raises:
        Refused: no base, a density that keeps nothing, differing names or shapes, NaN.

    Reference: Yadav et al. 2023, algorithm 1.

    >>> import torch
    >>> base = {"w": torch.zeros(5)}
    >>> changes = [5, -1, 0.1, 3, 0], [-2, -4, 0.2, 3, 0.5], [1, 6, -0.3, -1.5, -0.4]
    >>> Ties(density=0.4).merge([{"w": torch.tensor(change)} for change in changes], base=base)
    {'w': tensor([5., 6., 0., 3., 0.])}
    """

    density: float | tuple[float, ...] = 0.2
    scale: float = 1.0
    trim: Literal["model", "tensor"] = "model"
    combine: Literal["mean", "sum", "max"] = "mean"
    weights: tuple[float, ...] | None = None
    weigh: Literal["before", "after"] = "before"
    elect: Literal["total", "count"] = "total"
    scope: ClassVar[Literal["tensor", "model"]] = "model"

    def __post_init__(self) -> None:
        densities = self.density if isinstance(self.density, tuple) else (self.density,)
        require(all(0 < one <= 1 for one in densities), "Ties needs 0 < density <= 1", self.density,
                "Pass a fraction such as 0.2.")  # fmt: skip
        one_of("trim", self.trim, ["model", "tensor"])
        one_of("elect", str(self.elect), ["total", "count"])
        self._election()

    def _election(self) -> Election:
        return Election(
            elect=self.elect, combine=self.combine, weights=self.weights, weigh=self.weigh, scale=self.scale
        )

    @property
    def symmetric(self) -> bool:
        """Whether the order of the models does not matter."""
        return self._election().symmetric and not isinstance(self.density, tuple)

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights; `merge_streaming` gives the same ones tensor by tensor."""
        return by_entry(self, models, base, importance)

    def survey(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> Thinned:
        """One pass over the models: what each of them keeps."""
        base = needs_base("Ties", base, importance)
        same = distinct(aligned(models, base), models, base)
        groups = grouped(same, base, self.trim)
        shares = self.density if isinstance(self.density, tuple) else (self.density,) * len(models)
        require(len(shares) == len(models), f"Ties needs one density, or one for each of {len(models)} models",
                len(shares), "Pass as many as models.")  # fmt: skip

        def count(entries: int) -> list[int]:
            least = 1 if self.trim == "tensor" else 0  # or tensors of one entry would never change
            kept = [max(least, int(share * entries)) for share in shares]
            require(min(kept) > 0, f"Ties needs a density that keeps one of {entries} entries", self.density,
                    "Raise it.")  # fmt: skip
            return kept

        trim = keep_largest(groups, same, models, base, count)
        return Thinned(self._election(), trim, len(models), groups, same)
