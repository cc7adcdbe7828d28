"""Architectures for small pictures: plain modules that end in an `nn.Linear` named `head`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from headstart.core.validate import one_of, require

from .convolutional import Depthwise, Plain, Residual
from .tokens import Attention, Mixer, Perceptron

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "cnn": Plain,
    "convnext": Depthwise,
    "mixer": Mixer,
    "mlp": Perceptron,
    "resnet": Residual,
    "vit": Attention,
}


def build(architecture: str, classes: int) -> nn.Module:
    """A fresh model for (n, 3, 32, 32) pictures, with random weights drawn from torch's global generator.

    Args:
        architecture: a name in `ARCHITECTURES`.
        classes: outputs of the final layer `head`.

    Raises:
        Refused: unknown architecture, or classes < 1.

    >>> build("resnet", 10).head
    Linear(in_features=160, out_features=10, bias=True)
    """
    one_of("architecture", architecture, ARCHITECTURES)
    require(classes >= 1, "A model needs classes >= 1", classes, "Pass the number of outputs of its last layer.")
    return ARCHITECTURES[architecture](classes)
