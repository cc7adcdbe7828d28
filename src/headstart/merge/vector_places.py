"""Which tensors of a model task vectors are added to, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from headstart.core.validate import finite, require, suggestion
from headstart.core.weights import Weights, spec_of


def composed_places(model: nn.Module, layers: str, vectors: Mapping[str, Weights]) -> dict[str, list[str]]:
    """The parameters whose name or layer fits the pattern -> all names of each; a tied one counts once.

    Vectors are matched by name. What they say of buffers, and of parameters outside the pattern, is not looked at.

    Raises:
        Refused: nothing fits, a name that the model does not have, one that a vector lacks, another shape, NaN.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and parameter.numel():
            finite(f"tensor {name!r}", parameter, "Load a model that has not diverged.")
            names.setdefault(id(parameter), []).append(name)
    places = {own[0]: own for own in names.values() if any(_fits(name, layers) for name in own)}
    every = [name for own in names.values() for name in own]
    require(bool(places), f"layers={layers!r} must match a parameter", "no match", suggestion(layers, every))
    known = {*every, *model.state_dict()}
    for who, vector in vectors.items():
        odd = sorted(set(vector) - known)
        hint = suggestion(min(odd, default=""), every)
        require(not odd, f"Task vector {who!r} must name tensors of the model", odd[:3], hint)
        lacking = [name for name, own in places.items() if not set(own) & set(vector)]
        require(not lacking, f"Task vector {who!r} must name each tensor that is composed", f"no {lacking[:3]}",
                "Set layers= to those that it names.")  # fmt: skip
        for name in [name for own in places.values() for name in own if name in vector]:
            shapes = spec_of(vector, name).shape, tuple(model.get_parameter(name).shape)
            require(shapes[0] == shapes[1], f"{name!r} of task vector {who!r} must have the shape it has in the model",
                    shapes, "Take the difference to this model.")  # fmt: skip
    return places


def changes_of(vectors: Mapping[str, Weights], names: list[str]) -> Iterator[tuple[int, Tensor]]:
    """(number of a vector, what it adds to the tensor of these names), read one at a time.

    Raises:
        Refused: NaN, or tied weights that were changed apart.
    """
    for row, (who, vector) in enumerate(vectors.items()):
        change, *others = [vector[name] for name in names if name in vector]
        finite(f"{names[0]!r} of task vector {who!r}", change, "Do not use a diverged model.")
        alike = all(torch.equal(change, other) for other in others)
        require(alike, f"Task vector {who!r} must change tied weights alike", names, "Tie them before fine-tuning.")
        yield row, change


def _fits(name: str, layers: str) -> bool:
    both = name, name.rpartition(".")[0]
    return any(fnmatchcase(one, pattern.strip()) for one in both for pattern in layers.split(","))
