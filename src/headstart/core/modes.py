"""Training and evaluation mode, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """The model in eval mode inside the block; each layer's own mode (a frozen BatchNorm's, say) comes back after it.

    Args:
        model: any module.
        wanted: False leaves the modes alone.
    """
    training = [module for module in model.modules() if module.training]
    if wanted and training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
