"""An adapter put on its base, lazily, so that any merge rule takes it as a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from headstart.core.validate import require, suggestion
from headstart.core.weights import Spec, Weights, reader, spec_of

from .adapters import Adapter
from .low_rank import Factors


class Folded(Mapping[str, Tensor]):
    """What `fold_adapter` returns; read whole, or in parts by `spec` and `part` as `LazyWeights` is."""

    def __init__(self, base: Weights, changes: Mapping[str, Factors], dtype: torch.dtype | None) -> None:
        self.base, self.changes, self.dtype = base, changes, dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.changes:
            return self.base[name]
        spec = self.spec(name)
        return self.part(name, 0, spec.entries).view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def spec(self, name: str) -> Spec:
        """Dtype and shape, without reading the tensor."""
        spec = spec_of(self.base, name)
        return replace(spec, dtype=self.dtype or spec.dtype) if name in self.changes else spec

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 of the flattened tensor."""
        old = reader(self.base, name)(start, stop)
        if name not in self.changes:
            return old
        factors = self.changes[name]
        width = max(factors.shape[1], 1)
        first = start // width
        change = factors.dense(first, -(-stop // width)).reshape(-1)[start - first * width : stop - first * width]
        wide = torch.promote_types(old.dtype, change.dtype)
        return (old.to(wide) + change.to(old.device, wide)).to(self.dtype or old.dtype)


def fold_adapter(base: Weights, adapter: Adapter, *, dtype: torch.dtype | None = None) -> Folded:
    """The full weights of base + adapter, tensor by tensor as they are asked for: a model for any merge rule.

    Args:
        base: weights of the model that the adapter was trained on.
        adapter: see `read_adapter`; layer X changes the tensor X.weight.
        dtype: of the changed tensors; None keeps the base's. In half precision most of a small change is lost, so pass
            torch.float32 where differences from the base are merged.

    Cost: base + (out + in) · rank read; out · in · rank operations a tensor, when it is asked for.

    Raises:
        Refused: a layer that the base lacks (with the nearest name), or of another shape.

    >>> base = {"layer.weight": torch.eye(2), "layer.bias": torch.zeros(2)}
    >>> adapter = {"layer": Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]]), scale=2.0)}
    >>> fold_adapter(base, adapter)["layer.weight"]
    tensor([[1., 2.],
            [0., 1.]])
    """
    for layer, factors in adapter.items():
        name = f"{layer}.weight"
        require(name in base, "An adapter's layers must be in its base", repr(name), suggestion(name, base))
        shape = spec_of(base, name).shape
        turned = "Set fan_in_fan_out" if shape == factors.shape[::-1] else "Pass the base it was trained on"
        require(shape == factors.shape, f"The adapter must fit {name!r}, {shape}", factors.shape, f"{turned}.")
    return Folded(base, {f"{layer}.weight": factors for layer, factors in adapter.items()}, dtype)
