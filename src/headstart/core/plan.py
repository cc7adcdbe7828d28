"""A training run as data: methods transform plans, only `fit` executes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .rates import adamw, constant, cosine, sgd
from .stream import Batch, each
from .surgery import Surgery, freeze
from .validate import one_of, require


@dataclass(frozen=True)
class Run:
    """One forward pass: what the model put out, and what the tapped layers said."""

    output: Any
    taps: Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One training step as its terms see it.

    Attributes:
        model: being trained; call it through `run` so that a batch is forwarded once however many terms look.
        batch: a `Batch`, or {part: Batch}.
        progress: share of the run that is done, in [0, 1).
        terms: the plan's terms, for an `after_step` that updates a teacher.
        recorded: filled by the layer hooks during a forward pass.
    """

    model: nn.Module
    batch: Any
    progress: float = 0.0
    terms: Mapping[str, nn.Module] = field(default_factory=dict)
    recorded: Mapping[str, Tensor] = field(default_factory=dict)
    runs: dict[int, tuple[Any, Run]] = field(default_factory=dict, repr=False)  # holds x: its id must not be reused
    whole: Any = field(default=None, repr=False)

    def on(self, part: str) -> Step:
        """The same step, looking at one part of the batch only."""
        parts = list(self.batch) if isinstance(self.batch, dict) else []
        one_of("The part of a batch", part, parts)
        return replace(self, batch=self.batch[part], whole=self.batch)

    def run(self, x: Any) -> Run:
        """Forward `x`, at most once a step.

        When `x` belongs to a batch of several parts with one shape and dtype, all parts go through the model in one
        call and each gets its rows back: batch statistics are those of the joint batch, and the cost is one forward.
        """
        if id(x) not in self.runs:
            whole = self.whole if self.whole is not None else self.batch
            parts = list(whole.values()) if isinstance(whole, dict) else []
            joint = [p.x for p in parts if isinstance(p.x, Tensor)]
            alike = len({(t.shape[1:], t.dtype) for t in joint}) == 1 and len(joint) == len(parts) > 1
            if alike and any(t is x for t in joint):
                run = self._forward(torch.cat(joint))
                edge = 0
                for t in joint:
                    self.runs[id(t)] = t, _rows(run, edge, edge + len(t))
                    edge += len(t)
            else:
                self.runs[id(x)] = x, self._forward(x)
        return self.runs[id(x)][1]

    def _forward(self, x: Any) -> Run:
        output = self.model(x)
        return Run(output, dict(self.recorded))


def _rows(run: Run, first: int, last: int) -> Run:
    return Run(each(lambda t: t[first:last], run.output), {tap: t[first:last] for tap, t in run.taps.items()})


class Term(nn.Module, ABC):
    """One named summand of the loss; its own parameters (a critic, a projector) are trained along.

    Attributes:
        taps: layers whose values `forward` reads from `step.run(x).taps`.
    """

    taps: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The loss of one step: a scalar, the mean over the batch."""


class CrossEntropy(Term):
    """Learn the labels of the batch.

    Args:
        smoothing: label smoothing in [0, 1).

    Cost: one forward pass, shared with the other terms.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        require(0 <= smoothing < 1, "CrossEntropy needs 0 <= smoothing < 1", smoothing, "Pass a fraction such as 0.1.")
        super().__init__()
        self.smoothing = smoothing

    def forward(self, step: Step) -> Tensor:
        logits = step.run(step.batch.x).output
        require(step.batch.y is not None, "CrossEntropy needs labels in every batch", None, "Use On(part, term).")
        return F.cross_entropy(logits, step.batch.y, label_smoothing=self.smoothing)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"


class On(Term):
    """Apply a term to one part of a batch of several, such as On("source", CrossEntropy())."""

    def __init__(self, part: str, term: Term) -> None:
        super().__init__()
        self.part, self.term, self.taps = part, term, term.taps

    def forward(self, step: Step) -> Tensor:
        return self.term(step.on(self.part))


class Weighted(Term):
    """A term times a constant weight."""

    def __init__(self, weight: float, term: Term) -> None:
        super().__init__()
        self.weight, self.term, self.taps = weight, term, term.taps

    def forward(self, step: Step) -> Tensor:
        return self.weight * self.term(step)


class Teacher(nn.Module):
    """A frozen model inside a term: always in eval mode, no gradient, its parameters shared with the original."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = freeze(model)
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        return self.model(x)


class GradientRule(Protocol):
    """Named losses -> p.grad for every parameter; without one, `fit` sums the losses and goes backward."""

    def __call__(self, losses: Mapping[str, Tensor], params: Sequence[nn.Parameter]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run as data.

    Args:
        model: the module to train; `fit` trains a copy, and only parameters with requires_grad.
        stream: re-iterable batches (`Batch`, (x, y) pairs, or {part: batch}); repeated until `steps` are done.
        terms: named summands of the loss.
        steps: optimizer steps, > 0.
        optimizer: builds the optimizer from the trainable parameters (model's first, then the terms').
        schedule: progress in [0, 1) -> multiplier of the learning rate.
        gradient: named losses -> p.grad; None sums the losses and goes backward.
        after_step: called with the `Step` after each optimizer step (moving averages, memories, recorders); an object
            with `state_dict`/`load_state_dict` is checkpointed.
        finish: model -> model, applied once after the last step (fold, average, re-estimate statistics).

    Raises:
        Refused: no steps, no terms, or nothing to train.
    """

    model: nn.Module
    stream: Iterable[Any]
    terms: Mapping[str, Term] = field(default_factory=lambda: {"task": CrossEntropy()})
    steps: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = field(default_factory=adamw)
    schedule: Callable[[float], float] = constant
    gradient: GradientRule | None = None
    after_step: tuple[Callable[[Step], None], ...] = ()
    finish: tuple[Callable[[nn.Module], nn.Module], ...] = ()

    def __post_init__(self) -> None:
        require(self.steps > 0, "A plan needs steps > 0", self.steps, "Pass the number of optimizer steps.")
        require(bool(self.terms), "A plan needs at least one term", "none", 'Pass terms={"task": CrossEntropy()}.')

    def plus(self, **terms: Term) -> Plan:
        """The same plan with more summands; a name that is taken is refused."""
        taken = sorted(set(terms) & set(self.terms))
        require(not taken, "A new term needs a free name", taken, "Choose another name.")
        return replace(self, terms={**self.terms, **terms})

    def under(self, surgery: Surgery) -> Plan:
        """The same plan on an operated model, folded back after the last step."""
        return replace(self, model=surgery.apply(self.model), finish=(surgery.fold, *self.finish))

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter that will be trained: the model's, then the terms'."""
        modules = [self.model, *self.terms.values()]
        unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return list(unique.values())


class Tactic(Protocol):
    """A method that changes how a model is trained: plan -> plan, the input plan unchanged."""

    def __call__(self, plan: Plan) -> Plan: ...


class Continual(Tactic, Protocol):
    """A tactic that learns task after task: `remember` is called once after each."""

    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None: ...


__all__ = [
    "Batch", "Continual", "CrossEntropy", "GradientRule", "On", "Plan", "Run", "Step", "Tactic", "Teacher", "Term",
    "Weighted", "adamw", "constant", "cosine", "sgd",
]  # fmt: skip
