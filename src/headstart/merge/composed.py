"""A frozen model plus a learned mixture of task vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.modules.batchnorm import _NormBase

from headstart.core.validate import require
from headstart.core.weights import fingerprint

from .scaled_vectors import Changes, Composition


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Learned coefficients with all that gives them a meaning.

    Attributes:
        coefficients: (vectors, blocks) or (vectors, blocks, groups).
        vectors: names, in the order of axis 0.
        blocks: names, in the order of axis 1.
        seed: of the groups of a partition.
        base: `fingerprint` of the weights they are added to.
    """

    coefficients: Tensor
    vectors: tuple[str, ...]
    blocks: tuple[str, ...]
    seed: int
    base: str


class Composed(nn.Module):
    """The model at theta_0 + sum_i A_ij tau_i; only A, `coefficients`, trains.

    Args:
        model: the frozen base.
        coefficients: A.
        changes: name of a tensor -> what the vectors add to it.
        columns: name of a tensor -> its column of A.
        vectors: names of the task vectors.
        blocks: names of the columns.
        seed: of the groups.
        linearised: expand the model to first order in A instead.
    """

    def __init__(
        self,
        model: nn.Module,
        coefficients: Tensor,
        changes: Mapping[str, Changes],
        columns: Mapping[str, int],
        *,
        vectors: tuple[str, ...],
        blocks: tuple[str, ...],
        seed: int,
        linearised: bool,
    ) -> None:
        super().__init__()
        self.model, self.coefficients = model, nn.Parameter(coefficients)
        self.changes, self.columns = dict(changes), dict(columns)
        self.vectors, self.blocks, self.seed, self.linearised = vectors, blocks, seed, linearised
        self.training = model.training
        self._hold_statistics()

    def weights(self) -> dict[str, Tensor]:
        """The composed parameters by name, with the gradient of A; the others are the base's own."""
        return self._added(lambda base: base)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not self.linearised:
            return functional_call(self.model, self.weights(), inputs, named)
        start = {name: self.model.get_parameter(name) for name in self.changes}
        change = self._added(torch.zeros_like)

        def output(weights: dict[str, Tensor]) -> Any:
            return functional_call(self.model, weights, inputs, named)

        value, slope = jvp(output, (start,), (change,))  # type: ignore[misc]
        return value + slope

    def plain(self) -> nn.Module:
        """A copy of the base with the composed weights; parameters that do not change are shared."""
        with torch.no_grad():
            new = {id(self.model.get_parameter(name)): weight for name, weight in self.weights().items()}
        memo: dict[int, object] = {
            id(p): nn.Parameter(new.get(id(p), p).detach(), requires_grad=False) for p in self.model.parameters()
        }
        return copy.deepcopy(self.model, memo)

    def mixture(self) -> Mixture:
        """A, with the names of its rows and columns and the fingerprint of the base. Cost: one pass over the base."""
        return Mixture(
            coefficients=self.coefficients.detach().clone(), vectors=self.vectors, blocks=self.blocks, seed=self.seed,
            base=fingerprint(self.model.state_dict()),
        )  # fmt: skip

    def take(self, mixture: Mixture) -> None:
        """Put learned coefficients in place.

        Raises:
            Refused: they were learned for other vectors, blocks, groups or another base.
        """
        mine = self.mixture()
        for what in ("vectors", "blocks", "seed", "base"):
            pair = getattr(mixture, what), getattr(mine, what)
            require(pair[0] == pair[1], f"A mixture must be of the same {what}", pair, "Apply Atlas as it was then.")
        shapes = tuple(mixture.coefficients.shape), tuple(mine.coefficients.shape)
        require(shapes[0] == shapes[1], "A mixture must have the same shape", shapes, "Set partition as it was then.")
        with torch.no_grad():
            self.coefficients.copy_(mixture.coefficients)

    def train(self, mode: bool = True) -> Composed:
        """Layers with running statistics stay in eval mode: the base's statistics are kept."""
        super().train(mode)
        self._hold_statistics()
        return self

    def _added(self, start: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        columns = self.coefficients.unbind(1)
        return {
            name: Composition.apply(  # type: ignore[no-untyped-call]
                start(self.model.get_parameter(name)), columns[self.columns[name]], changes
            )
            for name, changes in self.changes.items()
        }

    def _hold_statistics(self) -> None:
        for module in self.model.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                module.training = False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Composed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.changes = {name: changes.to(self.coefficients.device) for name, changes in self.changes.items()}
        return self
