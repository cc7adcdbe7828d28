"""Each check of tactics and continual methods rejects a wrong one; right minimal ones pass all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.core.plan import CrossEntropy, Plan, Step, Teacher, Term
from headstart.core.stream import Batches, as_batch
from headstart.core.surgery import freeze, with_head
from headstart.testing.every import EVERY
from headstart.testing.subject import Subject
from headstart.testing.tactic import CONTINUAL, TACTIC


class Near(Term):
    """The weights near where they began, where they are trained."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__()
        self.start, self.strength = Teacher(model), strength

    def forward(self, step: Step) -> Tensor:
        here, there = dict(step.model.named_parameters()), dict(self.start.model.named_parameters())
        return self.strength * sum((here[n] - there[n]).square().sum() for n in here)


def stay(plan: Plan) -> Plan:
    """A right tactic."""
    return plan.plus(smooth=CrossEntropy(0.1))


def stay_everywhere(plan: Plan) -> Plan:
    """Cannot go before a surgery, which renames weights."""
    return plan.plus(near=Near(plan.model, 0.01))


def other_classes(plan: Plan) -> Plan:
    model = with_head(plan.model, 3)
    return replace(plan, model=model, terms={"near": Near(model, 1.0)})


def stands_still(plan: Plan) -> Plan:
    return replace(plan, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))


def forgets_terms(plan: Plan) -> Plan:
    return replace(plan, terms={"only": CrossEntropy()})


def forgets_hooks(plan: Plan) -> Plan:
    return replace(stay(plan), after_step=(), finish=())


def finishes_twice(plan: Plan) -> Plan:
    return replace(stay(plan), finish=(*plan.finish, *plan.finish))


def thaws(plan: Plan) -> Plan:
    return replace(plan, model=freeze(plan.model).requires_grad_(True))


def diverges(plan: Plan) -> Plan:
    class Infinite(Term):
        def forward(self, step: Step) -> Tensor:
            return step.run(step.batch.x).output.mean() / 0

    return plan.plus(infinite=Infinite())


TACTICS: dict[str, list[Callable[[Plan], object]]] = {
    "gives_a_plan_that_trains": [lambda _plan: None, other_classes, stands_still, diverges],
    "composes_with_surgery": [thaws, stay_everywhere, lambda plan: replace(plan, finish=())],
    "composes_with_a_term": [forgets_terms],
    "keeps_what_the_plan_had": [forgets_hooks, finishes_twice],
}  # fmt: skip


class Replay:
    """A right continual method: keeps 100 examples in all and mixes them in."""

    def __init__(self, capacity: int = 100) -> None:
        self.capacity, self.seen = capacity, 0
        self.x, self.y = torch.empty(0), torch.empty(0, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(0)

    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        batches = [as_batch(batch) for batch in stream]
        x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
        self.x = torch.cat([self.x.view(-1, *x.shape[1:]), x])
        self.y = torch.cat([self.y, y])
        kept = torch.randperm(len(self.y), generator=self.generator)[: self.capacity]
        self.x, self.y = self.x[kept].clone(), self.y[kept].clone()

    def __call__(self, plan: Plan) -> Plan:
        return plan if len(self.y) == 0 else plan.plus(old=Old(self.x, self.y))


class Old(Term):
    """Cross-entropy on remembered examples."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)
        self.register_buffer("y", y)

    def forward(self, step: Step) -> Tensor:
        return nn.functional.cross_entropy(step.run(self.x).output, self.y)


class Restless(Replay):
    """Changes training before there is anything to remember."""

    def __call__(self, plan: Plan) -> Plan:
        return super().__call__(stay(plan))


class Writes(Replay):
    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        super().remember(model, stream)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)


class LeavesEval(Replay):
    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        super().remember(model.train(), stream)


class Draws(Replay):
    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        super().remember(model, stream)
        torch.randperm(3)


class Scales(Replay):
    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        for batch in stream:
            as_batch(batch).x.mul_(2)
        super().remember(model, stream)


class Hoards(Replay):
    """Keeps everything: forgets little, but memory grows for ever."""

    def __init__(self) -> None:
        super().__init__(10**6)


class HoardsModels(Replay):
    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        super().remember(model, stream)
        self.models = [*getattr(self, "models", []), freeze(model)]


class Forgets(Replay):
    """Remembers and then does nothing with it."""

    def __call__(self, plan: Plan) -> Plan:
        return plan


class Freezes(Replay):
    """Forgets more: labels of what it remembers are shifted."""

    def remember(self, model: nn.Module, stream: Iterable[Any]) -> None:
        super().remember(model, stream)
        self.y = (self.y + 1) % 5


CONTINUALS: dict[str, list[type]] = {
    "identity_before_remembering": [Restless],
    "remembering_leaves_no_trace": [Writes, LeavesEval, Draws, Scales],
    "bounded_memory": [Hoards, HoardsModels],
    "forgets_less": [Forgets, Freezes],
}


def check_of(name: str):
    (check,) = [check for check in (*CONTINUAL.checks, *EVERY) if check.name == name]
    return check


def tactic(function: Callable) -> Subject:
    return Subject(make=lambda: function, kind=TACTIC)


def test_every_check_has_a_mutant() -> None:
    assert set(TACTICS) == {check.name for check in TACTIC.checks}
    assert {*TACTICS, *CONTINUALS} == {check.name for check in CONTINUAL.checks}


@pytest.mark.parametrize("check", TACTIC.checks, ids=lambda check: check.name)
@pytest.mark.parametrize("right", [lambda plan: plan.plus(more=CrossEntropy(0.1)), Replay()], ids=["term", "continual"])
def test_right_tactics_pass(check, right: Callable) -> None:
    check.run(tactic(right))


@pytest.mark.parametrize("check", CONTINUAL.checks, ids=lambda check: check.name)
def test_the_right_continual_method_passes(check) -> None:
    check.run(Subject(make=Replay, kind=CONTINUAL))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "wrong"), [(n, m) for n, ms in TACTICS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, wrong: Callable) -> None:
    with pytest.raises(AssertionError):
        check_of(name).run(tactic(wrong))


@pytest.mark.parametrize(("name", "wrong"), [(n, m) for n, ms in CONTINUALS.items() for m in ms])
def test_the_check_rejects_its_continual_mutant(name: str, wrong: type) -> None:
    with pytest.raises(AssertionError):
        check_of(name).run(Subject(make=wrong, kind=CONTINUAL))


def test_the_checks_of_every_method_see_tactics() -> None:
    def writes(plan: Plan) -> Plan:
        with torch.no_grad():
            next(plan.model.parameters()).mul_(1.1)
        return plan

    def draws(plan: Plan) -> Plan:
        model = freeze(plan.model).requires_grad_(True)
        with torch.no_grad():
            next(model.parameters()).add_(torch.randn(()))
        return replace(plan, model=model)

    def hides(plan: Plan) -> Plan:
        assert isinstance(plan.stream, Batches)
        return replace(plan, stream=replace(plan.stream, x=plan.stream.x.nan_to_num()))

    for name, wrong in (("inputs_untouched", writes), ("random_state_untouched", draws), ("same_result_again", draws),
                        ("nan_is_not_hidden", hides)):  # fmt: skip
        with pytest.raises(AssertionError):
            check_of(name).run(tactic(wrong))
        check_of(name).run(tactic(lambda plan: plan))
