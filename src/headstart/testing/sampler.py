"""Checks of every sampler: it proposes which tasks to train on next, and observes what came of it.

A sampler has `propose(tasks (m, q)) -> indices (b,)`, `observe(tasks (b, q), results)`, `state_dict()` of tensors and
`load_state_dict`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .subject import Check, Kind, Subject, difference, snapshot

ROUNDS = 4


def _means(tasks: Tensor, chosen: Tensor) -> Tensor:
    """One number a task."""
    return tasks[chosen].mean(1)


def _given(subject: Subject, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    tasks = torch.rand(24, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {"tasks": tasks.to(dtype), "results": subject.results or _means}


def _rounds(method: Any, given: dict[str, Any]) -> Iterator[Tensor]:
    while True:
        chosen = method.propose(given["tasks"])
        yield chosen
        method.observe(given["tasks"][chosen], given["results"](given["tasks"], chosen))


def _use(method: Any, given: dict[str, Any]) -> list[Tensor]:
    return [chosen for _, chosen in zip(range(ROUNDS), _rounds(method, given), strict=False)]


def proposes_tasks(subject: Subject) -> None:
    """Every proposal is a tensor (b,) of different indices into the tasks, b >= 1, whatever their dtype."""
    for dtype in (torch.float32, torch.float64):
        for _, chosen in zip(range(ROUNDS), _rounds(subject.make(), _given(subject, dtype)), strict=False):
            assert isinstance(chosen, Tensor), f"a proposal is a tensor, not a {type(chosen).__name__}"
            assert chosen.dtype == torch.int64, f"a proposal is int64, not {chosen.dtype}"
            assert chosen.ndim == 1, f"a proposal has shape (b,), not {tuple(chosen.shape)}"
            assert len(chosen), "nothing is proposed"
            assert 0 <= int(chosen.min()) <= int(chosen.max()) < 24, f"not indices of 24 tasks: {chosen.tolist()}"
            assert len(set(chosen.tolist())) == len(chosen), f"a task is proposed twice: {chosen.tolist()}"


def results_count(subject: Subject) -> None:
    """Where the results are those of the mirrored tasks, other tasks are proposed."""
    given = _given(subject)
    mirrored = {**given, "results": lambda tasks, chosen: given["results"](1 - tasks, chosen)}
    one, other = _use(subject.make(), given), _use(subject.make(), mirrored)
    assert difference(one, other), "the proposals do not depend on the results"


def order_of_tasks(subject: Subject) -> None:
    """Shuffled tasks: the same tasks are proposed."""
    given = _given(subject, torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = {**given, "tasks": given["tasks"][order]}
    for one, other in zip(_use(subject.make(), given), _use(subject.make(), shuffled), strict=True):
        assert set(one.tolist()) == set(order[other].tolist()), f"{one.tolist()} became {order[other].tolist()}"


def goes_on_from_its_state(subject: Subject) -> None:
    """A fresh sampler with the saved state, through a file without pickled code, proposes what the old one does."""
    given, method = _given(subject), subject.make()
    old = _rounds(method, given)
    for _ in range(2):
        next(old)
    next(old)  # two rounds observed, the third proposed
    state = method.state_dict()
    assert state, "after an observation there is a state"
    assert all(isinstance(value, Tensor) for value in state.values()), "a state is {name: tensor}"
    before, file = snapshot(state), io.BytesIO()
    torch.save(state, file)
    expected = _use(method, given)
    assert not (at := difference(before, snapshot(state))), f"a saved state changed with the sampler at {at}"
    file.seek(0)
    fresh = subject.make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not (at := difference(expected, _use(fresh, given))), f"after a restart the proposals differ at {at}"


def results_untouched(subject: Subject) -> None:
    """The tensor of results is as it was, and writing into it later changes nothing."""
    given, plain = _given(subject), _use(subject.make(), _given(subject))
    method, found = subject.make(), []
    for _ in range(ROUNDS):
        found.append(method.propose(given["tasks"]))
        tasks = given["tasks"][found[-1]]
        results = given["results"](given["tasks"], found[-1])
        before = snapshot((tasks, results))
        method.observe(tasks, results)
        assert not (at := difference(before, snapshot((tasks, results)))), f"what was observed changed at {at}"
        tasks.zero_()
        results.zero_()
    assert not (at := difference(plain, found)), f"it keeps the caller's tensors: proposals differ at {at}"


def _spoiled(subject: Subject) -> dict[str, Any]:
    given = _given(subject)
    given["tasks"][5, 1] = torch.nan
    return given


def _bad(subject: Subject) -> dict[str, Any]:
    given = _given(subject)
    results = given["results"]

    def longer(tasks: Tensor, chosen: Tensor) -> Tensor:
        return torch.cat([results(tasks, chosen)] * 2)

    return {"no tasks": {**given, "tasks": given["tasks"][:0]}, "more results than tasks": {**given, "results": longer}}


def loads_a_copy(subject: Subject) -> None:
    """Two samplers that load one state go their own ways."""
    given, method = _given(subject), subject.make()
    _use(method, given)
    state = method.state_dict()
    before, fresh = snapshot(state), subject.make()
    fresh.load_state_dict(state)
    _use(fresh, given)
    assert not (at := difference(before, snapshot(state))), f"a loaded state changed with the sampler at {at}"


SAMPLER = Kind(
    name="sampler",
    inputs=_given,
    use=_use,
    bad=_bad,
    spoiled=_spoiled,
    follows=False,  # indices
    checks=tuple(map(Check, (
        proposes_tasks, results_count, order_of_tasks, goes_on_from_its_state, results_untouched, loads_a_copy,
    ))),
)  # fmt: skip
