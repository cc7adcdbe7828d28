"""Calls of layers in one forward pass, where each row of inputs and outputs belongs to one example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from .attention import taken_apart
from .stream import Batch, size
from .validate import require


@dataclass(frozen=True)
class Call:
    """One call of a layer: what went in, and where the gradient of what came out can be had."""

    layer: nn.Module
    x: Tensor
    shape: tuple[int, ...]
    edge: GradientEdge
    names: Mapping[str, str]  # of its parameters -> their names in the model

    @property
    def key(self) -> tuple[str, ...]:
        """What it is known by from chunk to chunk."""
        return tuple(self.names.values())


def recorded(
    model: nn.Module, x: Any, trainable: Mapping[str, nn.Parameter], spread: bool = True
) -> tuple[Tensor, list[Call]]:
    """The logits of one forward pass, and the calls of layers that were called once, with a row an example.

    Layers whose parameters are tied, or used beside them, are left out. With `spread`, what all examples share gets a
    row for each, unless that changes the logits: embeddings of positions, and bare parameters (1, ..., d) such as those
    of vision transformers.
    """
    n = size(Batch(x))
    names = {id(p): name for name, p in trainable.items()}
    calls: dict[nn.Module, list[Call | None]] = {}
    handles = []
    bare = _bare(trainable, n) if spread else {}
    shared: list[Any] = list(bare)

    def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
        own = {name: names[id(p)] for name, p in layer.named_parameters(recurse=False) if id(p) in names}
        plain = bool(inputs) and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and output.requires_grad
        row, made = inputs[0] if plain else None, None
        if spread and row is not None and isinstance(layer, nn.Embedding) and row.ndim > 1 and len(row) == 1 < n:
            shared.append(layer)
            row, output = row.expand(n, *row.shape[1:]), output.expand(n, *output.shape[1:])
        if row is not None and row.shape[:1] == output.shape[:1] == (n,) and own.keys() <= {"weight", "bias"}:
            # the edge stays what it is if the output is changed in place, by a ReLU for example
            made = Call(layer, row.detach(), tuple(output.shape), get_gradient_edge(output), own)
        calls.setdefault(layer, []).append(made)
        return output if shared and shared[-1] is layer else None

    try:
        with taken_apart(model) as parts:
            for layer in (*model.modules(), *parts):
                if any(id(p) in names for p in layer.parameters(recurse=False)):
                    handles.append(layer.register_forward_hook(hook, prepend=True))
            logits = logits_of(model, x, bare or None)
    except RuntimeError:  # shapes that do not go together
        if not shared:
            raise
        logits = None
    finally:
        for handle in handles:
            handle.remove()
    if shared:
        with torch.no_grad():
            same = logits is not None and torch.allclose(logits, logits_of(model, x), rtol=1e-4, atol=1e-5)
        if not same:
            return recorded(model, x, trainable, spread=False)
    assert logits is not None
    uses = uses_of(logits)
    single = [made[0] for made in calls.values() if len(made) == 1 and made[0] is not None]
    single = [call for call in single if all(uses[trainable[name]] == 1 for name in call.names.values())]
    alone = [
        Call(Bare(), rows, tuple(rows.shape), get_gradient_edge(rows), {"weight": name}) for name, rows in bare.items()
    ]
    return logits, [*single, *alone]


class Bare(nn.Module):
    """Stands for the layer of a parameter that has none."""


def _bare(trainable: Mapping[str, nn.Parameter], n: int) -> dict[str, Tensor]:
    """Parameters (1, ..., d) outside layers of their own, with a row for each of n examples."""
    found = {name: p for name, p in trainable.items() if name.rpartition(".")[2] not in ("weight", "bias")}
    return {name: p.detach().expand(n, *p.shape[1:]).requires_grad_() for name, p in found.items()
            if p.ndim > 2 and len(p) == 1 < n}  # fmt: skip


def logits_of(model: nn.Module, x: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits (n, c), with other weights where given."""
    args, named = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
    output = model(*args, **named) if weights is None else functional_call(model, dict(weights), args, named)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    n = size(Batch(x))
    good = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == n
    require(good, f"The Fisher diagonal needs logits ({n}, c)", tuple(getattr(logits, "shape", ())) or type(output),
            "Wrap the model so that it gives one row of logits an example.")  # fmt: skip
    assert isinstance(logits, Tensor)
    return logits


def uses_of(output: Tensor) -> Counter[Any]:
    """How often each parameter enters the graph of `output`; more than once means tied, or used beside its layer."""
    found: Counter[Any] = Counter()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        for after, _ in () if node is None else node.next_functions:
            if after is None or after in seen:
                continue
            parameter = getattr(after, "variable", None)
            if parameter is not None:
                found[parameter] += 1
            else:
                seen.add(after)
                waiting.append(after)
    return found


def apart(h: Tensor, calls: Sequence[Call]) -> set[tuple[str, ...]]:
    """The layers whose row k belongs to example k: differentiating every second example leaves the other rows 0.

    Rows may be as many as examples and yet be positions, which all examples share.
    """
    even = (torch.arange(len(h), device=h.device) % 2 == 0).to(h.dtype)
    slope = torch.linspace(1, 2, h.shape[1], device=h.device, dtype=h.dtype)
    deltas = torch.autograd.grad(
        h, [call.edge for call in calls], even[:, None] * slope, retain_graph=True, allow_unused=True
    )
    alone = [delta is None or not bool(delta[1::2].any()) for delta in deltas]
    return {call.key for call, own in zip(calls, alone, strict=True) if own}
