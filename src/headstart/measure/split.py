"""A model seen as a head on an encoder, divided at any layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball, Goal, ascend, goal_gradient, logits
from headstart.core.confident import cross_entropy
from headstart.core.taps import layer_of
from headstart.core.validate import finite, require


@dataclass(frozen=True)
class Split:
    """A model as head ∘ encoder: the encoder ends where `layer` does, and the head is all the rest.

    Args:
        model: x (n, ...) to logits (n, c); run in eval mode, modes given back.
        layer: dotted name, for its output; "NAME:input" is its first input, "" the logits. It is called once in a
            forward pass and gives one tensor with a row for each example.

    Use it when: features should be moved before the rest of the model sees them.
    Not when: the layer is followed by a function that some displaced features could never come from: after a ReLU
        features are not negative, so divide before it. A LayerNorm in the head takes off the mean and the scale.

    Cost: a forward pass of the whole model, because what skips the layer is needed too.

    >>> split = Split(nn.Sequential(nn.Flatten(), nn.ReLU()), "0")
    >>> split(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 5.0]]))
    tensor([[1.5000, 3.0000]])
    """

    model: nn.Module
    layer: str

    def __call__(self, x: Tensor, delta: Tensor) -> Tensor:
        """The logits (n, c) once `delta`, one for each example or one for all, is added to the features."""
        return self._passing(x, lambda z: z + delta)

    @torch.no_grad()
    def encode(self, x: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Features (n, ...) and logits (n, c), `batch_size` examples at once."""
        seen: list[Tensor] = []

        def record(z: Tensor) -> Tensor:
            seen.append(z.clone())  # a later layer may change z in place
            return z

        said = torch.cat([self._passing(some, record) for some in torch.split(x, batch_size)])
        found = torch.cat(seen)
        require(len(found) == len(x), f"Layer {self.layer!r} must have a row for each of {len(x)} examples",
                tuple(found.shape), "Name another one.")  # fmt: skip
        finite("features", found, "Check the model for NaN.")
        finite("logits", said, "Check the model for NaN.")
        return found, said

    def _passing(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        name, _, side = self.layer.partition(":")
        require(
            side in ("", "input"), "A layer is NAME or NAME:input", repr(self.layer), "Drop what follows the colon."
        )
        module, calls = layer_of(self.model, name), [0]

        def changed(value: Any) -> Tensor:
            calls[0] += 1
            single = isinstance(value, Tensor) and calls[0] == 1
            require(single, f"Layer {self.layer!r} must be called once and give one tensor",
                    f"{type(value).__name__}, call {calls[0]}", "Name a layer inside it.")  # fmt: skip
            return change(value)

        if side:
            handle = module.register_forward_pre_hook(lambda _module, given: (changed(given[0]), *given[1:]))
        else:
            handle = module.register_forward_hook(lambda _module, _given, output: changed(output))
        try:
            said = logits(self.model, x)
        finally:
            handle.remove()
        require(calls[0] == 1, f"Layer {self.layer!r} must be called in the forward pass", "no call", "Name another.")
        return said


def displacement(
    source: Split, x: Tensor, y: Tensor, radius: float, *, steps: int = 20, universal: bool = False,
    batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """What to add to the features so that the source errs: normalised gradient steps of radius / 5 in an l2 ball.

    Args:
        source: the divided model.
        x: (n, ...) inputs.
        y: (n,) their classes.
        radius: length of a displacement, >= 0, in units of the features.
        steps: >= 0 (20).
        universal: one displacement for all examples, which raises their mean cross-entropy, instead of one for each.
        batch_size: examples at once.

    Returns:
        (n, ...) like the features, or (1, ...).

    Notes: the search is over displacements as shares of the radius, so that the ball is a unit ball without bounds.
    """
    require(0 <= radius < math.inf and steps >= 0, "A displacement needs a finite radius >= 0 and steps >= 0",
            (radius, steps), "20 steps are usual.")  # fmt: skip
    shape = source.encode(x[:1])[0].shape[1:]

    def wronged(some: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        return cross_entropy(source(some, radius * share), labels)

    def best(goals: list[Goal], count: int) -> Tensor:
        return ascend(x.new_zeros(count, *shape), partial(goal_gradient, goals), ball=Ball(1.0, "l2"), steps=steps,
                      step_size=0.2, bounds=(-math.inf, math.inf))  # fmt: skip

    goals: list[Goal] = [
        partial(wronged, *some) for some in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    ]
    if universal:
        return radius * best(goals, 1)
    parts = zip(goals, torch.split(x, batch_size), strict=True)
    return radius * torch.cat([best([goal], len(some)) for goal, some in parts])
