"""Checks of every `SetScore`: evidence of several models on the same examples -> a number for the set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from headstart.core.evidence import Evidence
from headstart.core.validate import Refused

from .material import sample_set
from .score import CHANGES
from .subject import Check, Kind, Subject, cast, close, refusal

Set: TypeAlias = Sequence[Evidence]
"""What a set score is given."""


def _each(change: Callable[[Evidence], Evidence], models: Set) -> list[Evidence]:
    """Every model's evidence changed, what it says of its source likewise."""
    return [change(replace(e, source=e.source and change(e.source))) for e in models]


def _target(change: Callable[[Evidence], Evidence], models: Set) -> list[Evidence]:
    """Every model's evidence on the target changed, its source as it is."""
    return [change(e) for e in models]


def _labels(evidence: Evidence) -> Tensor:
    (labels,) = evidence.need("labels")
    return labels


def _logits(evidence: Evidence) -> Tensor:
    (logits,) = evidence.need("logits")
    return logits


def _score(subject: Subject, models: Set) -> float:
    value = subject.make().score_set(models)
    assert math.isfinite(value), f"the score of valid evidence is {value}"
    return float(value)


def _equal(subject: Subject, first: Set, second: Set, why: str, tolerance: float = 1e-7) -> None:
    a, b = _score(subject, first), _score(subject, second)
    assert close(a, b, tolerance), f"{why}: {a} became {b}"


def returns_a_float(subject: Subject) -> None:
    """A Python float, whatever the dtype of the features."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        value = subject.make().score_set(sample_set(dtype=dtype))
        assert type(value) is float, f"{dtype} features gave a {type(value).__name__}"
        assert math.isfinite(value), f"{dtype} features gave {value}"


def counts_in_double(subject: Subject) -> None:
    """Features and logits far from zero lose nothing: in float32 they score as the same numbers in float64."""
    single = _each(lambda e: replace(e, features=e.features + 100, logits=_logits(e) + 100), sample_set())

    def double(e: Evidence) -> Evidence:
        return replace(e, features=cast(e.features, torch.float64), logits=cast(e.logits, torch.float64))

    _equal(subject, single, _each(double, single), "in float64")


def order_of_examples(subject: Subject) -> None:
    """Rows shuffled alike for all models score the same; so do each source's own rows, shuffled."""
    models = sample_set(dtype=torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    _equal(subject, models, _target(lambda e: e.take(order), models), "rows shuffled")
    own = [replace(e, source=e.source and e.source.take(order[order < 40])) for e in models]
    _equal(subject, models, own, "rows of the sources shuffled")


def order_of_models(subject: Subject) -> None:
    """The same models in any order, in a list or a tuple, score the same."""
    models = sample_set(dtype=torch.float64)
    for order in ((1, 0, 2), (2, 1, 0), (1, 2, 0)):
        _equal(subject, models, tuple(models[k] for k in order), f"models in the order {order}")


def names_of_classes(subject: Subject) -> None:
    """The target's classes renamed, with gaps, score the same."""
    models = sample_set(dtype=torch.float64)
    renamed = _target(lambda e: replace(e, labels=torch.tensor([7, 2, 90])[_labels(e)]), models)
    _equal(subject, models, renamed, "classes renamed")


def names_of_source_classes(subject: Subject) -> None:
    """Each model's source classes in another order, in its logits and its source's labels, score the same."""
    models = sample_set(dtype=torch.float64)

    def renamed(e: Evidence) -> Evidence:
        assert e.source is not None
        order = torch.arange(_logits(e).shape[1]).roll(1)
        own = replace(e.source, logits=_logits(e.source)[:, order], labels=order.argsort()[_labels(e.source)])
        return replace(e, logits=_logits(e)[:, order], source=own)

    _equal(subject, models, _target(renamed, models), "source classes renamed")


def declared_invariances(subject: Subject) -> None:
    """Each declared change of all features, the sources' too, leaves the score; declared are names of `CHANGES`."""
    models = sample_set(dtype=torch.float64)
    for name in subject.invariant:
        changed = [
            replace(e, features=CHANGES[name](e.features),
                    source=e.source and replace(e.source, features=CHANGES[name](e.source.features)))
            for e in models
        ]  # fmt: skip
        _equal(subject, models, changed, name, 1e-5)


def separated_beats_shuffled(subject: Subject) -> None:
    """Models that tell the classes far apart score above the same models with shuffled labels."""
    models = sample_set(dtype=torch.float64)

    def apart(e: Evidence) -> Evidence:
        shift = 6 * torch.eye(10, dtype=torch.float64)[_labels(e)]
        logits = _logits(e) + shift[:, : _logits(e).shape[1]]
        return replace(e, features=e.features + shift[:, : e.features.shape[1]], logits=logits)

    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    far = _target(apart, models)
    good, bad = _score(subject, far), _score(subject, _target(lambda e: replace(e, labels=_labels(e)[order]), far))
    assert good > bad, f"separated classes score {good}, shuffled labels {bad}"


def _degenerate() -> Iterator[tuple[str, Set]]:
    models = sample_set(dtype=torch.float64)
    lonely = _labels(models[0]).clone()
    lonely[0] = 9
    yield "one model", models[:1]
    yield "the same model twice", [models[0], models[0]]
    yield "constant features", _each(lambda e: replace(e, features=torch.ones_like(e.features)), models)
    yield "constant logits", _each(lambda e: replace(e, logits=torch.ones_like(_logits(e))), models)
    yield "fewer examples than features", _target(lambda e: e.take(torch.arange(4)), models)
    yield "duplicated examples", _target(lambda e: e.take(torch.arange(60) // 2 * 2), models)
    yield "a class of one example", _target(lambda e: replace(e, labels=lonely), models)
    never = torch.tensor([-1e4, 0.0, 0.0], dtype=torch.float64)
    yield "a source class that is never seen", [*models[:1], replace(models[1], logits=_logits(models[1]) + never)]


def degenerate_evidence(subject: Subject) -> None:
    """One model, equal models, constants, n < d, one-example classes: a finite number or a refusal by the template."""
    for what, models in _degenerate():
        _finite_or_refused(subject, models, what)


def missing_fields(subject: Subject) -> None:
    """Where one or all models lack labels, logits or a source: a finite number or a refusal by the template."""
    models = sample_set()
    for missing in ("labels", "logits", "source"):
        without = [replace(e, **dict[str, Any]({missing: None})) for e in models]
        _finite_or_refused(subject, without, f"no {missing}")
        _finite_or_refused(subject, [*models[:2], without[2]], f"no {missing} in one model")


def _finite_or_refused(subject: Subject, models: Set, what: str) -> None:
    use = partial(subject.make().score_set, models)
    try:
        value = use()
    except Refused:
        refusal(use, what)
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} instead of Refused: {error}") from error
    else:
        assert math.isfinite(value), f"{what} scored {value}"


def misaligned_models_refused(subject: Subject) -> None:
    """Models whose labels differ, in order or in number, saw other examples: refused by the template."""
    first, *others = sample_set()
    order = torch.arange(60).roll(1)
    for what, other in (("other labels", others[0].take(order)), ("fewer examples", others[0].take(order[:50]))):
        for models in ([first, other, others[1]], [first, others[1], other], [other, first]):
            refusal(partial(subject.make().score_set, models), what)


def empty_set_refused(subject: Subject) -> None:
    """No models at all are refused by the template."""
    refusal(partial(subject.make().score_set, []), "no models")


def equals_reference(subject: Subject) -> None:
    """The number of a slow float64 reference, to 1e-7."""
    assert subject.reference is not None
    for models in (sample_set(dtype=torch.float64), sample_set(n=90, classes=5, dtype=torch.float64)[:2]):
        value, expected = _score(subject, models), float(subject.reference(models))
        assert close(value, expected, 1e-7), f"{value}, the reference says {expected}"


def _bad(_subject: Subject) -> dict[str, Any]:
    return {"one class": _target(lambda e: replace(e, labels=torch.zeros_like(_labels(e))), sample_set())}


SET_SCORE = Kind(
    name="set score",
    inputs=lambda _subject, dtype: sample_set(dtype=dtype),
    use=lambda method, models: method.score_set(models),
    bad=_bad,
    spoiled=lambda _subject: None,  # Evidence itself refuses NaN
    follows=False,  # a Python float
    checks=(
        Check(returns_a_float), Check(counts_in_double), Check(order_of_examples), Check(order_of_models),
        Check(names_of_classes), Check(names_of_source_classes),
        Check(declared_invariances, lambda s: bool(s.invariant)), Check(separated_beats_shuffled),
        Check(degenerate_evidence), Check(missing_fields), Check(misaligned_models_refused), Check(empty_set_refused),
        Check(equals_reference, lambda s: s.reference is not None),
    ),
)  # fmt: skip
