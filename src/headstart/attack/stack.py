"""One pass through several models of one architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from headstart.core.validate import require


def stacked(models: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """What all models say of x in eval mode, at once: x (n, ...) -> (models, n, c).

    Args:
        models: of one architecture, with the same layers and shapes, on one device. Their weights are copied, so what
            happens to them later is not seen.

    Use it when: there are many models and few examples: 16 models or more and up to 8 examples on a CPU, where calls
        cost more than numbers; on a GPU also with more examples.
    Not when: batches are large: then it is no faster (`benchmarks/attacks.py`), and holds all activations at once.

    Cost: one copy of the weights; each call computes what the models would one after another, in one set of calls.

    Notes: equal to the models' own passes up to rounding. Values that a model keeps outside of its parameters and
    buffers are those of the first one.

    Raises:
        Refused: no models, or models that differ in more than their weights.

    >>> stacked([nn.Linear(2, 3) for _ in range(4)])(torch.ones(5, 2)).shape
    torch.Size([4, 5, 3])
    """
    require(bool(models), "stacked needs at least one model", "none", "Pass the surrogates.")
    states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
    shapes = [(_layers(m), {name: (t.shape, t.dtype, t.device) for name, t in s.items()})
              for m, s in zip(models, states, strict=True)]  # fmt: skip
    unlike = [k for k, shape in enumerate(shapes) if shape != shapes[0]]
    require(not unlike, "stacked needs models of one architecture", f"model {unlike[0] if unlike else ''} unlike the "
            "first", "Pass those of each architecture by themselves.")  # fmt: skip
    weights = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    frame = copy.deepcopy(models[0]).eval()

    def call(state: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(frame, state, (x,))

    def said(x: Tensor) -> Tensor:
        fast = mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)  # like the fused kernels it has no batched form
        try:
            with sdpa_kernel(SDPBackend.MATH):
                found: Tensor = vmap(call, in_dims=(0, None))(weights, x)
        finally:
            mha.set_fastpath_enabled(fast)
        return found

    return said


def _layers(model: nn.Module) -> list[tuple[str, type, str]]:
    """Name, class and settings of every layer; the mode does not count."""
    return [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
