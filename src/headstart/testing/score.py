"""Checks of every `Score`: evidence -> a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headstart.core.evidence import Evidence

from .material import sample_evidence
from .subject import Check, Kind, Subject, close, refusal


def _score(subject: Subject, evidence: Evidence) -> float:
    value = subject.make().score(evidence)
    assert math.isfinite(value), f"the score of valid evidence is {value}"
    return float(value)


def _equal(subject: Subject, first: Evidence, second: Evidence, why: str, tolerance: float = 1e-7) -> None:
    a, b = _score(subject, first), _score(subject, second)
    assert close(a, b, tolerance), f"{why}: {a} became {b}"


def returns_a_float(subject: Subject) -> None:
    """A Python float, whatever the dtype of the features."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        value = subject.make().score(sample_evidence(dtype=dtype))
        assert type(value) is float, f"{dtype} features gave a {type(value).__name__}"
        assert math.isfinite(value), f"{dtype} features gave {value}"


def counts_in_double(subject: Subject) -> None:
    """Features far from zero lose nothing: float32 features score as the same features in float64."""
    e = sample_evidence()
    single = replace(e, features=e.features + 100)
    _equal(subject, single, replace(single, features=single.features.double(), logits=_double(e.logits)), "in float64")


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def order_of_examples(subject: Subject) -> None:
    """Shuffled rows score the same."""
    e = sample_evidence(dtype=torch.float64)
    _equal(subject, e, e.take(torch.randperm(60, generator=torch.Generator().manual_seed(1))), "rows shuffled")


def names_of_classes(subject: Subject) -> None:
    """Renamed classes, with gaps, score the same."""
    e = sample_evidence(dtype=torch.float64)
    assert e.labels is not None
    _equal(subject, e, replace(e, labels=torch.tensor([7, 2, 90])[e.labels]), "classes renamed")


def names_of_source_classes(subject: Subject) -> None:
    """Permuted columns of the logits score the same."""
    e = sample_evidence(dtype=torch.float64)
    assert e.logits is not None
    _equal(subject, e, replace(e, logits=e.logits[:, [2, 0, 3, 1]]), "source classes renamed")


def _rotated(features: Tensor) -> Tensor:
    turn, _ = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], dtype=torch.float64,
                                          generator=torch.Generator().manual_seed(5)))  # fmt: skip
    rotated: Tensor = features @ turn
    return rotated


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "rotation": _rotated,
    "scale": lambda f: 3 * f,
    "shift": lambda f: f + torch.arange(f.shape[1]),
    "zero columns": lambda f: torch.cat([f, torch.zeros(len(f), 2, dtype=f.dtype)], 1),
}


def declared_invariances(subject: Subject) -> None:
    """Each declared change of the features leaves the score; declared are names of `CHANGES`."""
    e = sample_evidence(dtype=torch.float64)
    for name in subject.invariant:
        _equal(subject, e, replace(e, features=CHANGES[name](e.features)), name, 1e-5)


def separated_beats_shuffled(subject: Subject) -> None:
    """Classes far apart score above the same evidence with shuffled labels."""
    e = sample_evidence(dtype=torch.float64)
    assert e.labels is not None
    assert e.logits is not None
    eye = torch.eye(5, dtype=torch.float64)
    far = replace(e, features=e.features + 6 * eye[e.labels], logits=e.logits + 6 * eye[e.labels][:, :4])
    mixed = replace(far, labels=e.labels[torch.randperm(60, generator=torch.Generator().manual_seed(2))])
    good, bad = _score(subject, far), _score(subject, mixed)
    assert good > bad, f"separated classes score {good}, shuffled labels {bad}"


def _degenerate() -> dict[str, Evidence]:
    e = sample_evidence(dtype=torch.float64)
    assert e.labels is not None
    flat = torch.cat([e.features[:, :-1], torch.ones(60, 1, dtype=torch.float64)], 1)
    lonely = e.labels.clone()
    lonely[0] = 9
    return {
        "a constant feature": replace(e, features=flat),
        "constant features": replace(e, features=torch.ones_like(e.features)),
        "fewer examples than features": sample_evidence(n=6, d=20, dtype=torch.float64),
        "duplicated examples": e.take(torch.arange(60) // 2 * 2),
        "identical columns": replace(e, features=e.features[:, :1].repeat(1, 4)),
        "a class of one example": replace(e, labels=lonely),
    }


def degenerate_evidence(subject: Subject) -> None:
    """Constant features, n < d, duplicates, one-example classes: a finite number or a refusal by the template."""
    for what, evidence in _degenerate().items():
        try:
            value = subject.make().score(evidence)
        except Exception:
            refusal(partial(subject.make().score, evidence), what)
        else:
            assert math.isfinite(value), f"{what} scored {value}"


def missing_fields(subject: Subject) -> None:
    """Evidence without labels or logits is scored, or refused by the template."""
    e = sample_evidence()
    for evidence in (Evidence(features=e.features), replace(e, labels=None), replace(e, logits=None)):
        try:
            subject.make().score(evidence)
        except Exception:
            refusal(partial(subject.make().score, evidence), "evidence with missing fields")


def equals_reference(subject: Subject) -> None:
    """The number of a slow float64 reference, to 1e-7."""
    assert subject.reference is not None
    for e in (sample_evidence(dtype=torch.float64), sample_evidence(n=90, d=9, classes=4, dtype=torch.float64)):
        value, expected = _score(subject, e), float(subject.reference(e))
        assert close(value, expected, 1e-7), f"{value}, the reference says {expected}"


def streamed_equals_whole(subject: Subject) -> None:
    """Evidence in pieces scores as the whole."""
    assert subject.streamed is not None
    e = sample_evidence(dtype=torch.float64)
    pieces = [e.take(rows) for rows in torch.split(torch.arange(60), 7)]
    a, b = subject.streamed(pieces), _score(subject, e)
    assert close(a, b, 1e-8), f"streamed {a}, whole {b}"


def _bad(_subject: Subject) -> dict[str, Any]:
    e = sample_evidence()
    assert e.labels is not None
    return {"one class": replace(e, labels=torch.zeros_like(e.labels))}


SCORE = Kind(
    name="score",
    inputs=lambda _subject, dtype: sample_evidence(dtype=dtype),
    use=lambda method, evidence: method.score(evidence),
    bad=_bad,
    spoiled=lambda _subject: None,  # Evidence itself refuses NaN
    follows=False,  # a Python float
    checks=(
        Check(returns_a_float), Check(counts_in_double), Check(order_of_examples), Check(names_of_classes),
        Check(names_of_source_classes), Check(declared_invariances, lambda s: bool(s.invariant)),
        Check(separated_beats_shuffled), Check(degenerate_evidence), Check(missing_fields),
        Check(equals_reference, lambda s: s.reference is not None),
        Check(streamed_equals_whole, lambda s: s.streamed is not None),
    ),
)  # fmt: skip
