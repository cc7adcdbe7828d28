"""What is checked, and how checks look at it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.stream import each
from headstart.core.validate import Refused


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One method under test: how to make it, its kind, and what its author declares of it (see `contract`)."""

    make: Callable[[], Any]
    kind: Kind
    model: Callable[[], nn.Module] | None = None
    batch: Callable[[], Any] | None = None
    needs: tuple[str, ...] = ("base",)
    models: int = 3
    invariant: tuple[str, ...] = ()
    reference: Callable[[Any], float] | None = None
    streamed: Callable[[Sequence[Any]], float] | None = None
    starts_same: bool = True
    trainable: Callable[[nn.Module], int] | None = None
    optimum: Callable[[Any], Any] | None = None
    minimum: float = 0.0
    teachers: tuple[nn.Module, ...] = ()
    at_layer: Callable[[str], Any] | None = None
    results: Callable[[Any, Any], Any] | None = None
    refuses: tuple[Callable[[], Any], ...] = ()

    @property
    def of(self) -> Any:
        """Where the method is written: its class, or the function itself."""
        method = self.make()
        return method if inspect.isfunction(method) else type(method)

    @property
    def module(self) -> ModuleType:
        """The module that holds the method."""
        found = inspect.getmodule(self.of)
        assert found is not None, f"{self.of} has no module"
        return found


@dataclass(frozen=True)
class Check:
    """A function that raises AssertionError when a method is wrong, and when it is asked."""

    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool] = lambda _subject: True

    @property
    def name(self) -> str:
        """The name a known failure is declared under."""
        return self.run.__name__


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the checks of every method need to know of one kind.

    Attributes:
        name: as passed to `contract(kind=)`.
        inputs: (subject, dtype) -> valid inputs, the same each time.
        use: (method, inputs) -> result, a nest of tensors and numbers.
        bad: subject -> {what is wrong: inputs that must be refused}.
        spoiled: subject -> inputs with a NaN, or None where NaN cannot get in.
        checks: of this kind only.
        draws: whether `use` may draw from torch's generator, because `fit` seeds it.
        follows: whether the result has the dtype of the inputs.
    """

    name: str
    inputs: Callable[[Subject, torch.dtype], Any]
    use: Callable[[Any, Any], Any]
    bad: Callable[[Subject], Mapping[str, Any]]
    spoiled: Callable[[Subject], Any]
    checks: tuple[Check, ...]
    draws: bool = False
    follows: bool = True


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside mappings, sequences, dataclasses and modules, with its place."""
    if isinstance(value, nn.Module):
        yield from leaves(dict(value.state_dict()), at)
        yield f"{at}.training", [m.training for m in value.modules()]
        yield f"{at}.requires_grad", [p.requires_grad for p in value.parameters()]
        yield f"{at}.grad", [p.grad is None for p in value.parameters()]
        yield f"{at}.hooks", [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in value.modules()]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{at}[{key}]")
    elif isinstance(value, list | tuple):
        for k, item in enumerate(value):
            yield from leaves(item, f"{at}[{k}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{at}.{field.name}")
    else:
        yield at, value


def snapshot(value: Any) -> dict[str, Any]:
    """The leaves as they are now; tensors are copied."""
    return {at: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for at, leaf in leaves(value)}


def difference(before: Any, after: Any) -> str:
    """The first place where two values differ in any bit, or ''."""
    old, new = snapshot(before), snapshot(after)
    if old.keys() != new.keys():
        return f"other places: {sorted(old.keys() ^ new.keys())[:3]}"
    for at, a in old.items():
        b = new[at]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        else:
            same = a is b or bool(a == b)
        if not same:
            return at or "the value"
    return ""


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype."""
    return each(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether all numbers of two nests agree to a tolerance relative to 1 + |value|."""
    for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        x, y = (torch.as_tensor(v).detach().double() for v in (x, y))
        if x.shape != y.shape or not bool(((x - y).abs() <= tolerance * (1 + y.abs())).all()):
            return False
    return True


def refusal(call: Callable[[], Any], what: str) -> str:
    """The message of the refusal `call` must raise, written by the template "must; got X. do"."""
    try:
        call()
    except Refused as error:
        text = str(error)
        assert re.fullmatch(r".+; got .*\. .+[.?]", text, re.DOTALL), f"{what}: not the error template: {text}"
        return text
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} instead of Refused: {error}") from error
    raise AssertionError(f"{what} was accepted")
