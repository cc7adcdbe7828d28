"""Carry what fine-tuning changed in one version of a model over to another version."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headstart.core.paper import Paper
from headstart.core.validate import finite, require, suggestion
from headstart.core.weights import Weights, aligned, by_entry, by_tensor

from .padding import Padded

PAPER = Paper(
    title="Efficient Model Development through Fine-tuning Transfer",
    authors="Lin et al.",
    year=2025,
    arxiv="2503.20110",
    code="https://github.com/pjlintw/finetuning-transfer",
    departs="Sums in float64 and rounds once, where the official script adds into bfloat16 weights.",
)


@dataclass(frozen=True, kw_only=True)
class DiffTransfer:
    """A new version of a model with what fine-tuning taught the old one, without training and without data.

    The change from the old version to its fine-tuned model is added to the new one: new + scale (finetuned - old).

    Args:
        scale: what the change is multiplied by (lambda), finite; the paper's only value is 1.

    Shape: `models` are (finetuned, old) and `base` is the new version, which the result is built on: integer tensors
        are its own.

    Use it when: both versions come from one training run, as a model and its continued pre-training do; also as a
        better start for fine-tuning the new version.
    Not when: the versions were trained from different starts: `connectivity` shows a barrier, and nothing transfers.

    Cost: one pass over three models; when streamed, memory of a part of each.

    Notes: equal shapes do not prove equal meaning: compare the configurations, and the ids of special tokens. Save the
        result with the tokenizer and chat template of the fine-tuned model. Where fine-tuning added rows (new tokens),
        give old and new as `Padded(weights, finetuned)`. A change too small for the weights' dtype is lost:
        `transfer_report` counts them. Dequantise models first.

    Raises:
        Refused: no base, other than two models, differing names or shapes, NaN.

    Reference: Lin et al. 2025, section 2.

    >>> old, tuned, new = ({"w": torch.tensor(w)} for w in ([1.0, 2.0], [1.5, 2.0], [1.25, 4.0]))
    >>> DiffTransfer().merge([tuned, old], base=new)
    {'w': tensor([1.7500, 4.0000])}
    """

    scale: float = 1.0
    scope: ClassVar[Literal["tensor", "model"]] = "tensor"
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale), "DiffTransfer needs a finite scale", self.scale, "Pass one such as 1.0.")

    def merge(
        self, models: Sequence[Weights], *, base: Weights | None = None, importance: Sequence[Weights] | None = None
    ) -> dict[str, Tensor]:
        """The base with the change of the first model from the second."""
        return by_entry(self, models, base, importance)

    def combine_part(
        self, name: str, rows: Iterable[Tensor], base: Tensor | None, importance: Iterable[Tensor] | None, start: int
    ) -> Tensor:
        """See `Entrywise`."""
        require(importance is None, "DiffTransfer adds whole changes", "importance=", "Leave it out.")
        require(base is not None, "DiffTransfer needs base=, the version to change", None, "Pass its weights.")
        assert base is not None
        given = [row.double() for row in rows]
        require(len(given) == 2, "DiffTransfer needs a fine-tuned model and what it was tuned from",
                f"{len(given)} models", "Pass models=[finetuned, old].")  # fmt: skip
        return base + self.scale * (given[0] - given[1])


def diff_vector(finetuned: Weights, base: Weights) -> dict[str, Tensor]:
    """What fine-tuning changed: finetuned - base of every floating tensor, in float32 or wider.

    Where the fine-tuned model has more rows, as after adding tokens, the base counts as 0 there.

    >>> diff_vector({"w": torch.tensor([1.5, 2.0, 7.0])}, {"w": torch.tensor([1.0, 2.0])})
    {'w': tensor([0.5000, 0.0000, 7.0000])}
    """
    diff = {}
    base = Padded(base, finetuned)
    for name in aligned([finetuned], base):
        new, old = finetuned[name], base[name]
        _not_quantised(name, new, old)
        if new.is_floating_point():
            wide = torch.promote_types(new.dtype, torch.float32)
            diff[name] = (new.double() - old.to(new.device)).to(wide)
            finite(f"The change of {name!r}", diff[name], "Do not transfer from a diverged model.")
    return diff


def apply_diff(
    target: Weights, diff: Weights, *, scale: float = 1.0, include: str = "*", exclude: str = ""
) -> dict[str, Tensor]:
    """The target plus `scale` times a change, summed in float64 and rounded once.

    Args:
        target: the version to change; its integer tensors and dtypes stay. Rows that it lacks count as 0.
        diff: from `diff_vector`, or a sum of several.
        scale: lambda, finite.
        include: shell patterns over tensor names, comma for or, of what is changed.
        exclude: patterns of what stays as it is, though included.

    >>> apply_diff({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, 0.0])}, scale=2.0)
    {'w': tensor([2., 2.])}
    """
    require(math.isfinite(scale), "apply_diff needs a finite scale", scale, "Pass one such as 1.0.")
    odd = sorted(set(diff) ^ {name for name, tensor in target.items() if tensor.is_floating_point()})
    require(not odd, "A change must fit the target's floating tensors", f"{odd[:3]} in only one of them",
            "Take the difference between models of the target's architecture.")  # fmt: skip
    chosen = [name for name in diff if _fits(name, include) and not _fits(name, exclude)]
    require(bool(chosen), "include= and exclude= must leave a tensor", (include, exclude), suggestion(include, diff))
    rows = Padded(target, diff)

    def moved(_name: str, stacked: Tensor, _base: Tensor | None, _importance: Tensor | None) -> Tensor:
        return stacked[0].double() + scale * stacked[1].double()

    changed = by_tensor(moved, [{name: rows[name] for name in chosen}, {name: diff[name] for name in chosen}])
    return {name: changed[name] if name in changed else target[name].clone() for name in target}


def recycle(bases: Iterable[Weights], finetune: Callable[[dict[str, Tensor]], Weights]) -> Iterator[Weights]:
    """Fine-tune version after version, each from where the last fine-tuning, carried over, already is.

    The change carried to the next version is measured from the version's own base, so it accumulates all rounds.

    Args:
        bases: the versions, oldest first; they may appear while the iteration waits.
        finetune: starting weights -> trained weights.

    Yields:
        the trained weights of each version.

    Reference: Lin et al. 2025, iterative recycling-then-finetuning.

    >>> versions = [{"w": torch.tensor(0.0)}, {"w": torch.tensor(10.0)}]
    >>> [model["w"].item() for model in recycle(versions, lambda start: {"w": start["w"] + 1})]
    [1.0, 12.0]
    """
    diff: dict[str, Tensor] | None = None
    for base in bases:
        tuned = finetune({name: tensor.clone() for name, tensor in base.items()} if diff is None
                         else apply_diff(base, diff))  # fmt: skip
        diff = diff_vector(tuned, base)
        yield tuned


def _fits(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, part.strip()) for part in patterns.split(","))


def _not_quantised(name: str, tuned: Tensor, base: Tensor) -> None:
    """Refuse a matrix of integers that fine-tuning changed: it cannot be added to."""
    whole = not tuned.is_floating_point() and tuned.ndim >= 2
    require(not whole or torch.equal(tuned, base.to(tuned.device)), f"Tensor {name!r} must hold floating numbers",
            f"{tuned.dtype} that fine-tuning changed", "Dequantise the models first.")  # fmt: skip
