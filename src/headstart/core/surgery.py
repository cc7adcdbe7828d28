"""Change a module's architecture without touching the original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from .taps import layer_of
from .validate import require, suggestion


class Surgery(Protocol):
    """A method that changes the architecture: module -> module, and back."""

    def apply(self, model: nn.Module) -> nn.Module:
        """A new module; requires_grad marks what it wants trained."""
        ...

    def fold(self, model: nn.Module) -> nn.Module:
        """A plain module of the same function; the identity where the method cannot be folded."""
        ...


def clone(model: nn.Module) -> nn.Module:
    """A copy that shares frozen parameters with the original and owns everything else.

    Tied weights stay tied. Cost: memory of the trainable parameters and the buffers.
    """
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def freeze(model: nn.Module) -> nn.Module:
    """A copy of the model with every parameter frozen; the parameters are shared with the original, detached."""
    shared: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def matching(model: nn.Module, pattern: str, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[str]:
    """Dotted names of the layers of class `kind` whose name fits the shell pattern (`*`, `*.attn.*`, comma for or).

    Raises:
        Refused: none fits; the names there are (of that class) are listed.

    >>> matching(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), "*", nn.Linear)
    ['0', '2']
    """
    known = [name for name, module in model.named_modules() if isinstance(module, kind)]
    found = [name for name in known if any(fnmatchcase(name, part.strip()) for part in pattern.split(","))]
    kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    require(
        bool(found), f"layers={pattern!r} must match a layer of class {kinds}", "no match", suggestion(pattern, known)
    )
    return found


def replace_layers(model: nn.Module, names: Iterable[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A clone of the model in which every named layer is `make(layer)`."""
    new = clone(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = new.get_submodule(parent)
        setattr(owner, child, make(layer_of(new, name)))
    return new


def head_of(model: nn.Module) -> str:
    """Dotted name of the last linear layer, which is the head of most classifiers.

    >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    '2'
    """
    return matching(model, "*", nn.Linear)[-1]


def with_head(model: nn.Module, classes: int, head: str | None = None) -> nn.Module:
    """A clone of the model whose head is a new linear layer with `classes` outputs, zero-initialised.

    Zero weights give every class the same score at the start, so the result does not depend on random state.

    Args:
        model: a classifier.
        classes: outputs of the new head, >= 1.
        head: its dotted name; by default the last linear layer.
    """
    require(classes >= 1, "with_head needs classes >= 1", classes, "Pass the number of classes.")

    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(
            old.in_features, classes, device="meta", dtype=old.weight.dtype
        )  # "meta" draws no random numbers
        new = new.to_empty(device=old.weight.device)
        nn.init.zeros_(new.weight)
        nn.init.zeros_(new.bias)
        return new

    name = head or head_of(model)
    require(
        isinstance(layer_of(model, name), nn.Linear), "The head must be a linear layer", name, "Name another layer."
    )
    return replace_layers(model, [name], make)
