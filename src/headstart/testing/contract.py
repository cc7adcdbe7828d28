"""One line in a test file that expands to every check a method must pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from headstart.core.plan import Term
from headstart.core.validate import one_of, require

from .attack import ATTACK
from .every import EVERY
from .merge_rule import MERGE_RULE
from .sampler import SAMPLER
from .score import SCORE
from .set_score import SET_SCORE
from .subject import Check, Kind, Subject
from .surgery import SURGERY
from .tactic import CONTINUAL, TACTIC
from .term import TERM

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (SCORE, SET_SCORE, MERGE_RULE, SURGERY, TERM, TACTIC, CONTINUAL, ATTACK, SAMPLER)
}


def kind_of(method: Any) -> str:
    """Which kind of method this is, by the protocol it has.

    >>> class Mine:
    ...     def score(self, evidence): ...
    >>> kind_of(Mine())
    'score'
    """

    def can(*names: str) -> bool:
        return all(callable(getattr(method, name, None)) for name in names)

    if isinstance(method, Term):
        return "term"
    found = [
        name
        for name, is_it in {
            "score": can("score"),
            "set score": can("score_set"),
            "merge rule": can("merge"),
            "surgery": can("apply", "fold") and not isinstance(method, nn.Module),
            "attack": can("perturb"),
            "sampler": can("propose", "observe"),
            "continual": can("remember") and callable(method),
            "tactic": callable(method) and not can("remember") and not isinstance(method, nn.Module | type),
        }.items()
        if is_it
    ]
    require(len(found) == 1, "A method must have the protocol of one kind", f"{method!r} with {found or 'none'}",
            "Give it score, score_set, merge, apply and fold, perturb, propose and observe, __call__(plan) or "
            "kind=.")  # fmt: skip
    return found[0]


def maker(method: Any) -> Callable[[], Any]:
    """A function that makes a fresh method: a class or function without needed arguments itself, else a copier."""
    if isinstance(method, type | partial) or inspect.isfunction(method):
        parameters = inspect.signature(method).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not needed:
            return method
    return lambda: copy.deepcopy(method)


def checks_of(subject: Subject) -> list[Check]:
    """The checks that a subject must pass."""
    return [check for check in (*EVERY, *subject.kind.checks) if check.applies(subject)]


def contract(
    method: Any,
    *,
    kind: str | None = None,
    known_failures: Mapping[str, str] | None = None,
    model: Callable[[], nn.Module] | None = None,
    batch: Callable[[], Any] | None = None,
    needs: Sequence[str] = ("base",),
    models: int = 3,
    invariant: Sequence[str] = (),
    reference: Callable[[Any], float] | None = None,
    streamed: Callable[[Sequence[Any]], float] | None = None,
    starts_same: bool = True,
    trainable: Callable[[nn.Module], int] | None = None,
    optimum: Callable[[Any], Any] | None = None,
    minimum: float = 0.0,
    teachers: Sequence[nn.Module] = (),
    at_layer: Callable[[str], Any] | None = None,
    results: Callable[[Any, Any], Any] | None = None,
    refuses: Sequence[Callable[[], Any]] = (),
) -> Callable[..., None]:
    """A parametrised test, one case for each check: `test_contract = contract(Ties(density=0.2))`.

    Args:
        method: an instance, or a function without arguments that makes one (terms that hold teachers or data).
        kind: score, set score, merge rule, surgery, term, tactic, continual, attack or sampler; by default recognised
            from the protocol.
        known_failures: {name of check: reason}; such a check must fail, and the reason is shown.
        model: makes the model to work on (surgery, term, tactic, attack); by default a small perceptron for digits,
            x (n, 1, 8, 8) -> (n, 10).
        batch: makes the batch to work on (surgery, term): a `Batch` or {part: Batch}; by default sixteen digits.
        needs: of a merge rule, what it is given beside the models: "base", "importance" or "grams" (as importance).
        models: of a merge rule, how many it is given; 3 stands for any number.
        invariant: of a score or set score, changes of the features that leave it: "rotation", "scale", "shift", "zero
            columns".
        reference: of a score or set score, a slow float64 restatement, evidence -> float.
        streamed: of a score, the same from a list of pieces of evidence.
        starts_same: of a surgery, whether the operated model first computes what the original does.
        trainable: of a surgery, the formula for the count of trained numbers, original model -> int.
        optimum: of a term, term -> a `Step` where it is at its minimum.
        minimum: of a term, its value there.
        teachers: of a term, modules no gradient may reach.
        at_layer: of a term that taps layers, name of a layer -> the term.
        results: of a sampler, (tasks, indices of those trained) -> what it observes; by default one number a task.
        refuses: calls that must raise `Refused`, such as `lambda: Ties(density=2)`.

    Raises:
        Refused: a kind or known failure that does not exist.
    """
    import pytest

    make = maker(method)
    if kind is None:
        kind = kind_of(make())
    one_of("kind", kind, KINDS)
    subject = Subject(
        make=make, kind=KINDS[kind], model=model, batch=batch, needs=tuple(needs), models=models,
        invariant=tuple(invariant),
        reference=reference, streamed=streamed, starts_same=starts_same, trainable=trainable, optimum=optimum,
        minimum=minimum, teachers=tuple(teachers), at_layer=at_layer, results=results, refuses=tuple(refuses),
    )  # fmt: skip
    checks = checks_of(subject)
    failing = dict(known_failures or {})
    for name in failing:
        one_of("A known failure", name, [check.name for check in checks])
    cases = []
    for check in checks:
        reason = failing.get(check.name)
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason)]
        cases.append(pytest.param(check, id=check.name, marks=marks))

    @pytest.mark.parametrize("check", cases)
    def test_contract(check: Check) -> None:
        check.run(subject)

    return test_contract
