"""What the linear layers of a model are given: the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.statistics import gram
from headstart.core.stream import Batch, Resumable, as_batch
from headstart.core.validate import finite, require


def gram_matrices(model: nn.Module, stream: Iterable[Any]) -> dict[str, Tensor]:
    """XᵀX of the inputs of every Linear and ungrouped Conv2d layer, for `RegMean`.

    Args:
        model: called with each x (a mapping is passed by name); put into eval mode for the pass.
        stream: one finite pass over batches; labels are not looked at.

    Returns:
        name of the weight -> (d, d) float64 sums over examples, and over the places of sequences and images (padding
        too); layers that are never called are left out.

    Raises:
        Refused: an endless stream, or no layer that was called.

    >>> gram_matrices(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, 2.0]])])["0.weight"].tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    require(not isinstance(stream, Resumable), "Gram matrices need one finite pass", type(stream).__name__,
            "Pass a list of batches.")  # fmt: skip
    found: dict[str, Tensor] = {}
    layers = {layer: name for name, layer in model.named_modules()}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, name = inputs[0], f"{layers[layer]}.weight".removeprefix(".")
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        own = gram(x.detach().reshape(-1, x.shape[-1]).double())
        found[name] = found[name].add_(own) if name in found else own

    modes = {module: module.training for module in layers}
    handles = [layer.register_forward_pre_hook(hook) for layer in layers if _is_linear(layer)]
    try:
        model.eval()
        with torch.no_grad():
            for given in stream:
                x = (Batch(given) if isinstance(given, Mapping) else as_batch(given)).x
                model(**x) if isinstance(x, Mapping) else model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for name, value in found.items():
        finite(f"the inputs of {name!r}", value, "Look for what the model was given.")
    require(bool(found), "Gram matrices need examples, and a model with linear layers", type(model).__name__,
            "Pass a non-empty stream.")  # fmt: skip
    return found


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)
