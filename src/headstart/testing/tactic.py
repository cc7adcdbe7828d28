"""Checks of every `Tactic` (plan -> plan) and every `Continual` (a tactic that remembers tasks)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.objective import Fitted
from headstart.core.plan import CrossEntropy, Plan, Step, Term, sgd
from headstart.core.rng import random_state
from headstart.core.stream import Batches

from .material import Thin, digits, plan_of, small_model
from .subject import Check, Kind, Subject, difference, leaves, snapshot


class _Decay(Term):
    """A term that looks at weights only, so it fits any batch."""

    def forward(self, step: Step) -> Tensor:
        return 1e-4 * sum((p.square().sum() for p in step.model.parameters()), torch.tensor(0.0))


def _use(method: Any, plan: Plan) -> dict[str, Tensor]:
    fitted = fit(method(plan), device="cpu")
    return dict(fitted.model.state_dict())


def _fit(plan: Plan, when: str) -> Fitted:
    try:
        fitted = fit(plan, device="cpu")
    except Exception as error:
        raise AssertionError(f"{when} training raised {type(error).__name__}: {error}") from error
    assert bool(torch.isfinite(fitted.losses).all()), f"{when} a loss is not finite"
    return fitted


def gives_a_plan_that_trains(subject: Subject) -> None:
    """A plan of as many steps, with the model's output shape, whose losses are finite and whose weights move."""
    plan = plan_of(subject)
    given = subject.make()(plan)
    assert isinstance(given, Plan), f"a tactic gives a Plan, not {type(given).__name__}"
    fitted = _fit(given, "alone")
    x = digits()[0][:4]
    assert fitted.model(x).shape == plan.model(x).shape, "the trained model has outputs of another shape"
    assert not torch.equal(fitted.model(x), plan.model(x)), "training moved nothing"


def composes_with_surgery(subject: Subject) -> None:
    """Before or after a low-rank surgery: it trains, leaves frozen weights frozen, and the result is folded."""
    plain = plan_of(subject)
    frozen = plain.model.get_parameter("enter.bias") if isinstance(plain.model.get_submodule("enter"), nn.Linear) else 0
    first, second = subject.make(), subject.make()
    for order, plan in (("before", first(plain).under(Thin())), ("after", second(plain.under(Thin())))):
        fitted = _fit(plan, f"{order} a surgery")
        got, expected = fitted.model.state_dict().keys(), plain.model.state_dict().keys()
        assert got == expected, f"{order} a surgery the result is not folded: {sorted(got ^ expected)[:3]}"
        after = fitted.model.get_parameter("enter.bias")
        assert torch.equal(after, torch.as_tensor(frozen)), f"{order} a surgery a frozen weight moved"


def composes_with_a_term(subject: Subject) -> None:
    """Before or after another term: both are there, and the plan's own term too."""
    plain = plan_of(subject)
    first, second = subject.make(), subject.make()
    for order, plan in (("before", first(plain).plus(decay=_Decay())), ("after", second(plain.plus(decay=_Decay())))):
        fitted = _fit(plan, f"{order} a term")
        assert {"task", "decay"} <= set(fitted.terms), f"{order} a term: terms are {sorted(fitted.terms)}"


def keeps_what_the_plan_had(subject: Subject) -> None:
    """Hooks after each step and changes at the end that the plan had are still called."""
    called: list[str] = []

    def finish(model: nn.Module) -> nn.Module:
        called.append("finish")
        return model

    plan = replace(plan_of(subject), after_step=(lambda _step: called.append("step"),), finish=(finish,))
    fit(subject.make()(plan), device="cpu")
    assert called.count("finish") == 1, "the plan's finish was lost or called twice"
    assert called.count("step") >= plan.steps, "the plan's after_step was lost"


def _tasks(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Split digits: 0 to 4, then 5 to 9; other training examples for each seed."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:1200]
    return [(x[rows], y[rows]) for rows in (order[y[order] < 5], order[y[order] >= 5])]


def _plan(model: nn.Module, task: tuple[Tensor, Tensor], seed: int, steps: int = 120) -> Plan:
    stream = Batches(x=task[0], y=task[1], batch_size=32, seed=seed)
    return Plan(model=model, stream=stream, terms={"task": CrossEntropy()}, steps=steps, optimizer=sgd(0.05))


@cache
def _first(seed: int) -> nn.Module:
    return fit(_plan(small_model(), _tasks(seed)[0], seed), device="cpu", seed=seed).model


def _kept(model: nn.Module, seed: int) -> float:
    """Accuracy on the first task among its own five classes."""
    x, y = _tasks(seed)[0]
    with torch.no_grad():
        return float((model(x)[:, :5].argmax(1) == y).float().mean())


def _pass(task: tuple[Tensor, Tensor], n: int | None = None) -> list[tuple[Tensor, Tensor]]:
    return list(zip(task[0][:n].split(64), task[1][:n].split(64), strict=True))  # type: ignore[no-untyped-call]


def identity_before_remembering(subject: Subject) -> None:
    """Before the first `remember`, training is plain training, bit for bit."""
    plan = plan_of(subject)
    assert not (at := difference(_use(lambda p: p, plan), _use(subject.make(), plan))), f"weights differ at {at}"


def remembering_leaves_no_trace(subject: Subject) -> None:
    """`remember` changes neither model nor stream nor random state."""
    model, stream, method = copy.deepcopy(_first(0)), _pass(_tasks(0)[0], 128), subject.make()
    before, state = snapshot((model, stream)), random_state()
    method.remember(model, stream)
    assert not (at := difference(before, snapshot((model, stream)))), f"remember changed {at}"
    assert not (at := difference(state, random_state())), f"remember moved random state: {at}"


def _held(value: Any) -> int:
    return sum(leaf.numel() for _, leaf in leaves(value) if isinstance(leaf, Tensor))


def bounded_memory(subject: Subject) -> None:
    """What it holds after eight tasks is what it held after six."""
    method, model = subject.make(), copy.deepcopy(_first(0))
    sizes = []
    for _ in range(8):
        method.remember(model, _pass(_tasks(0)[0], 256))
        sizes.append(_held(vars(method)))
    assert sizes[7] <= sizes[5], f"numbers held after each task: {sizes}"


def forgets_less(subject: Subject) -> None:
    """Split digits: after the second task it knows more of the first than plain fine-tuning does, paired over seeds."""
    gains = []
    for seed in range(3):
        first, second = _tasks(seed)
        method = subject.make()
        learned = fit(method(_plan(small_model(), first, seed)), device="cpu", seed=seed).model
        method.remember(learned, _pass(first))
        after = fit(method(_plan(learned, second, seed)), device="cpu", seed=seed).model
        gains.append(_kept(after, seed) - _plain_kept(seed))
    mean = sum(gains) / len(gains)
    assert mean > 0.01, f"accuracy kept on the first task, minus plain fine-tuning's: {[round(g, 3) for g in gains]}"


@cache
def _plain_kept(seed: int) -> float:
    return _kept(fit(_plan(_first(seed), _tasks(seed)[1], seed), device="cpu", seed=seed).model, seed)


def _spoiled(subject: Subject) -> Plan:
    plan = plan_of(subject)
    assert isinstance(plan.stream, Batches)
    return replace(plan, stream=replace(plan.stream, x=torch.full_like(plan.stream.x, torch.nan)))


_BOTH = (
    Check(gives_a_plan_that_trains), Check(composes_with_surgery), Check(composes_with_a_term),
    Check(keeps_what_the_plan_had),
)  # fmt: skip
TACTIC = Kind(
    name="tactic", inputs=lambda subject, _dtype: plan_of(subject), use=_use, bad=lambda _subject: {},
    spoiled=_spoiled, follows=False, checks=_BOTH,
)  # fmt: skip
CONTINUAL = replace(
    TACTIC,
    name="continual",
    checks=(
        *_BOTH, Check(identity_before_remembering), Check(remembering_leaves_no_trace), Check(bounded_memory),
        Check(forgets_less),
    ),
)  # fmt: skip
