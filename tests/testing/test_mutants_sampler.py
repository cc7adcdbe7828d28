"""Each check of samplers rejects a sampler made wrong in that one way; a right minimal sampler passes all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from headstart.core.validate import finite, require
from headstart.testing.every import EVERY
from headstart.testing.sampler import SAMPLER
from headstart.testing.subject import Subject


class Lines:
    """The three tasks where a line through all results is highest; before the first results, those in the middle."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def propose(self, tasks: Tensor) -> Tensor:
        require(len(tasks) >= 3, "Lines needs three tasks", len(tasks), "Pass more.")
        finite("tasks", tasks)
        if not self.seen:
            return (tasks - 0.5).abs().sum(1).topk(3, largest=False).indices
        line = torch.linalg.lstsq(self.seen["tasks"], self.seen["results"][:, None], driver="gelsd").solution
        return (tasks.double() @ line)[:, 0].topk(3).indices

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        require(len(results) == len(tasks), "Lines needs one result a task", len(results), "Align them.")
        for name, new in (("tasks", tasks), ("results", results)):
            self.seen[name] = torch.cat([self.seen.get(name, new[:0].double()), new.double()])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.seen.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.seen = {name: value.clone() for name, value in state.items()}


def proposing(change: Callable[[Tensor, Tensor], Tensor]) -> type:
    """A sampler whose proposals are changed: change(tasks, chosen)."""

    class Mutant(Lines):
        def propose(self, tasks: Tensor) -> Tensor:
            return change(tasks, super().propose(tasks))

    return Mutant


class Deaf(Lines):
    """Always proposes the middle."""

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        super().observe(tasks, results)
        self.seen["results"] = torch.ones(len(self.seen["tasks"]), dtype=torch.float64)


class Forgets(Lines):
    """Its state lacks the results."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({"tasks": state["tasks"], "results": -state["results"]})


class Empty(Lines):
    def state_dict(self) -> dict[str, Tensor]:
        return {}


class Lists(Lines):
    def state_dict(self) -> dict:
        return {name: value.tolist() for name, value in self.seen.items()}


class Shares(Lines):
    """Hands out its own tensors, and adds to them in place."""

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        super().observe(tasks, results)
        self.seen = {"tasks": self.seen["tasks"][:3], "results": self.seen["results"][:3]}
        self.seen["results"] += 0.1

    def propose(self, tasks: Tensor) -> Tensor:
        if self.seen:
            self.seen["results"] *= 1.01
        return super().propose(tasks)

    def state_dict(self) -> dict[str, Tensor]:
        return self.seen


class SharesWhatItLoads(Shares):
    def state_dict(self) -> dict[str, Tensor]:
        return Lines.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.seen = dict(state)


class Clips(Lines):
    """Repairs results in the caller's tensor."""

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        super().observe(tasks, results.clamp_(max=0.5))


class Keeps(Lines):
    """Holds on to the caller's results, and reads them later."""

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        self.seen = {"tasks": tasks.double() + 0, "results": results}

    def propose(self, tasks: Tensor) -> Tensor:
        if self.seen:
            self.seen["results"] = self.seen["results"].double()
        return super().propose(tasks)


MUTANTS: dict[str, list[type]] = {
    "proposes_tasks": [
        proposing(lambda tasks, chosen: chosen.double()), proposing(lambda tasks, chosen: chosen[:0]),
        proposing(lambda tasks, chosen: chosen[[0, 0, 1]]), proposing(lambda tasks, chosen: chosen + 20),
        proposing(lambda tasks, chosen: chosen[0]), proposing(lambda tasks, chosen: chosen.tolist()),  # type: ignore[arg-type, return-value]
    ],
    "results_count": [Deaf, proposing(lambda tasks, chosen: torch.arange(3))],
    "order_of_tasks": [
        proposing(lambda tasks, chosen: torch.arange(3)),
        proposing(lambda tasks, chosen: torch.tensor(sorted({0, *chosen.tolist()}))),
    ],
    "goes_on_from_its_state": [Forgets, Empty, Lists, Shares],
    "results_untouched": [Clips, Keeps],
    "loads_a_copy": [SharesWhatItLoads],
}  # fmt: skip


def check_of(name: str):
    (check,) = [check for check in (*SAMPLER.checks, *EVERY) if check.name == name]
    return check


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in SAMPLER.checks}


@pytest.mark.parametrize("check", SAMPLER.checks, ids=lambda check: check.name)
def test_a_right_method_passes(check) -> None:
    check.run(Subject(make=Lines, kind=SAMPLER))


@pytest.mark.parametrize("check", SAMPLER.checks, ids=lambda check: check.name)
def test_results_may_be_rows(check) -> None:
    class Rows(Lines):
        def observe(self, tasks: Tensor, results: Tensor) -> None:
            require(results.shape == (len(tasks), 24), "Rows needs (b, 24)", tuple(results.shape), "Align them.")
            super().observe(tasks, results.mean(1))

    check.run(
        Subject(
            make=Rows, kind=SAMPLER, results=lambda tasks, chosen: tasks[chosen].sum(1, keepdim=True) * tasks.mean(1)
        )
    )


@pytest.mark.parametrize(("name", "make"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, make: type) -> None:
    with pytest.raises(AssertionError):
        check_of(name).run(Subject(make=make, kind=SAMPLER))


class Blind(Lines):
    """No input is looked at."""

    def propose(self, tasks: Tensor) -> Tensor:
        return torch.arange(min(3, len(tasks)))

    def observe(self, tasks: Tensor, results: Tensor) -> None:
        pass


@pytest.mark.parametrize("name", ["bad_input_refused", "nan_is_not_hidden"])
def test_the_checks_of_every_method_see_samplers(name: str) -> None:
    check_of(name).run(Subject(make=Lines, kind=SAMPLER))
    with pytest.raises(AssertionError):
        check_of(name).run(Subject(make=Blind, kind=SAMPLER))
