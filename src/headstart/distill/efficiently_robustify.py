"""Robustness of a small model, carried into the last layers of a large one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.plan import Batch, Plan, Run, Step, Teacher, Term
from headstart.core.stream import as_batch, each, position_in
from headstart.core.surgery import freeze
from headstart.core.taps import tapped
from headstart.core.validate import one_of, require

from .three_heads import RULES, Rule, ThreeHeads

PAPER = Paper(
    title="Efficiently Robustify Pre-Trained Models",
    authors="Nishant Jain and Harkirat Behl and Yogesh Singh Rawat and Vibhav Vineet",
    year=2023,
    arxiv="2309.07499",
    departs="Loss weights, the teacher's confidence (1 - entropy / log c) and the rule for choosing a head are this "
    "library's reading; uncertainty from dropout passes is left out, and answers on clean inputs are not cached.",
)


@dataclass(frozen=True)
class Robustify:
    """A large classifier that bears worse inputs, from a small robust teacher, and does not forget the clean ones.

    Only the last layers and three copies of the head are trained: the clean head keeps the original's answers on clean
    inputs, the unclean one learns the teacher's on augmented inputs, each row weighted by how sure the teacher is, and
    the combined one learns both. Each input is answered by the head that is surest. The plan's own terms
    (cross-entropy on the labels) are added for augmented inputs: whole on the unclean head, half on the combined one.

    Args:
        teacher: inputs -> logits of the same classes in the same order; small, and robust already (train it on
            augmented inputs, see `Consistency`).
        augment: x of a batch -> a worse x, drawing from torch's global generator, as in `Batches`; not what is tested.
        layers: shell pattern over dotted names of the layers to tune (paper: a small share, such as the last block).
        head: dotted name of the head, by default the last linear layer; its output must be the model's.
        rule: "entropy" or "kl", see `choose_head`.
        temperature: T > 0 of the distillation, whose losses are multiplied by T².
        weights: of the losses of the clean, the unclean and the combined head, >= 0.

    Shape: batches `Batch(x, y)`; the fitted model is a `ThreeHeads`, x -> logits (n, c).

    Use it when: a large model is good on clean inputs, and tuning all of it on worse ones costs too much or forgets.
    Not when: the teacher is worse than the model on the inputs that matter: no head then learns much from it.

    Cost: a step forwards two batches, without gradient below the tuned layers; the original and the teacher once each.

    Notes: what is frozen stays in eval mode, so that no batch statistics move; those of tuned layers are over clean and
    augmented inputs together. The plan's model is left as it is, which restores the original. Terms added to the plan
    later see batches of the parts "clean" and "augmented": use `On(part, term)`. Heads are of different calibration:
    `calibrate` fits a temperature for each; `head_report` says whether choosing pays. In the recorded claim it does
    not: the sharper clean head answers 85 % of the inputs with corruptions of training, on which the unclean one alone
    is 2.7 points better; so small a model is tuned whole in less time, and is better on them still, but on no others.
    The order of classes cannot be seen in logits: check it.

    Raises:
        Refused: a stream without (x, y) batches, a teacher of other classes, a head that is not the output, no layer
            with weights, an argument out of range.

    Reference: Jain et al. 2023, section 3 and the figure of the workflow.

    >>> from headstart.core.stream import Batches
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> plan = Plan(model=model, stream=Batches(x=torch.ones(9, 4), y=torch.arange(9) % 3), steps=10)
    >>> robust = Robustify(nn.Linear(4, 3), lambda x: x + 0.1 * torch.randn_like(x), "2")(plan)
    >>> list(robust.terms), bool((robust.model(torch.ones(1, 4)) == model(torch.ones(1, 4))).all())
    (['task', 'robustify'], True)
    """

    teacher: nn.Module = field(repr=False)
    augment: Callable[[Any], Any]
    layers: str
    head: str | None = None
    rule: Rule = "entropy"
    temperature: float = 1.0
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        require(
            0 < self.temperature < math.inf, "Robustify needs a finite temperature > 0", self.temperature, "Pass 1."
        )
        good = len(self.weights) == 3 and all(0 <= w < math.inf for w in self.weights) and sum(self.weights) > 0
        require(good, "Robustify needs three finite weights >= 0, not all 0", self.weights, "Pass (1, 1, 1).")

    def __call__(self, plan: Plan) -> Plan:
        model = ThreeHeads(plan.model, self.layers, self.head, self.rule)
        first = next(iter(plan.stream), None)
        batch = None if first is None else as_batch(first)
        require(isinstance(batch, Batch), "Robustify needs a stream of (x, y) batches", type(batch).__name__,
                "Apply it before tactics that make batches of parts.")  # fmt: skip
        assert isinstance(batch, Batch)
        original = freeze(plan.model).eval()
        device = next(original.parameters()).device
        with torch.no_grad(), tapped(original, [model.head]) as seen:
            x = each(lambda t: t[:2].to(device), batch.x)
            output, taught = original(x), Teacher(self.teacher).to(device)(x)
        whole = isinstance(output, Tensor) and torch.equal(output, seen[model.head])
        require(whole, "The head's output must be the model's", repr(model.head), "Name the layer that gives logits.")
        require(taught.shape == output.shape, "Teacher and model must give logits of one shape",
                (tuple(taught.shape), tuple(output.shape)), "Train a teacher of the same classes.")  # fmt: skip
        _, unclean, combined = self.weights
        terms: dict[str, Term] = {
            name: OnHeads(term, model.taps, (unclean, combined / 2)) for name, term in plan.terms.items()
        }
        stream = Augmented(plan.stream, self.augment)
        distilled = Distilled(self.teacher, original, model.taps, self.temperature, self.weights)
        return replace(plan, model=model, stream=stream, terms=terms).plus(robustify=distilled)


@dataclass(frozen=True)
class Augmented:
    """Each batch as the parts "clean" and "augmented", with the same labels."""

    stream: Iterable[Any]
    augment: Callable[[Any], Any]

    def start(self, position: int) -> Iterator[dict[str, Batch]]:
        for given in position_in(self.stream, position):
            batch = as_batch(given)
            yield {"clean": batch, "augmented": replace(batch, x=self.augment(batch.x))}

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return self.start(0)


class Distilled(Term):
    """What the three heads are to learn from the original (clean inputs) and from the teacher (augmented inputs)."""

    def __init__(
        self,
        teacher: nn.Module,
        original: nn.Module,
        taps: tuple[str, ...],
        temperature: float,
        weights: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.teacher, self.original, self.taps = Teacher(teacher), Teacher(original), taps
        self.temperature, self.weights = temperature, weights

    def forward(self, step: Step) -> Tensor:
        clean, moved = step.on("clean"), step.on("augmented")
        c, _, m = (clean.run(clean.batch.x).taps[tap] for tap in self.taps)
        _, u, n = (moved.run(moved.batch.x).taps[tap] for tap in self.taps)
        original, teacher = self.original(clean.batch.x), self.teacher(moved.batch.x)
        sure = confidence(teacher)
        losses = (
            self._apart(original, c).mean(),
            (sure * self._apart(teacher, u)).mean(),
            (self._apart(original, m).mean() + (sure * self._apart(teacher, n)).mean()) / 2,
        )
        return torch.stack([w * loss for w, loss in zip(self.weights, losses, strict=True)]).sum()

    def _apart(self, target: Tensor, said: Tensor) -> Tensor:
        """T² KL(target ‖ said) of each example."""
        found, wanted = (F.log_softmax(logits / self.temperature, -1) for logits in (said, target))
        return self.temperature**2 * F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)


class OnHeads(Term):
    """A term of the plan as it looks at the unclean and at the combined head, on augmented inputs."""

    def __init__(self, term: Term, heads: tuple[str, ...], weights: tuple[float, float]) -> None:
        super().__init__()
        self.term, self.heads, self.weights = term, heads[1:], weights
        self.taps = (*self.heads, *(f"model.{tap}" for tap in term.taps))

    def forward(self, step: Step) -> Tensor:
        moved = step.on("augmented")
        run, losses = moved.run(moved.batch.x), []
        taps = {tap: run.taps[f"model.{tap}"] for tap in self.term.taps}
        for head, weight in zip(self.heads, self.weights, strict=True):
            said = {id(moved.batch.x): (moved.batch.x, Run(run.taps[head], taps))}
            losses.append(weight * self.term(replace(moved, runs=said, whole=None)))
        return torch.stack(losses).sum()


def confidence(logits: Tensor) -> Tensor:
    """How sure each row (..., c) is, in [0, 1]: 1 - entropy / log c; 1 for one-hot rows, 0 for uniform ones.

    >>> confidence(torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0]]))
    tensor([0., 1.])
    """
    logs = F.log_softmax(logits, -1)
    entropy = -torch.where(logs == -torch.inf, 0, logs.exp() * logs).sum(-1)
    return (1 - entropy / math.log(logits.shape[-1])).clamp(0, 1)
