"""`contract`: which checks it expands to, how kinds are recognised, how known failures behave."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from headstart.core.plan import CrossEntropy
from headstart.core.validate import Refused
from headstart.testing import contract, kind_of
from headstart.testing.contract import KINDS, maker
from headstart.testing.every import EVERY
from headstart.testing.material import Thin


@dataclass
class Method:
    x: int = 1

    def score(self, evidence: object) -> float:
        return 0.0


def with_methods(*names: str) -> object:
    return type("Method", (), {name: lambda *_args: None for name in names})()


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (with_methods("score"), "score"), (with_methods("score_set"), "set score"), (with_methods("merge"), "merge rule"), (Thin(), "surgery"),
        (with_methods("perturb"), "attack"), (with_methods("propose", "observe"), "sampler"), (CrossEntropy(), "term"), (lambda plan: plan, "tactic"),
        (with_methods("__call__"), "tactic"), (with_methods("__call__", "remember"), "continual"),
    ],
)  # fmt: skip
def test_kinds_are_recognised_by_protocol(method: object, kind: str) -> None:
    assert kind_of(method) == kind
    assert kind in KINDS


@pytest.mark.parametrize("method", [with_methods("apply"), nn.Linear(1, 1), 3, with_methods("score", "merge")])
def test_no_or_several_protocols_are_refused(method: object) -> None:
    with pytest.raises(Refused, match="protocol of one kind"):
        kind_of(method)


def test_makers_make_fresh_methods() -> None:
    instance = Method()
    for method in (Method, lambda: Method(), partial(Method, x=1), instance):
        first, second = maker(method)(), maker(method)()
        assert first == second == instance
        assert first is not second
    tactic = lambda plan: plan  # noqa: E731
    assert maker(tactic)() is tactic


def ids(test: object) -> list[str]:
    return [case.id for case in test.pytestmark[0].args[1]]  # type: ignore[attr-defined]


def test_it_expands_to_the_checks_of_its_kind() -> None:
    names = ids(contract(Method()))
    assert {"paper_complete", "repr_gives_it_back", "order_of_examples"} <= set(names)
    assert not {"equals_reference", "declared_invariances", "copies_give_it_back"} & set(names)
    more = ids(contract(Method(), reference=lambda e: 0.0, invariant=["scale"]))
    assert set(more) - set(names) == {"equals_reference", "declared_invariances"}
    assert "forgets_less" in ids(contract(with_methods("__call__", "remember")))


def test_kind_may_be_told_and_unknown_words_are_refused() -> None:
    assert "order_of_examples" in ids(contract(with_methods("score", "merge"), kind="score"))
    with pytest.raises(Refused, match="Did you mean 'surgery'"):
        contract(Method(), kind="surgry")
    with pytest.raises(Refused, match="Did you mean 'order_of_examples'"):
        contract(Method(), known_failures={"order_of_example": "because"})


def test_names_of_checks_are_unique_and_explained() -> None:
    for kind in KINDS.values():
        names = [check.name for check in (*EVERY, *kind.checks)]
        assert len(names) == len(set(names))
        assert all(check.run.__doc__ for check in kind.checks)


def test_known_failures_must_fail_with_an_assertion(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from headstart.testing import contract

        class Broken:
            def score(self, evidence):
                return -1.0

        test_contract = contract(Broken(), known_failures={
            "separated_beats_shuffled": "a constant", "order_of_examples": "wrongly declared: it holds"})
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "separated or order or returns or paper")
    result.assert_outcomes(passed=1, xfailed=1, failed=2)  # a float; as declared; paper and the false declaration
    result.stdout.fnmatch_lines(["*order_of_examples*", "*XPASS(strict)*wrongly declared*"])


def test_each_kind_has_its_mutants() -> None:
    here = Path(__file__).parent
    files = {path.stem.removeprefix("test_mutants_").replace("_", " ") for path in here.glob("test_mutants_*.py")}
    assert files == {"every", *KINDS} - {"continual"}  # continual methods are with the tactics
