"""Learn from a few examples how much of each task vector to add to each block of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import CrossEntropy, Step, Term
from headstart.core.stream import as_batch
from headstart.core.surgery import freeze
from headstart.core.taps import tapped
from headstart.core.validate import one_of, require
from headstart.core.weights import Weights, wider

from .composed import Composed
from .scaled_vectors import Changes
from .vector_places import changes_of, composed_places

PAPER = Paper(
    title="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
    authors="Frederic Z. Zhang and Paul Albert and Cristian Rodriguez-Opazo and Anton van den Hengel and "
    "Ehsan Abbasnejad",
    year=2024,
    arxiv="2407.02880",
    code="https://github.com/fredzzhang/atlas",
    departs="Tensors are matched by name instead of by place, vectors in half precision keep a scale, and gradients "
    "are inner products instead of a graph through the sum, clipped after unscaling.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Atlas:
    """A model that learns a new task from few examples, out of what related models learned: all that is trained is how
    much of each of their changes is added to each of its tensors.

    The weights are theta_0 + sum_i A_ij tau_i in each block j. A starts at zero, so the model starts as the base, and
    `fold` gives the plain model with these weights, no slower than the base.

    Args:
        vectors: name -> what fine-tuning changed, as from `diff_vector`; of full or low-rank tuning alike, and never
            the target's own. The paper takes 8 to 22.
        blocks: "tensor" has one coefficient a vector and parameter tensor (the paper's), "model" one a vector
            (isotropic); or a function, name of a tensor -> name of its block.
        partition: None, or K >= 1: the entries of each matrix fall into K random groups with a coefficient each, and
            other tensors stay (the paper's aTLAS x K, for more data).
        linearised: expand the model to first order in A around the base, for vectors that were trained so. It has no
            plain form, and `fold` gives it back.
        layers: shell pattern over dotted names of layers or parameters, comma for or, of what is composed. Vectors
            must name all of these; the rest, a frozen head for instance, stays the base's.
        keep: (vectors, blocks) of bool, which changes take part, as from `strongest`; None takes all.
        half: keep the vectors in float16, with a scale for each tensor.
        seed: of the groups; tensors of one shape share them.

    Use it when: models were fine-tuned from one start for related tasks, and labels of the new one are few.
    Not when: labels are many (fine-tune), or the new task is like none of the old.

    Cost: trains vectors x blocks (x K) numbers. Memory of the vectors in half precision; a step is one of the plain
        model and 2 x vectors x weights multiply-adds.

    Notes: train with `clipped(adamw(0.1, weight_decay=0.1))` and a cosine; for many tasks or without labels at 1e-3.
    Weight decay pulls towards the base. Tied weights count once, buffers stay the base's, and layers with running
    statistics stay in eval mode. Inside, a layer is called model.NAME. A head that is to train along is left out of
    `layers` and marked with requires_grad_() after `apply`.

    Raises:
        Refused: no vectors, missing or unknown names, other shapes, NaN, nothing to compose.

    Reference: Zhang et al. 2024; its few-shot, addition, negation, test-time and parameter-efficient settings.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> vectors = {"one": {"weight": torch.tensor([[1.0, 0.0]])}, "other": {"weight": torch.tensor([[0.0, 2.0]])}}
    >>> composed = Atlas(vectors=vectors).apply(model)
    >>> composed.coefficients.data[:] = torch.tensor([[0.5], [-1.0]])
    >>> folded = Atlas(vectors=vectors).fold(composed)
    >>> torch.allclose(folded.weight - model.weight, torch.tensor([0.5, -2.0]))
    True
    """

    vectors: Mapping[str, Weights] = field(repr=False)
    blocks: Literal["tensor", "model"] | Callable[[str], str] = "tensor"
    partition: int | None = None
    linearised: bool = False
    layers: str = "*"
    keep: Tensor | None = None
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.vectors) >= 1, "Atlas needs at least one task vector", "none", "Pass {name: difference}.")
        require(self.partition is None or 1 <= self.partition < 2**15, "Atlas needs partition from 1 to 32767, or None",
                self.partition, "Pass a number such as 4.")  # fmt: skip
        if isinstance(self.blocks, str):
            one_of("blocks", self.blocks, ["tensor", "model"])

    def apply(self, model: nn.Module) -> Composed:
        """A frozen copy of the model that trains `coefficients`, (vectors, blocks) or (vectors, blocks, K), only."""
        base, places = freeze(model), self._places(model)
        columns, blocks = self._columns(places)
        size = len(self.vectors), len(blocks)
        keep = torch.ones(size, dtype=torch.bool) if self.keep is None else self.keep.cpu()
        require(keep.shape == size and keep.dtype == torch.bool, f"keep must be bool of shape {size}",
                (keep.dtype, tuple(keep.shape)), "Pass what `strongest` gives for this model.")  # fmt: skip
        groups: dict[torch.Size, Tensor] = {}
        changes, still = {}, set(range(len(self.vectors)))
        for name, aliases in places.items():
            like = base.get_parameter(name)
            moving = [(row, change) for row, change in changes_of(self.vectors, aliases) if change.any()]
            still -= {row for row, _ in moving}
            if kept := [(row, change) for row, change in moving if keep[row, columns[name]]]:
                if self.partition and like.shape not in groups:
                    groups[like.shape] = self._groups(like)
                changes[name] = Changes.of(kept, like, self.half, groups.get(like.shape))
        if still:
            unmoved = [name for row, name in enumerate(self.vectors) if row in still]
            warnings.warn(f"Task vectors that change nothing: {unmoved}. Leave them out.", stacklevel=2)
        first = base.get_parameter(next(iter(places)))
        start = torch.zeros(*size, *filter(None, [self.partition]), dtype=wider(first.dtype), device=first.device)
        return Composed(
            base, start, changes, columns, vectors=tuple(self.vectors), blocks=blocks, seed=self.seed,
            linearised=self.linearised,
        )  # fmt: skip

    def fold(self, model: nn.Module) -> nn.Module:
        """The plain model with the composed weights; a linearised one as it is."""
        return model.plain() if isinstance(model, Composed) and not model.linearised else model

    def score_blocks(self, model: nn.Module, batch: Any, term: Term | None = None) -> Tensor:
        """How steeply the loss changes with each coefficient at A = 0, (vectors, blocks), summed over groups.

        Args:
            model: the base.
            batch: what to look at, as `term` reads it.
            term: the loss; by default cross-entropy.

        Cost: one pass of the model, then each vector is read once, a tensor at a time; nothing is kept.
        """
        base, places = freeze(model).eval(), self._places(model)
        columns, blocks = self._columns(places)
        term = CrossEntropy() if term is None else term
        weights = {name: base.get_parameter(name).requires_grad_() for name in places}
        with torch.enable_grad(), tapped(base, term.taps) as recorded:
            loss = term(Step(base, as_batch(batch), recorded=recorded))
        slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        scores = torch.zeros(len(self.vectors), len(blocks), dtype=torch.float64)
        for name, slope in zip(weights, slopes, strict=True):
            for row, change in changes_of(self.vectors, places[name]) if slope is not None else ():
                scores[row, columns[name]] += float((change.to(slope.device).double() * slope).sum())
        return scores

    def _columns(self, places: Mapping[str, list[str]]) -> tuple[dict[str, int], tuple[str, ...]]:
        """Name of a tensor -> number of its block, and the names of the blocks."""
        of: Callable[[str], str] = {"tensor": str, "model": lambda _name: "model"}.get(self.blocks, self.blocks)  # type: ignore
        blocks = tuple(dict.fromkeys(map(of, places)))
        return {name: blocks.index(of(name)) for name in places}, blocks

    def _places(self, model: nn.Module) -> dict[str, list[str]]:
        found = composed_places(model, self.layers, self.vectors)
        matrices = {name: names for name, names in found.items() if model.get_parameter(name).ndim == 2}
        require(not self.partition or bool(matrices), "partition= needs a matrix", list(found)[:3], "Leave it out.")
        return matrices if self.partition else found

    def _groups(self, like: Tensor) -> Tensor:
        """A group for each entry, of sizes that differ by one at most."""
        assert self.partition is not None
        shuffled = torch.randperm(like.numel(), generator=torch.Generator().manual_seed(self.seed))
        return (shuffled % self.partition).to(like.device, torch.int16)


def strongest(scores: Tensor, budget: int) -> Tensor:
    """Which changes to keep: in each block those of the `budget` vectors whose coefficients matter most, for `keep`.

    >>> strongest(torch.tensor([[0.1, -5.0], [-2.0, 1.0]]), 1)
    tensor([[False,  True],
            [ True, False]])
    """
    require(1 <= budget <= len(scores), f"A budget is from 1 to {len(scores)} vectors", budget, "Change it.")
    best = scores.abs().topk(budget, dim=0).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, True)
