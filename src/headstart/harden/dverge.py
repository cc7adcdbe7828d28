"""DVERGE: ensembles whose members fail on different inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball
from headstart.core.modes import evaluating
from headstart.core.paper import Paper
from headstart.core.plan import Plan, Run, Step, Term
from headstart.core.stream import Batch, Batches, Parts, size
from headstart.core.surgery import matching
from headstart.core.taps import layer_of
from headstart.core.validate import require

from .adversarial_training import AdversarialTraining
from .ensemble import Ensemble
from .vulnerability import distilled

PAPER = Paper(
    title="DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles",
    authors="Huanrui Yang and Jingyang Zhang and Hongliang Dong and Nathan Inkawhich and Andrew Gardner and "
    "Andrew Touchet and Wesley Wilkes and Heath Berry and Hai Li",
    year=2020,
    arxiv="2009.14720",
    code="https://github.com/zjysteven/DVERGE",
    departs="The losses of all members are added and go backward once; the members share nothing, so each takes the "
    "paper's step. Features are read at any named layer; by default at every convolution and linear layer.",
)


@dataclass(frozen=True, kw_only=True)
class DVERGE:
    """An ensemble whose members do not fall for the same perturbation, so one made elsewhere seldom fools it.

    For a pair of examples (s, t), member j's distilled input looks like s while j's layer sees t:
    x'_j = argmin ‖f_j(z) - f_j(x_t)‖² over ‖z - x_s‖∞ <= radius. Each member learns, by every term of the plan, the
    labels y_s on the x'_j of all the others. There is no clean loss: x'_j stands in for x_s.

    Args:
        target: batches (x, y) to draw x_t from, of the same size and classes as the plan's stream; None takes the
            plan's own stream in another shuffle.
        layers: names of the layers to distil, "" for the output; one tuple for all members, or one tuple for each.
            None takes every convolution and linear layer. A single layer is the ablation.
        radius: of the ball, in units of x in [0, 1] (paper: 0.07 for three members, less for more).
        steps: >= 0 of each distillation (paper: 10).
        step_size: in (0, 1]; by default radius / 10 (paper).
        every: training steps for which a drawn layer is kept (paper: one epoch); None takes an epoch of the stream.
        different_label: whether to leave out pairs of one label (paper: keeps them).
        evaluating: whether to distil in eval mode. The paper's code does not, so BatchNorm counts distilled inputs.
        adversarial: `AdversarialTraining` of each member on its own moved x_s, added to the loss; None is without.
        weight: >= 0 of DVERGE's own loss beside `adversarial` (paper: 1).
        seed: of the layers drawn and of the other shuffle.

    Shape: a plan whose model is an `Ensemble` of two members or more and whose batches are `Batch(x, y)`, x (n, ...)
    floats in [0, 1]; normalisation belongs inside the members.

    Use it when: inputs may be perturbed by somebody who has other models of the task, but not yours.
    Not when: the members themselves may be known: white-box robustness stays low. Then use `AdversarialTraining`.

    Cost: K · (steps + 1) passes up to the layer and K(K - 1) full ones a step: about 12 times plain training for K = 3.

    Notes: start from normally trained members. Results vary with the layers drawn: report three seeds or more.

    Raises:
        Refused: an argument out of range, a model that is no ensemble of two, a layer no member has or calls, members
            with unlike numbers of layers, terms with taps, source and target batches that are the same.

    Reference: Yang et al. 2020, section 3 and algorithm 1.

    >>> plan = Plan(model=Ensemble([nn.Linear(2, 2), nn.Linear(2, 2)]), steps=10,
    ...             stream=Batches(x=torch.rand(8, 2), y=torch.arange(8) % 2))
    >>> list(DVERGE()(plan).terms)
    ['task']
    """

    target: Iterable[Any] | None = field(default=None, repr=False)
    layers: tuple[str, ...] | tuple[tuple[str, ...], ...] | None = None
    radius: float = 0.07
    steps: int = 10
    step_size: float | None = None
    every: int | None = None
    different_label: bool = False
    evaluating: bool = False
    adversarial: AdversarialTraining | None = None
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        Ball(self.radius)
        require(self.steps >= 0, "DVERGE needs steps >= 0", self.steps, "The paper uses 10.")
        require(self.step_size is None or 0 < self.step_size <= 1, "DVERGE needs 0 < step_size <= 1, in units of x in "
                "[0, 1]", self.step_size, "Leave it out for radius / 10.")  # fmt: skip
        require(self.every is None or self.every >= 1, "DVERGE needs every >= 1", self.every, "Pass an epoch's steps.")
        require(0 <= self.weight < math.inf, "DVERGE needs a finite weight >= 0", self.weight, "The paper uses 1.")
        require(self.weight > 0 or self.adversarial is not None, "DVERGE needs weight > 0 or adversarial=", "neither",
                "The paper's weight is 1.")  # fmt: skip

    def __call__(self, plan: Plan) -> Plan:
        model = plan.model
        members = list(model.members) if isinstance(model, Ensemble) else []
        require(len(members) >= 2, "DVERGE needs an Ensemble of two members or more", f"{type(model).__name__} of "
                f"{len(members)}", "Pass Plan(model=Ensemble([...]), ...).")  # fmt: skip
        tapping = [name for name, term in plan.terms.items() if term.taps]
        require(not tapping, "DVERGE needs terms without taps", tapping, "Add them afterwards with plan.plus.")
        layers = self._layers(members)
        every = self.every or _epoch(plan.stream)
        draws = torch.randint(len(layers[0]), (-(-plan.steps // every),),
                              generator=torch.Generator().manual_seed(self.seed))  # fmt: skip
        target = self.target
        if target is None:
            own = plan.stream
            target = replace(own, seed=own.seed + 7919 + self.seed) if isinstance(own, Batches) else own
        rounds = [tuple(names[draw] for names in layers) for draw in draws.tolist()]
        diversify = partial(Diversified, tactic=replace(self, target=None), rounds=rounds, share=every / plan.steps)
        return replace(plan, stream=Parts({"source": plan.stream, "target": target}),
                       terms={name: diversify(term) for name, term in plan.terms.items()})  # fmt: skip

    def _layers(self, members: Sequence[nn.Module]) -> list[tuple[str, ...]]:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        if self.layers is None:
            found = [tuple(matching(member, "*", kinds)) for member in members]
        elif all(isinstance(name, str) for name in self.layers):
            found = [cast(tuple[str, ...], self.layers)] * len(members)
        else:
            found = list(cast(tuple[tuple[str, ...], ...], self.layers))
        counts = [len(names) for names in found]
        require(len(found) == len(members) and len(set(counts)) == 1 and min(counts) > 0, "DVERGE needs as many layers "
                f"of each of {len(members)} members", counts, "Name them: layers=((...), (...)).")  # fmt: skip
        for member, names in zip(members, found, strict=True):
            for name in names:
                layer_of(member, name)
        return found


class Diversified(Term):
    """A term that each member answers on the inputs distilled from the others; all terms share the distillation."""

    def __init__(self, term: Term, tactic: DVERGE, rounds: Sequence[tuple[str, ...]], share: float) -> None:
        super().__init__()
        self.term, self.tactic, self.rounds, self.share = term, tactic, rounds, share

    def forward(self, step: Step) -> Tensor:
        if id(step.batch) not in step.runs:
            step.runs[id(step.batch)] = step.batch, Run(self._steps(step), {})
        steps = step.runs[id(step.batch)][1].output
        return cast(Tensor, sum(weight * self.term(one) for weight, one in steps))

    def _steps(self, step: Step) -> list[tuple[float, Step]]:
        """Every member looking at every batch it learns from, and how much that counts."""
        tactic, members = self.tactic, list(cast(Ensemble, step.model).members)
        source, target = _pairs(step.batch["source"], step.batch["target"], tactic.different_label)
        found: list[tuple[float, nn.Module, Batch]] = []
        if tactic.weight > 0:
            layers = self.rounds[min(int(step.progress / self.share + 1e-9), len(self.rounds) - 1)]
            distil = partial(distilled, radius=tactic.radius, steps=tactic.steps, step_size=tactic.step_size)
            with evaluating(step.model, tactic.evaluating):
                made = [distil(m, layer, source.x, target.x) for m, layer in zip(members, layers, strict=True)]
            for i, member in enumerate(members):
                found += [(tactic.weight, member, replace(source, x=x)) for j, x in enumerate(made) if j != i]
        if tactic.adversarial:
            found += [(1.0, member, tactic.adversarial.moved(member, source)) for member in members]
        return [(weight, Step(member, batch, step.progress, step.terms)) for weight, member, batch in found]


def _pairs(source: Batch, target: Batch, different_label: bool) -> tuple[Batch, Batch]:
    plain = all(isinstance(part, Batch) and isinstance(part.x, Tensor) for part in (source, target))
    require(plain, "DVERGE needs batches of one tensor x", "batches of parts or mappings",
            "Apply it before tactics that make batches of parts.")  # fmt: skip
    n, m = len(source.x), len(target.x)
    require(n == m, "DVERGE needs source and target batches of one size", (n, m), "Align the two streams.")
    require(not torch.equal(source.x, target.x), "DVERGE needs source and target in different shuffles",
            "twice the same batch", "Pass target=, the same data shuffled anew.")  # fmt: skip
    if not different_label:
        return source, target
    require(source.y is not None and target.y is not None, "different_label needs labels", "none", "Pass (x, y).")
    assert source.y is not None
    assert target.y is not None
    rows = (source.y != target.y).nonzero()[:, 0]
    require(len(rows) > 0, "different_label needs a pair of two labels", "none in a batch", "Raise the batch size.")
    return replace(source, x=source.x[rows], y=source.y[rows]), replace(target, x=target.x[rows], y=target.y[rows])


def _epoch(stream: Iterable[Any]) -> int:
    """Steps of one pass over the stream."""
    if isinstance(stream, Batches):
        n = size(Batch(stream.x))
        return n // min(stream.batch_size, n)
    require(isinstance(stream, Sized), "DVERGE needs to know an epoch", type(stream).__name__, "Pass every=.")
    return max(len(cast(Sized, stream)), 1)
