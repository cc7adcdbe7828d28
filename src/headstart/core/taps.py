"""Read what any layer of any module says, without changing the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .validate import require, suggestion


def first_tensor(value: Any) -> Tensor:
    """The first tensor inside a layer's input or output (tuples, lists, dicts and dataclass-like dicts)."""
    while not isinstance(value, Tensor):
        values = list(value.values()) if isinstance(value, dict) else list(value)
        require(bool(values), "A tapped layer must hand over a tensor", type(value).__name__, "Tap another layer.")
        value = values[0]
    return value


def layer_of(model: nn.Module, layer: str) -> nn.Module:
    """The submodule called `layer`; an unknown name is refused with the nearest one that exists."""
    layers = dict(model.named_modules())
    require(layer in layers, "A layer must exist in the model", repr(layer), suggestion(layer, filter(None, layers)))
    return layers[layer]


@contextmanager
def tapped(model: nn.Module, taps: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the named layers during every forward pass inside the block.

    Args:
        model: any module.
        taps: dotted layer names; "NAME" records the layer's output, "NAME:input" its first input.

    Yields:
        a dictionary that each forward pass fills anew: tap -> tensor (with its graph).

    Raises:
        Refused: a layer does not exist (the nearest name is suggested).

    >>> import torch
    >>> with tapped(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ["1:input"]) as seen:
    ...     pass
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def record(tap: str, side: int) -> Any:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            seen[tap] = first_tensor((inputs, output)[side])

        return hook

    try:
        for tap in dict.fromkeys(taps):
            layer, _, side = tap.partition(":")
            require(side in ("", "input"), "A tap is NAME or NAME:input", repr(tap), "Drop the text after the colon.")
            handles.append(layer_of(model, layer).register_forward_hook(record(tap, 0 if side else 1)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
