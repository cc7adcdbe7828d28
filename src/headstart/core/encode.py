"""Pictures and captions, and the directions that encoders give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ascent import check_inputs
from .modes import evaluating
from .validate import finite, require

Encoder: TypeAlias = Callable[[Any], Any]
"""Inputs (n of them) -> features (n, d), or an output of transformers that holds them as `pooler_output`."""


def unit(encode: Encoder, inputs: Any) -> Tensor:
    """Features (n, d) of length 1, by a module in eval mode or by a function.

    Inner products of such features are cosines.

    Args:
        encode: a module, a module's own method (its mode is given back), or any function. A function that runs a
            module leaves the module's mode to its author.
        inputs: what it takes: a tensor (n, ...), a list of n texts.

    Raises:
        Refused: something else than (n, d) floats, or features that are not finite.

    >>> unit(lambda x: 3 * x, torch.tensor([[0.0, 2.0]]))
    tensor([[0., 1.]])
    """
    owner = getattr(encode, "__self__", encode)
    with evaluating(owner) if isinstance(owner, nn.Module) else nullcontext():
        said = encode(inputs)
    found: Any = getattr(said, "pooler_output", said)
    good = isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 2 and len(found) == len(inputs)
    require(good, f"An encoder gives features ({len(inputs)}, d) for as many inputs",
            tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__, "Wrap it.")  # fmt: skip
    finite("features", found, "Check the encoder for NaN.")
    return F.normalize(found, dim=1)


def units(encode: Encoder, inputs: Tensor | Sequence[str], at_once: int = 256) -> Tensor:
    """`unit` of many inputs, `at_once` at a time and without gradients."""
    require(
        len(inputs) > 0 and at_once >= 1, "units needs inputs and at_once >= 1", (len(inputs), at_once), "Add some."
    )
    with torch.no_grad():
        return torch.cat([unit(encode, inputs[k : k + at_once]) for k in range(0, len(inputs), at_once)])


def check_pairs(x: Tensor, captions: Sequence[str], image_of: Tensor) -> None:
    """Refuse captions that are no texts, pictures without one, and numbers `image_of` (m,) of no picture."""
    check_inputs(x)
    texts = not isinstance(captions, str) and all(isinstance(caption, str) for caption in captions)
    require(texts, "Captions must be a list of texts", type(captions).__name__, "Pass [text, ...].")
    m, integers = len(captions), not (image_of.is_floating_point() or image_of.dtype == torch.bool)
    require(integers and image_of.shape == (m,), f"image_of must give each of {m} captions the number of its picture",
            f"{image_of.dtype} {tuple(image_of.shape)}", "Pass integers (m,).")  # fmt: skip
    found = sorted(set(image_of.tolist()))
    require(found == list(range(len(x))), f"Each of {len(x)} pictures needs captions, and each caption one of them",
            f"{len(found)} numbers", "Pass all captions of a batch's pictures, counted from 0.")  # fmt: skip
