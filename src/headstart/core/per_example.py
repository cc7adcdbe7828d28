"""Squared gradients of single examples, from what a layer was given and the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Bare
from .weights import wider

BLOCK = 1 << 18
"""Numbers of per-example gradients that are formed at a time: so many stay in the processor's cache."""

Gradients = Iterator[tuple[str, Tensor]]


def prepared(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The input (n, ...) of one call of a layer in the form that `squares` wants, or None for layers it cannot do.

    Exactly these classes: a subclass may compute something else.
    """
    if isinstance(layer, Bare):
        return x
    make = _PREPARE.get(type(layer))
    return None if make is None else make(layer, x if type(layer) is nn.Embedding else x.to(wider(x.dtype)))


def squares(layer: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Σ over examples of the squared gradient of each of a layer's own parameters.

    Args:
        layer: a `Bare`, Linear, Conv2d, Embedding, LayerNorm, GroupNorm or BatchNorm in eval mode.
        x: its `prepared` input.
        delta: of each example, the gradient of its scalar with respect to the layer's output (n, ...).

    Cost: of a Linear layer used once an example one matmul of squares; otherwise each example's gradient is formed, but
    no more than `BLOCK` numbers of them at a time.
    """
    delta = delta.to(wider(delta.dtype))
    if isinstance(layer, Bare):
        return {"weight": delta.square().sum(0, keepdim=True)}
    if type(layer) is nn.Embedding:
        return {"weight": _embedding(layer, x, delta)}
    if once(layer, delta):
        return from_squares(x, delta.square())
    total: dict[str, Tensor] = {}
    own = dict(layer.named_parameters(recurse=False))
    rows = max(1, BLOCK // max(p.numel() for p in own.values()))
    for x_rows, delta_rows in zip(torch.split(x, rows), torch.split(delta, rows), strict=True):
        for name, gradient in _GRADIENTS[type(layer)](layer, x_rows, delta_rows):
            if name not in own:
                continue
            part = gradient.square_().sum(0)
            total[name] = part if name not in total else total[name].add_(part)
    return {name: value.view_as(own[name]) for name, value in total.items()}


def once(layer: nn.Module, delta: Tensor) -> bool:
    """Whether each example uses the layer's weight once, so that squares of inputs and outputs are all it takes."""
    return type(layer) is nn.Linear and delta.ndim == 2


def from_squares(x: Tensor, delta_squared: Tensor) -> dict[str, Tensor]:
    """For a Linear layer used once: (δ xᵀ)² = δ² (x²)ᵀ. Squares of several δ may be summed first."""
    return {"weight": delta_squared.T @ x.square(), "bias": delta_squared.sum(0)}


def _linear(_layer: nn.Module, x: Tensor, delta: Tensor) -> Gradients:
    yield "weight", delta.flatten(1, -2).mT @ x
    yield "bias", delta.flatten(1, -2).sum(1)


def _conv(layer: nn.Module, x: Tensor, delta: Tensor) -> Gradients:
    assert isinstance(layer, nn.Conv2d)
    places = x.shape[-1]
    yield "weight", (delta.reshape(len(x), layer.groups, -1, places) @ x.mT).flatten(1)
    yield "bias", delta.reshape(len(x), -1, places).sum(2)


def _channels(_layer: nn.Module, x: Tensor, delta: Tensor) -> Gradients:
    """Of a norm over channels: x and delta (n, channels, ...)."""
    shape = (*x.shape[:2], -1)
    yield "weight", (x * delta).reshape(shape).sum(2)
    yield "bias", delta.reshape(shape).sum(2)


def _features(layer: nn.Module, x: Tensor, delta: Tensor) -> Gradients:
    """Of a norm over the last dimensions."""
    assert isinstance(layer, nn.LayerNorm)
    shape = (len(x), -1, *layer.normalized_shape)
    yield "weight", (x * delta).reshape(shape).sum(1)
    yield "bias", delta.reshape(shape).sum(1)


def _embedding(layer: nn.Embedding, ids: Tensor, delta: Tensor) -> Tensor:
    n, size = len(ids), layer.num_embeddings
    keys = ids.reshape(n, -1).long() + size * torch.arange(n, device=ids.device)[:, None]
    keys, place = torch.unique(keys, return_inverse=True)  # a row of the table that an example uses twice counts once
    own = delta.new_zeros(len(keys), layer.embedding_dim).index_add_(0, place.flatten(), delta.flatten(0, -2))
    squared = torch.zeros_like(layer.weight, dtype=delta.dtype).index_add_(0, keys % size, own.square_())
    if layer.padding_idx is not None:
        squared[layer.padding_idx] = 0
    return squared


def _flat(_layer: nn.Module, x: Tensor) -> Tensor | None:
    return None if x.ndim < 2 else x if x.ndim == 2 else x.flatten(1, -2)


def _unfolded(layer: nn.Module, x: Tensor) -> Tensor | None:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or x.ndim != 4:
        return None
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.view(len(x), layer.groups, -1, columns.shape[2])  # (n, groups, numbers a kernel sees, places)


def _ids(layer: nn.Module, x: Tensor) -> Tensor | None:
    assert isinstance(layer, nn.Embedding)
    return None if layer.max_norm is not None or layer.scale_grad_by_freq else x


def _whitened(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a norm multiplies its weight by."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if layer.running_mean is None or layer.running_var is None or layer.training:  # batch statistics mix examples
        return None
    mean, variance = (v.to(x.dtype) for v in (layer.running_mean, layer.running_var))
    return F.batch_norm(x, mean, variance, eps=layer.eps)


_PREPARE: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor | None]] = {
    nn.Linear: _flat, nn.Conv2d: _unfolded, nn.Embedding: _ids, nn.LayerNorm: _whitened, nn.GroupNorm: _whitened,
    nn.BatchNorm1d: _whitened, nn.BatchNorm2d: _whitened, nn.BatchNorm3d: _whitened,
}  # fmt: skip
_GRADIENTS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], Gradients]] = {
    nn.Linear: _linear, nn.Conv2d: _conv, nn.LayerNorm: _features, nn.GroupNorm: _channels,
    nn.BatchNorm1d: _channels, nn.BatchNorm2d: _channels, nn.BatchNorm3d: _channels,
}  # fmt: skip
