"""Measure how far perturbations made on some models fool others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from headstart.core.ascent import Goal, check_inputs, logits, misclassify
from headstart.core.checkpoint import write_atomically
from headstart.core.validate import finite, require

Perturb: TypeAlias = Callable[[Tensor, Sequence[Goal]], Tensor]
"""Inputs and what to increase -> changed inputs: the `perturb` of an attack, or any function that ignores the goals."""


class Prepared(nn.Module):
    """A model with the preprocessing that it was trained with, differentiable, so that all models see one input.

    Args:
        model: prepared inputs -> logits.
        prepare: inputs in [0, 1] -> what the model takes: resized, normalised, another number of channels.

    >>> Prepared(nn.Linear(2, 3), lambda x: (x - 0.5) / 0.25)(torch.rand(4, 2)).shape
    torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.prepare = model, prepare

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, c)."""
        return self.model(self.prepare(x))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class TransferMatrix:
    """Which perturbed examples fooled which victim, and how often.

    Attributes:
        surrogates: names of the s models (or other sources) that the perturbations come from.
        victims: names of the v models that saw them.
        labels: (n,) the true classes.
        right: (v, n) whether a victim is right on the clean example.
        wrong: (s, v, n) whether it is wrong on the perturbed one.
        low: (s, v) lower end of the 95 % interval of `success`; 0 where a victim is right on nothing.
        high: (s, v) the upper end; 1 where a victim is right on nothing.
    """

    surrogates: tuple[str, ...]
    victims: tuple[str, ...]
    labels: Tensor
    right: Tensor
    wrong: Tensor
    low: Tensor
    high: Tensor

    @property
    def counted(self) -> Tensor:
        """How many examples each victim is right on before (v,): what `success` is a share of."""
        return self.right.sum(1)

    @property
    def clean(self) -> Tensor:
        """Accuracy of each victim on the clean examples (v,)."""
        return self.right.double().mean(1)

    @property
    def success(self) -> Tensor:
        """The share of the counted examples that is wrong afterwards (s, v); 0 where none is counted."""
        return _rates(self.wrong & self.right, self.right)

    @property
    def error(self) -> Tensor:
        """The share of all examples that is wrong afterwards (s, v), natural errors among them."""
        return self.wrong.double().mean(2)

    def of_class(self, label: int) -> tuple[Tensor, Tensor]:
        """`success` (s, v) and `counted` (v,) among the examples of one class."""
        rows = self.labels == label
        right = self.right[:, rows]
        return _rates(self.wrong[:, :, rows] & right, right), right.sum(1)


def perturbed(
    surrogates: Mapping[str, nn.Module], x: Tensor, y: Tensor, perturb: Perturb, *, batch_size: int = 256
) -> dict[str, Tensor]:
    """Each surrogate's own version of the examples, moved so that it errs.

    Args:
        surrogates: name -> x in [0, 1] to logits; see `Prepared`. They run in eval mode and stay as they are.
        x: (n, ...) floats in [0, 1].
        y: (n,) the true classes.
        perturb: such as `MIFGSM(radius=0.1).perturb`.
        batch_size: examples at once; a random start repeats its draws in each batch.

    Raises:
        Refused: no surrogates, inputs outside [0, 1], labels that do not fit, NaN or another shape from `perturb`.

    >>> model = nn.Linear(2, 2)
    >>> perturbed({"linear": model}, torch.zeros(3, 2), torch.zeros(3).long(), lambda x, goals: x + 0.5)["linear"].shape
    torch.Size([3, 2])
    """
    _examples(x, y)
    require(bool(surrogates), "perturbed needs surrogates", "none", "Pass at least one model.")
    require(batch_size >= 1, "perturbed needs batch_size >= 1", batch_size, "Pass a positive number.")
    moved = {}
    for name, model in surrogates.items():
        pairs = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
        moved[name] = torch.cat([perturb(some, [misclassify(model, labels)]).detach() for some, labels in pairs])
        _alike(name, moved[name], x)
    return moved


def transfer_matrix(
    moved: Mapping[str, Tensor],
    victims: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    y: Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
) -> TransferMatrix:
    """How many of the examples that each victim first gets right it gets wrong once perturbed.

    Args:
        moved: surrogate -> its perturbed examples, aligned with x; see `perturbed`.
        victims: name -> x in [0, 1] to logits. A victim that is also a surrogate gives the white-box rate.
        x: (n, ...) the clean examples.
        y: (n,) their classes.
        resamples: bootstrap draws, >= 1, stratified by class; the same draws for all pairs.
        seed: of the draws.
        batch_size: examples at once.

    Use it when: asking how much one's own models err together, and on what evidence.
    Not when: comparing perturbations of different sizes: the rates are for these.

    Cost: (1 + surrogates) forward passes of every victim.

    Notes: a victim that is right on nothing has success 0, counted 0 and the interval 0 to 1: nothing is known. A
    victim near chance counts few examples, mostly by luck: read `success` beside `clean` and `counted`.

    Raises:
        Refused: nothing to measure, examples or labels that do not fit, logits with NaN.

    >>> model, x, y = nn.Identity(), torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> matrix = transfer_matrix({"swap": x.flip(1), "none": x}, {"identity": model}, x, y)
    >>> matrix.success.tolist(), matrix.counted.tolist()
    ([[1.0], [0.0]], [2])
    """
    _examples(x, y)
    require(bool(moved) and bool(victims), "transfer_matrix needs perturbed examples and victims",
            (list(moved), list(victims)), "Pass at least one of each.")  # fmt: skip
    require(resamples >= 1 and batch_size >= 1, "transfer_matrix needs resamples >= 1 and batch_size >= 1",
            (resamples, batch_size), "Pass positive numbers.")  # fmt: skip
    for name, examples in moved.items():
        _alike(name, examples, x)

    def wrong(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            found = torch.cat([logits(model, some) for some in torch.split(inputs, batch_size)])
        finite("logits", found, "Check the victim.")
        return (found.argmax(1) != y).cpu()

    right = torch.stack([~wrong(model, x) for model in victims.values()])
    fooled = torch.stack([torch.stack([wrong(m, examples) for m in victims.values()]) for examples in moved.values()])
    low, high = _interval(right, fooled & right, y.cpu(), resamples, seed)
    return TransferMatrix(
        surrogates=tuple(moved), victims=tuple(victims), labels=y.cpu(), right=right, wrong=fooled, low=low, high=high
    )


def save_perturbed(path: Path, moved: Mapping[str, Tensor], x: Tensor, y: Tensor) -> None:
    """Keep perturbed examples bit for bit in one safetensors file, written whole or not at all."""
    from safetensors.torch import save

    _examples(x, y)
    tensors = {"x": x, "y": y, **{f"moved.{k}": tensor for k, tensor in enumerate(moved.values())}}
    whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data = save(whole, {"surrogates": json.dumps([*moved])})
    write_atomically(path, lambda file: file.write(data))


def load_perturbed(path: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What `save_perturbed` kept: moved, x, y."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = json.loads((file.metadata() or {}).get("surrogates", "[]"))
        require(bool(names), "load_perturbed needs a file of save_perturbed", path, "Save one first.")
        moved = {name: file.get_tensor(f"moved.{k}") for k, name in enumerate(names)}
        return moved, file.get_tensor("x"), file.get_tensor("y")


def _rates(hits: Tensor, counted: Tensor) -> Tensor:
    return hits.sum(-1).double() / counted.sum(-1).clamp_min(1)  # none counted: 0 / 1


def _interval(right: Tensor, hits: Tensor, labels: Tensor, resamples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The middle 95 % of the success over draws of as many examples of each class, (s, v) each."""
    generator, (s, v, n) = torch.Generator().manual_seed(seed), hits.shape
    times = torch.zeros(resamples, n, dtype=torch.float64)
    for label in torch.unique(labels):
        rows = (labels == label).nonzero()[:, 0]
        drawn = rows[torch.randint(len(rows), (resamples, len(rows)), generator=generator)]
        times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    counted = (times @ right.double().T)[:, None]  # (resamples, 1, v)
    rates = (times @ hits.double().flatten(0, 1).T).view(resamples, s, v) / counted.clamp_min(1)
    rates = torch.where(counted > 0, rates, _rates(hits, right))  # a draw without one counted example says nothing
    low, high = torch.quantile(rates, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    known = right.any(1)
    return torch.where(known, low, 0.0), torch.where(known, high, 1.0)


def _examples(x: Tensor, y: Tensor) -> None:
    check_inputs(x)
    good = y.shape == (len(x),) and not y.is_floating_point() and y.dtype != torch.bool
    require(good, f"Labels must be {len(x)} class numbers", f"{y.dtype} {tuple(y.shape)}", "Pass y (n,) as integers.")


def _alike(name: str, moved: Tensor, x: Tensor) -> None:
    require(moved.shape == x.shape, f"Perturbed examples must have the shape {tuple(x.shape)}",
            f"{tuple(moved.shape)} from {name!r}", "Keep their number and size; resize in `Prepared`.")  # fmt: skip
    finite(f"examples of {name!r}", moved)
