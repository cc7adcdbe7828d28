"""How much each weight matters to what a model predicts: the exact diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .calls import Call, apart, logits_of, recorded
from .per_example import from_squares, once, prepared, squares
from .rng import seeded
from .stream import Batch, Resumable, as_batch, each, size
from .validate import finite, one_of, require
from .weights import wider

Draw = tuple[Tensor, Tensor]
"""Labels (n,) and the factor (n,) of each example's log likelihood of them."""
_HELD = 1 << 24  # numbers of examples' whole gradients at a time


def diagonal_fisher(
    model: nn.Module,
    stream: Iterable[Any],
    *,
    labels: Literal["expected", "true", "sampled"] = "expected",
    samples: int = 1,
    n_examples: int | None = None,
    chunk: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The exact diagonal of the Fisher information of a classifier, averaged over a finite stream.

    F_p = mean over x, expectation over y ~ p(y|x), of (d log p(y|x) / d theta_p)². Gradients are squared per example;
    squaring a batch's mean gradient, as several libraries do, gives another quantity that shrinks with batch size.

    Args:
        model: maps x (a tensor, or a mapping of tensors passed by name) to logits (n, c) or to an object with .logits,
            each example by itself; put into eval mode for the pass (batch statistics would mix examples). With one
            output (n, 1) it is a regression with unit Gaussian noise.
        stream: batches with x, and y when labels="true".
        labels: "expected" sums over all classes weighted by p(y|x) (exact; c backward passes), "true" uses the data's
            labels (the empirical Fisher), "sampled" draws from p(y|x).
        samples: labels drawn for each x when labels="sampled", >= 1.
        n_examples: stop after so many; None takes the whole stream.
        chunk: examples that go through the model together.
        seed: of the draw when labels="sampled".

    Returns:
        name of each trainable parameter -> tensor of its shape, float32.

    Cost: for each chunk a forward and c (or samples, or 1) backward passes to the outputs of its layers, and from there
    what `squares` costs; no gradient of a weight is formed by the backward pass. Parameters of other layers, tied ones,
    and those of layers that are called twice or not with one row an example, go through each example's own gradient,
    vectorised where the model allows it. Memory: the chunk's graph, with the unfolded inputs of convolutions.

    Raises:
        Refused: nothing trainable, no examples, an endless stream, labels that are missing or unknown, logits of
            another shape or not finite.

    >>> found = diagonal_fisher(nn.Linear(1, 2), [torch.zeros(5, 1)])
    >>> bool((found["weight"] == 0).all()), bool((found["bias"] > 0).all())
    (True, True)
    """
    one_of("labels", labels, ["expected", "true", "sampled"])
    require(samples >= 1 and chunk >= 1, "The Fisher diagonal needs samples >= 1 and chunk >= 1", (samples, chunk),
            "Raise it.")  # fmt: skip
    require(n_examples is None or n_examples >= 1, "The Fisher diagonal needs n_examples >= 1", n_examples, "Raise it.")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(trainable), "The Fisher diagonal needs trainable parameters", "none", "Unfreeze some.")
    require(not isinstance(stream, Resumable) or n_examples is not None, "The Fisher diagonal needs one finite pass",
            f"{type(stream).__name__}, which never ends", "Pass n_examples=, or a list of batches.")  # fmt: skip
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainable.items()}
    n, known = 0, dict[Any, set[tuple[str, ...]]]()
    with seeded(seed), _evaluating(model), torch.enable_grad():
        for x, y in _chunks(stream, chunk, n_examples):
            n += size(Batch(x))
            _add(model, trainable, x, partial(_drawn, y, labels, samples), total, known)
    require(n > 0, "The Fisher diagonal needs at least one example", 0, "Pass a non-empty stream.")
    return {name: (value / n).float() for name, value in total.items()}


def _add(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    x: Any,
    draw: Callable[[Tensor], list[Draw]],
    total: dict[str, Tensor],
    known: dict[Any, set[tuple[str, ...]]],
) -> None:
    """Add the squared gradients of one chunk to `total`; `known` remembers which layers keep examples apart."""
    logits, calls = recorded(model, x, trainable)
    finite("the model's logits", logits.detach(), "Do not measure a diverged model, and look at its inputs.")
    h = _log_likelihoods(logits)
    key = tuple((call.key, call.shape) for call in calls)
    if key not in known:
        known[key] = apart(h, calls) if calls else set()
    calls = [call for call in calls if call.key in known[key]]
    inputs = [prepared(call.layer, call.x) for call in calls]
    done = [(call, own) for call, own in zip(calls, inputs, strict=True) if own is not None]
    summed: list[Tensor | None] = [None] * len(done)
    drawn = draw(logits.detach())
    for one in drawn if done else ():
        for k, ((call, own), delta) in enumerate(zip(done, _deltas(h, one, done), strict=True)):
            if delta is None:
                continue
            if once(call.layer, delta):  # the squares of all labels are summed before the one product
                squared = delta.to(wider(delta.dtype)).square()
                summed[k] = squared if (so_far := summed[k]) is None else so_far.add_(squared)
            else:
                _into(total, call, squares(call.layer, own, delta))
    for (call, own), squared_sum in zip(done, summed, strict=True):
        if squared_sum is not None:
            _into(total, call, from_squares(own, squared_sum))
    covered = {name for call, _ in done for name in call.names.values()}
    left = {name: p.detach() for name, p in trainable.items() if name not in covered}
    if left:
        _one_by_one(model, left, x, drawn, total)


def _into(total: dict[str, Tensor], call: Call, found: Mapping[str, Tensor]) -> None:
    for name, whole in call.names.items():
        total[whole] += found[name]


def _log_likelihoods(logits: Tensor) -> Tensor:
    """What is differentiated: log p of each class; of a single output the output itself."""
    wide = logits.to(wider(logits.dtype))
    return wide if logits.shape[1] == 1 else wide.log_softmax(1)


def _deltas(h: Tensor, draw: Draw, calls: list[tuple[Call, Tensor]]) -> tuple[Tensor | None, ...]:
    """The gradient at each call's output of all examples' weighted log likelihoods: row k is example k's own."""
    edges = [call.edge for call, _ in calls]
    return torch.autograd.grad(h, edges, _direction(draw, h), retain_graph=True, allow_unused=True)


def _one_by_one(
    model: nn.Module, left: Mapping[str, Tensor], x: Any, drawn: list[Draw], total: dict[str, Tensor]
) -> None:
    """The same for any parameters, through the gradient of each example alone."""
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rest = {name: value.detach() for name, value in every.items() if name not in left}

    def scalar(weights: Mapping[str, Tensor], one: Any, label: Tensor, factor: Tensor) -> Tensor:
        h = _log_likelihoods(logits_of(model, each(lambda t: t[None], one), {**rest, **weights}))
        return (h * _direction((label[None], factor[None]), h)).sum()

    gradient = grad(scalar)
    rows = max(1, _HELD // sum(value.numel() for value in left.values()))
    for draw in drawn:
        for start in range(0, len(draw[0]), rows):
            part = slice(start, start + rows)
            given = each(itemgetter(part), (x, *draw))
            try:
                with _plain_attention():
                    found = vmap(gradient, in_dims=(None, 0, 0, 0))(left, *given)
            except RuntimeError:  # something that cannot be vectorised, such as a choice that depends on the data
                ones = [each(itemgetter(k), given) for k in range(len(given[1]))]
                each_alone = [gradient(left, *one) for one in ones]
                found = {name: torch.stack([one[name] for one in each_alone]) for name in left}
            for name, value in found.items():
                total[name] += value.to(wider(value.dtype)).square().sum(0)


def _drawn(y: Tensor | None, labels: str, samples: int, logits: Tensor) -> list[Draw]:
    """The labels whose log likelihood is differentiated, with a factor whose square is their weight."""
    n, classes = logits.shape
    if labels == "true":
        require(y is not None, 'labels="true" needs labels in the stream', None, "Pass (x, y) batches.")
        assert y is not None
    ones = torch.ones(n, dtype=torch.float64, device=logits.device)
    if classes == 1:  # y ~ N(f, 1): the gradient of its log likelihood is (y - f) df
        first = ones.long() - 1
        if y is not None and labels == "true":
            return [(first, y.reshape(n).double() - logits[:, 0])]
        noise = [torch.randn_like(ones) for _ in range(samples)] if labels == "sampled" else [ones]
        return [(first, value / len(noise) ** 0.5) for value in noise]
    if y is not None and labels == "true":
        inside = 0 <= int(y.min()) <= int(y.max()) < classes
        require(inside, f"labels must lie in 0..{classes - 1}", torch.unique(y).tolist()[:5], "Renumber them.")
        return [(y, ones)]
    p = logits.double().softmax(1)
    if labels == "sampled":
        return [(y, ones / samples**0.5) for y in p.multinomial(samples, replacement=True).T]
    return [((ones * c).long(), p[:, c].sqrt()) for c in range(classes)]


def _direction(draw: Draw, h: Tensor) -> Tensor:
    """What h (n, c) is multiplied by: each example's factor at its label."""
    label, factor = draw
    return F.one_hot(label, h.shape[1]) * factor.to(h.dtype)[:, None]


def _chunks(stream: Iterable[Any], chunk: int, most: int | None) -> Iterator[tuple[Any, Tensor | None]]:
    left = most
    for given in stream:
        batch = Batch(given) if isinstance(given, Mapping) else as_batch(given)
        n = size(batch) if left is None else min(size(batch), left)
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            yield each(itemgetter(part), batch.x), None if batch.y is None else batch.y[part]
        left = None if left is None else left - n
        if left == 0:
            return


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels do not vectorise over examples."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
