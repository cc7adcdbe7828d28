"""Read what any layer of any module says, without changing the module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .validate import one_of, require, suggestion


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


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers in the longest row of layers of one class: the blocks of a transformer.

    >>> blocks_of(nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Linear(4, 2)))
    ('1.0', '1.1')
    """
    rows = [
        (name, len(row)) for name, row in model.named_modules()
        if isinstance(row, nn.ModuleList | nn.Sequential) and len(row) > 1 and len({type(layer) for layer in row}) == 1
    ]  # fmt: skip
    require(bool(rows), "A model needs a row of blocks of one class", type(model).__name__, "Name its layers.")
    name, count = max(rows, key=lambda row: row[1])
    return tuple(f"{name}.{k}" if name else str(k) for k in range(count))


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


class _Found(Exception):
    pass


def features(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What `layer` of the model says of x, before a later layer can change it in place; the rest is not computed.

    Args:
        model: any module.
        layer: its dotted name, "" for the model's output.
        x: inputs.

    Raises:
        Refused: no such layer, or one that the forward pass does not call.

    >>> import torch
    >>> features(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), "0", torch.tensor([-1.0, 2.0]))
    tensor([-1.,  2.])
    """
    return features_at(model, [layer], x)[layer]


def features_at(model: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What several layers say of x (each at its first call), in their order; the forward pass ends with the last one.

    As `features`, for one pass.

    Raises:
        Refused: no layers, or one that does not exist or is not called.
    """
    require(bool(layers), "Features need a layer", "none", "Name one or more.")
    names, seen = set(layers), dict[str, Tensor]()
    handles = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in seen:
                return
            last = len(seen) + 1 == len(names)
            seen[name] = first_tensor(output) if last else first_tensor(output).clone()
            if last:
                raise _Found

        return hook

    try:
        for name in names:
            handles.append(layer_of(model, name).register_forward_hook(record(name)))
        model(x)
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in seen]
    require(not silent, "A layer must be called in the forward pass", f"{', '.join(map(repr, silent))}, which is not",
            "Name another one.")  # fmt: skip
    return {name: seen[name] for name in layers}


def tokens_of(value: Tensor, which: str = "all") -> Tensor:
    """What a layer said as tokens (n, p, d): places of a picture (n, d, h, w) are tokens, and (n, d) is one token.

    Args:
        value: (n, p, d), (n, d) or (n, d, h, w, ...).
        which: "all", "cls" (the first of a sequence) or "patch" (the others).
    """
    one_of("tokens", which, ["all", "cls", "patch"])
    require(
        value.ndim >= 2, "Tokens need a layer that says something of each example", tuple(value.shape), "Tap another."
    )
    if which != "all":
        require(value.ndim == 3 and value.shape[1] > 1, f"tokens={which!r} needs a sequence (n, p, d), p > 1",
                tuple(value.shape), 'Pass tokens="all".')  # fmt: skip
        return value[:, :1] if which == "cls" else value[:, 1:]
    return value[:, None] if value.ndim == 2 else value if value.ndim == 3 else value.flatten(2).mT


def token_similarity(a: Tensor, b: Tensor) -> Tensor:
    """The mean cosine of the tokens (n, p, d) of a with those of b, (n,): exactly 1, with slope exactly 0, where a = b.

    By 1 - |u - v|² / 2 of unit vectors, which loses no digits near 1. A token shorter than 1e-8 is shrunk, not
    stretched to a unit vector: zero is like zero (1) and half like anything else.

    >>> import torch
    >>> token_similarity(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [0.0, -1.0]]]))
    tensor([0.])
    """
    u, v = (F.normalize(t, dim=-1, eps=1e-8) for t in (a, b))
    return 1 - (u - v).square().sum(-1).mean(-1) / 2
