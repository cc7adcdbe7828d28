"""Checks of every method, whatever its kind."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.paper import Paper
from headstart.core.rng import random_state, seeded
from headstart.core.stream import each
from headstart.core.validate import Refused

from .rooms import MODULE_LINES, forbidden_imports
from .subject import Check, Subject, difference, leaves, refusal, snapshot


def _inputs(subject: Subject, dtype: torch.dtype = torch.float32) -> Any:
    return subject.kind.inputs(subject, dtype)


def _used(subject: Subject, seed: int, given: Any) -> Any:
    with seeded(seed):
        return subject.kind.use(subject.make(), given)


def paper_complete(subject: Subject) -> None:
    """The module holds PAPER with title, authors, year, and an arXiv number that is one."""
    paper = getattr(subject.module, "PAPER", None)
    assert isinstance(paper, Paper), f"{subject.module.__name__} needs PAPER = Paper(...)"
    assert all((paper.title.strip(), paper.authors.strip())), "PAPER needs a title and authors"
    assert 1900 <= paper.year <= 2100, f"PAPER.year is {paper.year}"
    assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}", paper.arxiv), paper.arxiv


def docstring_sections(subject: Subject) -> None:
    """A first sentence, Args naming each parameter, Cost, Reference, and an example in the module."""
    of = subject.of
    text = inspect.getdoc(of) or ""
    names = [n for n in inspect.signature(of).parameters if n != "self"] if text else []
    if inspect.isfunction(of):
        names = names[1:]  # the plan
    assert text, f"{of.__name__} needs a docstring"
    assert text.split("\n\n")[0].rstrip().endswith("."), "the docstring opens with a sentence"
    for section in ("Cost:", "Reference:", *(["Args:"] if names else [])):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"the docstring of {of.__name__} needs {section}"
    args = text.partition("Args:")[2]
    missing = [n for n in names if not re.search(rf"^\s+(\w+, )*{n}(, \w+)*( \(.*\))?:", args, re.MULTILINE)]
    assert not missing, f"Args of {of.__name__} does not explain {missing}"
    assert ">>>" in inspect.getsource(subject.module), f"{subject.module.__name__} needs a doctested example"


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    nested = is_dataclass(value) and all(_plain(getattr(value, f.name)) for f in fields(value) if f.init)
    return nested or isinstance(value, int | float | str | bool | None)


def _is_plain_data(subject: Subject) -> bool:
    method = subject.make()
    return is_dataclass(method) and _plain(method)


def repr_gives_it_back(subject: Subject) -> None:
    """`eval(repr(method)) == method`, and the settings of a method cannot change under it."""
    method = subject.make()
    again = eval(repr(method), {**vars(subject.module)})  # noqa: S307 - a repr of our own making
    assert (type(again), again) == (type(method), method), f"{method!r} does not evaluate to itself"


def nan_settings_refused(subject: Subject) -> None:
    """A float setting of NaN is refused, when it is set or when it is used."""
    method = subject.make()
    for name in [f.name for f in fields(method) if type(getattr(method, f.name)) is float and f.init]:

        def use(name: str = name) -> None:
            subject.kind.use(replace(method, **{name: float("nan")}), _inputs(subject))

        refusal(use, f"{name}=nan")


def inputs_untouched(subject: Subject) -> None:
    """Every bit of the inputs, modes, gradients, hooks and requires_grad included, is what it was."""
    given = _inputs(subject)
    before = snapshot(given)
    with seeded(0):
        subject.kind.use(subject.make(), given)
    after = snapshot(given)
    assert not (at := difference(before, after)), f"the input changed at {at}"


def random_state_untouched(subject: Subject) -> None:
    """torch's, numpy's and Python's generators stand where they stood."""
    given, method = _inputs(subject), subject.make()
    before = random_state()
    subject.kind.use(method, given)
    assert not (at := difference(before, random_state())), f"random state moved: {at}"


def same_result_again(subject: Subject) -> None:
    """A fresh method gives the same bits, whatever the caller's random state (unless `fit` seeds it)."""
    first = _used(subject, 1, _inputs(subject))
    second = _used(subject, 1 if subject.kind.draws else 2, _inputs(subject))
    assert not (at := difference(first, second)), f"a second use differs at {at}"


def follows_dtype_and_device(subject: Subject) -> None:
    """Floating results have the dtype and device of the inputs."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for dtype in (torch.float32, torch.float64):
        for device in devices:
            given = _moved(_inputs(subject, dtype), device)
            method = subject.make()
            if isinstance(method, nn.Module):
                method = method.to(device, dtype)
            for at, value in leaves(subject.kind.use(method, given)):
                if isinstance(value, Tensor):
                    assert value.device.type == device, f"{device} inputs gave {value.device} at {at}"
                    assert not value.is_floating_point() or value.dtype == dtype, f"{dtype} gave {value.dtype} at {at}"


def _moved(given: Any, device: str) -> Any:
    if isinstance(given, nn.Module):
        return given.to(device)
    if is_dataclass(given) and not isinstance(given, type):
        return replace(given, **{f.name: _moved(getattr(given, f.name), device) for f in fields(given) if f.init})
    if isinstance(given, dict | list | tuple) and not isinstance(given, str):
        items = {k: _moved(v, device) for k, v in given.items()} if isinstance(given, dict) else None
        return items if items is not None else type(given)(_moved(v, device) for v in given)
    return each(lambda t: t.to(device), given)


def bad_input_refused(subject: Subject) -> None:
    """Bad inputs, and the calls declared as `refuses=`, raise `Refused` by the template."""
    for what, given in subject.kind.bad(subject).items():
        refusal(partial(subject.kind.use, subject.make(), given), what)
    for k, call in enumerate(subject.refuses):
        refusal(call, f"refuses[{k}]")


def nan_is_not_hidden(subject: Subject) -> None:
    """NaN in: a refusal, or NaN out; never a finite answer."""
    given = subject.kind.spoiled(subject)
    try:
        result = _used(subject, 0, given)
    except Refused:
        return
    floats = [t for _, t in leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    assert any(not bool(torch.isfinite(t).all()) for t in floats), "NaN went in and a finite answer came out"


def module_is_short(subject: Subject) -> None:
    """At most MODULE_LINES lines."""
    lines = len(inspect.getsource(subject.module).splitlines())
    assert lines <= MODULE_LINES, f"{subject.module.__name__} has {lines} lines; at most {MODULE_LINES}"


def imports_what_it_may(subject: Subject) -> None:
    """Of headstart, a method module imports core and nets only."""
    path = Path(inspect.getsourcefile(subject.module) or "")
    package = subject.module.__package__ or ""
    third_party = [] if package.split(".")[0] == "headstart" else ["testing"]
    bad = forbidden_imports(ast.parse(path.read_text(encoding="utf-8")), package, ("core", "nets", *third_party))
    assert not bad, f"a method may import headstart.core and headstart.nets only; it imports {bad}"


EVERY = (
    Check(paper_complete),
    Check(docstring_sections),
    Check(repr_gives_it_back, _is_plain_data),
    Check(nan_settings_refused, lambda s: is_dataclass(s.make())),
    Check(inputs_untouched),
    Check(random_state_untouched, lambda s: not s.kind.draws),
    Check(same_result_again),
    Check(follows_dtype_and_device, lambda s: s.kind.follows),
    Check(bad_input_refused, lambda s: bool(s.kind.bad(s) or s.refuses)),
    Check(nan_is_not_hidden, lambda s: s.kind.spoiled(s) is not None),
    Check(module_is_short),
    Check(imports_what_it_may),
)
