"""Torch's self-attention taken apart into the Linear layers it consists of, so that hooks can see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn


@contextmanager
def taken_apart(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Inside the block every `nn.MultiheadAttention` in eval mode computes the same through Linear layers.

    Yields:
        those layers; they share the parameters of the attention. Cross-attention, keys of another width and added keys
        stay as they are, and their layers are not called.
    """
    changed, layers = [], []
    for layer in model.modules():
        plain = type(layer) is nn.MultiheadAttention and "forward" not in vars(layer) and not layer.training
        if plain and isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            enter = _linear(layer.in_proj_weight, layer.in_proj_bias)
            leave = _linear(layer.out_proj.weight, layer.out_proj.bias)
            layer.__dict__["forward"] = partial(_forward, layer, layer.forward, enter, leave)
            changed.append(layer)
            layers += [enter, leave]
    try:
        yield layers
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.register_parameter("weight", cast(nn.Parameter, weight))
    layer.register_parameter("bias", cast(nn.Parameter | None, bias))
    return layer


def _forward(
    layer: nn.MultiheadAttention,
    original: Callable[..., tuple[Tensor, Tensor | None]],
    enter: nn.Linear,
    leave: nn.Linear,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `nn.MultiheadAttention.forward`."""
    own = query is key is value and query.ndim == 3 and not query.is_nested
    if not own or layer.bias_k is not None or layer.add_zero_attn or (is_causal and attn_mask is None):
        return original(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    x = query if layer.batch_first else query.transpose(0, 1)
    n, t, d = x.shape
    q, k, v = enter(x).view(n, t, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (n, heads, t, d / heads)
    scores = (q @ k.mT) * (d // layer.num_heads) ** -0.5
    if attn_mask is not None:
        heads = layer.num_heads if attn_mask.ndim == 3 else 1
        scores = scores + _added(attn_mask, scores).view(-1, heads, t, t)
    if key_padding_mask is not None:
        scores = scores + _added(key_padding_mask, scores)[:, None, None]
    weights = scores.softmax(-1)
    output = leave((weights @ v).transpose(1, 2).reshape(n, t, d))
    shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    return output if layer.batch_first else output.transpose(0, 1), shown


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as what is added to scores: -inf where a Boolean one is true."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, -torch.inf)
