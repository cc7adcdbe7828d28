"""Measure whether what moves one model's features moves another's, beside what moves its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headstart.core.ascent import check_inputs
from headstart.core.paper import Paper
from headstart.core.validate import finite, require

from .alignment import Likeness, mapped, procrustes, ridge
from .split import Split, displacement
from .transfer_matrix import Perturb, perturbed

PAPER = Paper(
    title="Understanding Adversarial Transfer: Why Representation-Space Attacks Fail Where Data-Space Attacks Succeed",
    authors="Gupta and Schaeffer and Kazdan and Liu and Koyejo",
    year=2025,
    arxiv="2510.01494",
    departs="Classifiers only; a map that ridge regression finds brings its own scale; the source's whole forward pass "
    "is run, so that layers may be skipped past; no alignment by canonical correlations.",
)
HALVINGS = 12


@dataclass(frozen=True, kw_only=True)
class SpaceTransfer:
    """One target and one budget: shares of what a model first gets right and then gets wrong.

    Attributes:
        target: its name.
        relative: length of a displacement, in mean lengths of the features.
        counted: how many examples the target is right on: what all but the two `home` are a share of.
        home: the displaced features in the source itself.
        raw: the same displacement in the target, scaled to its features; None where their shapes differ.
        procrustes: the displacement turned as the features turn from source to target.
        ridge: the displacement under the linear map with the least squared error, not scaled besides.
        random: a Gaussian direction as long as `raw`.
        radius: of the perturbation of inputs that is as strong at home.
        data_home: that perturbation in the source.
        data: that perturbation in the target.
        matched: whether `home` and `data_home` are as near as was asked for; if not, do not compare them.
    """

    target: str
    relative: float
    counted: int
    home: float
    raw: float | None
    procrustes: float
    ridge: float
    random: float
    radius: float
    data_home: float
    data: float
    matched: bool


@dataclass(frozen=True, kw_only=True)
class SpaceStudy:
    """A row for each target and budget, and how alike each target's features are to the source's."""

    rows: tuple[SpaceTransfer, ...]
    likeness: Mapping[str, Likeness]


def representation_vs_data_space(
    source: Split, targets: Mapping[str, Split], x: Tensor, y: Tensor, unlabelled: Tensor,
    attack: Callable[[float], Perturb], *, relative: Sequence[float] = (0.25, 0.5, 0.75), steps: int = 20,
    universal: bool = False, tolerance: float = 0.05, seed: int = 0, batch_size: int = 256,
) -> SpaceStudy:  # fmt: skip
    """Whether weakness of one model is evidence about others: moved inputs, moved features, and those once aligned.

    Args:
        source: the model that is attacked, divided at a layer; see `Split`.
        targets: name -> another model, divided where it is asked about; its features have the same positions.
        x: (n, ...) floats in [0, 1] to measure on.
        y: (n,) their classes.
        unlabelled: other inputs to align the features on, at least 5 for each channel.
        attack: radius -> a perturbation of inputs, such as `lambda radius: PGD(radius=radius).perturb`.
        relative: lengths of displacements, each >= 0, in mean lengths of the source's features.
        steps: >= 0, of the search for a displacement.
        universal: one displacement for all examples, the stricter question.
        tolerance: how near the two successes at home must come, in (0, 1].
        seed: of the random directions.
        batch_size: examples at once.

    Use it when: asking whether errors found inside one model say anything about another one.
    Not when: comparing budgets in absolute numbers, or the two spaces where `matched` is False.

    Cost: for each budget `steps` forward and backward passes of the source, at most 12 runs of the attack, and five
        forward passes of each target.

    Notes: fails to transfer means as seldom as `random`, not never. Repeat with other layers to see where models
    share a basis: inputs and logits do, and so do models tuned from one base. In pictures' features one map of the
    channels serves every position, and `raw` may be above `random` because positions are shared.

    Raises:
        Refused: no targets; inputs, labels or settings out of range; layers without common positions; a source that is
            right on nothing or whose features are all zero.

    Reference: Gupta et al. 2025.

    >>> from torch import nn
    >>> same, x = Split(nn.Linear(2, 2), ""), torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    >>> y = same.encode(x)[1].argmax(1)
    >>> row, = representation_vs_data_space(same, {"same": same}, x, y, x, lambda r: lambda x, goals: x,
    ...                                     relative=[0.5]).rows
    >>> row.home == row.raw == row.procrustes
    True
    """
    for inputs in (x, unlabelled):
        check_inputs(inputs)
    good = y.shape == (len(x),) and not y.is_floating_point() and y.dtype != torch.bool
    require(good, f"Labels must be {len(x)} class numbers", f"{y.dtype} {tuple(y.shape)}", "Pass y (n,) as integers.")
    require(bool(targets), "representation_vs_data_space needs targets", "none", "Pass at least one.")
    settled = len(relative) > 0 and all(0 <= r < math.inf for r in relative) and 0 < tolerance <= 1 and batch_size >= 1
    require(settled, "Budgets must be finite and >= 0, 0 < tolerance <= 1, batch_size >= 1",
            (tuple(relative), tolerance, batch_size), "The defaults are usual.")  # fmt: skip
    z, said = source.encode(x, batch_size)
    own, right, length = source.encode(unlabelled, batch_size)[0], said.argmax(1) == y, _length(z)
    require(bool(right.any()) and length > 0, "The source must be right on some x and have features",
            (int(right.sum()), length), "Check its preprocessing.")  # fmt: skip
    prepared, likeness = {}, {}
    for name, target in targets.items():
        there, said = target.encode(x, batch_size)
        theirs = target.encode(unlabelled, batch_size)[0]
        turn = procrustes(own, theirs)
        prepared[name] = there, said.argmax(1) == y, turn, ridge(own, theirs)
        likeness[name] = Likeness.of(z, there, turn)

    fooled = partial(_fooled, x=x, y=y, batch_size=batch_size)
    rows = []
    for budget in relative:
        delta = displacement(source, x, y, budget * length, steps=steps, universal=universal, batch_size=batch_size)
        home = fooled(source, delta, right)
        radius, moved = _as_strong(source, x, y, right, attack, home, tolerance, batch_size)
        data_home = _share(_wrong(source, moved, y, batch_size), right)
        for name, target in targets.items():
            there, counted, turn, tilt = prepared[name]
            scale = _length(there) / length
            noise = torch.randn((len(delta), *there.shape[1:]), generator=torch.Generator().manual_seed(seed)).to(z)
            noise = noise * (scale * budget * length / noise.flatten(1).norm(dim=1).view(-1, *[1] * (there.ndim - 1)))
            rows.append(SpaceTransfer(
                target=name, relative=budget, counted=int(counted.sum()), home=home,
                raw=fooled(target, scale * delta, counted) if there.shape == z.shape else None,
                procrustes=fooled(target, scale * mapped(delta, turn), counted),
                ridge=fooled(target, mapped(delta, tilt), counted), random=fooled(target, noise, counted),
                radius=radius, data_home=data_home, data=_share(_wrong(target, moved, y, batch_size), counted),
                matched=abs(home - data_home) <= tolerance,
            ))  # fmt: skip
    return SpaceStudy(rows=tuple(rows), likeness=likeness)


def _length(z: Tensor) -> float:
    return float(z.flatten(1).norm(dim=1).mean())


def _share(wrong: Tensor, counted: Tensor) -> float:
    return float((wrong & counted).sum()) / max(int(counted.sum()), 1)


def _wrong(split: Split, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    return split.encode(x, batch_size)[1].argmax(1) != y


@torch.no_grad()
def _fooled(split: Split, delta: Tensor, counted: Tensor, *, x: Tensor, y: Tensor, batch_size: int) -> float:
    """How often displaced features mislead, among the counted."""
    pieces = torch.split(delta.expand(len(x), *delta.shape[1:]), batch_size)
    logits = torch.cat([split(*pair) for pair in zip(torch.split(x, batch_size), pieces, strict=True)])
    finite("logits", logits, "Check the model.")
    return _share(logits.argmax(1) != y, counted)


def _as_strong(
    source: Split, x: Tensor, y: Tensor, right: Tensor, attack: Callable[[float], Perturb], home: float,
    tolerance: float, batch_size: int,
) -> tuple[float, Tensor]:  # fmt: skip
    """The radius at which moved inputs fool the source as often as `home`, by halving [0, 1], and those inputs."""
    low, high, best = 0.0, 1.0, (home, 0.0, x)
    for _ in range(HALVINGS):
        if best[0] <= min(tolerance, home / 2):  # a weak displacement is not matched by none at all
            break
        radius = (low + high) / 2
        moved = perturbed({"source": source.model}, x, y, attack(radius), batch_size=batch_size)["source"]
        success = _share(_wrong(source, moved, y, batch_size), right)
        low, high = (radius, high) if success < home else (low, radius)
        best = min(best, (abs(success - home), radius, moved), key=lambda found: found[0])
    return best[1:]
