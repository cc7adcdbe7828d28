"""Augmented copies of a vision transformer: forward passes with heads dropped, scores scaled or features mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from headstart.core.attention import taken_apart
from headstart.core.modes import evaluating
from headstart.core.validate import one_of, require

UNCHANGED = {"heads": 0.0, "scores": 1.0, "features": 1.0}
"""What a copy is made by -> the value at which it is the original."""

_HEADS = ("num_heads", "num_attention_heads", "heads")
_SEPARATE = [{"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"to_q", "to_k", "to_v"}]
_PREFIX = ("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "reg_token",
           "register_tokens")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Copy:
    """How a copy differs from its original, in every block.

    Args:
        by: "heads": each head's output is dropped with probability `value`, at least one stays; "scores": attention
            scores are multiplied by `value`; "features": the perceptron's output h becomes
            value · h + (1 - value) · h[shuffled].
        value: heads: in [0, 1), 0 is the original; scores: >= 0, 1 is the original, below it attention is flatter,
            above sharper; features: in [0, 1], 1 is the original.
        mix: what "features" shuffles: each example's "token"s or "channel"s, or the examples of a "batch", which makes
            examples depend on each other.
        rescale: divide the heads that stay by 1 - `value`.
        prefix: tokens at the front that are not mixed; by default as many as the model has class, distillation and
            register tokens, recognised by the usual names of their parameters.

    >>> Copy(by="heads", value=0.25).mix
    'token'
    """

    by: Literal["heads", "scores", "features"]
    value: float
    mix: Literal["token", "channel", "batch"] = "token"
    rescale: bool = False
    prefix: int | None = None

    def __post_init__(self) -> None:
        one_of("by", self.by, UNCHANGED)
        one_of("mix", self.mix, ["token", "channel", "batch"])
        v = self.value
        fits = {"heads": 0 <= v < 1, "scores": 0 <= v < math.inf, "features": 0 <= v <= 1}[self.by]
        require(fits, "A copy needs a value in [0, 1) for heads, [0, inf) for scores, [0, 1] for features",
                f"{v} for {self.by}", f"{UNCHANGED[self.by]} changes nothing.")  # fmt: skip
        require(self.prefix is None or self.prefix >= 0, "A copy needs prefix >= 0", self.prefix, "Leave it out.")


@dataclass(frozen=True)
class Block:
    """Where one transformer block can be changed."""

    name: str
    heads: int
    width: int  # of all heads together
    attention: nn.MultiheadAttention | None  # if it is torch's, whose layers exist only while it is taken apart
    query: nn.Module  # its output starts with the queries
    join: nn.Module  # the heads side by side -> tokens
    think: nn.Linear | None  # the last layer of the perceptron


def blocks_of(model: nn.Module) -> list[Block]:
    """The transformer blocks of a model, found by their structure.

    An attention is an `nn.MultiheadAttention`; a linear layer of width 3 d followed by one that reads d (queries first,
    then keys and values, as in timm); or linear layers for queries, keys and values, named so, followed by one that
    reads their width (as in transformers). Its perceptron is what follows, down to the width of a token.

    Raises:
        Refused: there is none.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> [(block.name, block.heads, block.think is layer.linear2) for block in blocks_of(layer)]
    [('self_attn', 2, True)]
    """
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    owners = [name.rpartition(".")[0] for name, _ in linears]
    found: list[tuple[int, int, str, nn.Module]] = []  # its first layer, its last, the owner, and who gives queries
    for k, (_, layer) in enumerate(linears):
        owner, three = model.get_submodule(owners[k]), linears[k : k + 3]
        leaves = {name.rpartition(".")[2]: part for name, part in three}
        if isinstance(owner, nn.MultiheadAttention):
            found.append((k, k, owners[k], owner))
        elif k + 1 < len(linears) and layer.out_features == 3 * linears[k + 1][1].in_features:
            found.append((k, k + 1, owners[k], layer))
        elif set(leaves) in _SEPARATE and owners[k] == owners[k + 2] and k + 3 < len(linears):
            asks = next(part for leaf, part in leaves.items() if "q" in leaf)
            if all(part.out_features == linears[k + 3][1].in_features for part in leaves.values()):
                found.append((k, k + 3, owners[k], asks))
    blocks = []
    for i, (_, last, name, query) in enumerate(found):
        owner, join = model.get_submodule(name), linears[last][1]
        heads = next((h for a in _HEADS if isinstance(h := getattr(owner, a, None), int)), 0)
        if heads < 1 or join.in_features % heads:
            continue
        end = found[i + 1][0] if i + 1 < len(found) else len(linears)
        down = [layer for _, layer in linears[last + 2 : end] if layer.out_features == join.out_features]
        norm: Any = getattr(owner, "q_norm", None)  # normalised queries forget a factor, so it comes after the norm
        normed = isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
        torchs = owner if isinstance(owner, nn.MultiheadAttention) else None
        blocks.append(Block(name, heads, join.in_features, torchs, norm if normed else query, join,
                            down[0] if down else None))  # fmt: skip
    require(bool(blocks), "A copy needs a model with attention: nn.MultiheadAttention, or linear layers as in timm or "
            "transformers with the number of heads beside them", type(model).__name__, "Pass copies=((),) for models "
            "without.")  # fmt: skip
    return blocks


@contextmanager
def augmented(model: nn.Module, copy: Copy, draws: Generator) -> Iterator[None]:
    """Inside the block the model computes, in eval mode, what its copy does; afterwards it is what it was.

    Args:
        model: a vision transformer; its weights are shared, not copied.
        copy: how the copy differs.
        draws: of masks and shuffles, new in each block and call of the model, the same for all examples.

    Cost: that of the model; torch's attention runs without its fused kernel while heads or scores change.

    Notes: multiplying queries multiplies scores; a relative position bias, added to the scores, stays as it is. Mixing
    tokens in the last block changes nothing in a model that takes their mean right after it. Copies do not nest.

    Raises:
        Refused: the model has no attention, or no perceptron where features are mixed; it is not called in the block or
            computes its attention around its layers; it has windows, across which tokens must not be mixed.

    >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    >>> x = torch.ones(1, 4, 8)
    >>> with augmented(model, Copy(by="scores", value=0.5), Generator()):
    ...     model(x).shape
    torch.Size([1, 4, 8])
    """
    blocks = blocks_of(model)
    if copy.by == "features":
        without = [block.name for block in blocks if block.think is None]
        require(not without, "Mixing features needs a perceptron of linear layers in every block", without,
                "Leave this copy out.")  # fmt: skip
    if copy.value == UNCHANGED[copy.by]:
        yield
        return
    front = _prefix(model) if copy.prefix is None else copy.prefix
    handles, waiting = [], set(range(len(blocks)))
    seen: dict[int, tuple[int, ...]] = {}

    def scale(k: int) -> Callable[..., Tensor]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            waiting.discard(k)
            factors = output.new_ones(output.shape[-1])
            factors[: blocks[k].width] = copy.value  # what comes after the queries is keys and values
            return output * factors

        return hook

    def mix(k: int) -> Callable[..., Tensor]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            waiting.discard(k)
            return mixed(output, copy, front, draws, seen.get(k))

        return hook

    def drop(k: int) -> Callable[..., tuple[Tensor]]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            waiting.discard(k)
            factors = kept_heads(blocks[k].heads, copy, draws).repeat_interleave(blocks[k].width // blocks[k].heads)
            return (inputs[0] * factors.to(inputs[0]),)

        return hook

    def note(k: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[k] = tuple(inputs[0].shape[:-1])

        return hook

    apart: AbstractContextManager[list[nn.Linear]] = nullcontext([]) if copy.by == "features" else taken_apart(model)
    try:
        with evaluating(model), apart as parts:
            pairs = {id(leave.weight): (enter, leave) for enter, leave in zip(parts[::2], parts[1::2], strict=True)}
            for k, block in enumerate(blocks):
                query: nn.Module = block.query
                join: nn.Module = block.join
                if block.attention is not None and copy.by != "features":
                    query, join = pairs.get(id(block.attention.out_proj.weight), (query, join))
                    handles.append(block.attention.register_forward_pre_hook(lambda *_: None))  # no fused layer
                if copy.by == "heads":
                    handles.append(join.register_forward_pre_hook(drop(k)))
                elif copy.by == "scores":
                    handles.append(query.register_forward_hook(scale(k)))
                elif block.think is not None:
                    handles.append(join.register_forward_pre_hook(note(k)))
                    handles.append(block.think.register_forward_hook(mix(k)))
            yield
    finally:
        for handle in handles:
            handle.remove()
    require(not waiting, "A copy must be called, and its model must call the layers of its attention",
            f"{len(waiting)} of {len(blocks)} blocks not reached, {blocks[min(waiting, default=0)].name} first",
            "Call the model inside, or leave this copy out.")  # fmt: skip


def _prefix(model: nn.Module) -> int:
    """How many tokens at the front are no patches."""
    tokens = [p for name, p in model.named_parameters() if name.rpartition(".")[2] in _PREFIX]
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in tokens)


def kept_heads(heads: int, copy: Copy, draws: Generator) -> Tensor:
    """The factor of each head (heads,): 0 with the copy's probability, but not for all."""
    chances = torch.rand(heads, generator=draws)
    kept = chances >= copy.value
    kept[chances.argmax()] = True
    return kept / (1 - copy.value if copy.rescale else 1)


def mixed(h: Tensor, copy: Copy, front: int, draws: Generator, seen: tuple[int, ...] | None = None) -> Tensor:
    """What the perceptron says, mixed with a shuffle of itself; the first `front` tokens stay."""
    axis = {"batch": 0, "token": 1, "channel": -1}[copy.mix]
    whole = axis != 1 or (h.ndim == 3 and seen in (None, tuple(h.shape[:-1])))
    require(whole, "Mixing tokens needs attention among all of them", f"{seen} tokens in windows of {tuple(h.shape)}",
            'Choose mix="channel".')  # fmt: skip
    rest = h[:, front:]
    order = torch.randperm(rest.shape[axis], generator=draws).to(h.device)
    new = copy.value * rest + (1 - copy.value) * rest.index_select(axis, order)
    return torch.cat([h[:, :front], new], 1) if front else new
