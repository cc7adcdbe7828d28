"""Each check of scores rejects a score made wrong in that one way; a right minimal score passes all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.testing.score import SCORE
from headstart.testing.subject import Subject


def between_over_within(features: Tensor, labels: Tensor) -> float:
    """Trace of the between-class over that of the total scatter: rotation, scale and shift leave it."""
    y, c = classes_of(labels)
    means = torch.stack([features[y == k].mean(0) for k in range(c)])
    centred = features - features.mean(0)
    total = float(centred.square().sum())
    return float((means[y] - features.mean(0)).square().sum()) / total if total else 0.0


class Scatter:
    def score(self, evidence: Evidence) -> float:
        features, labels = evidence.need("features", "labels")
        return between_over_within(features.double(), labels)


def mutant(score: Callable[[Evidence], object]) -> type:
    return type("Mutant", (), {"score": lambda _self, evidence: score(evidence)})


def right(e: Evidence) -> float:
    return Scatter().score(e)


def reference(e: Evidence) -> float:
    """Example by example."""
    assert e.labels is not None
    x, y = e.features.double(), e.labels
    centre = sum(x) / len(x)
    between = sum(float((x[y == y[k]].mean(0) - centre).square().sum()) for k in range(len(x)))
    return between / sum(float((row - centre).square().sum()) for row in x)


def streamed(pieces: list[Evidence]) -> float:
    return right(
        Evidence(features=torch.cat([e.features for e in pieces]), labels=torch.cat([e.labels for e in pieces]))
    )


def dies_of_missing_labels(e: Evidence) -> float:
    return right(replace(e, labels=e.labels + 0))  # type: ignore[operator]


def nan_for_constant_features(e: Evidence) -> float:
    assert e.labels is not None
    centred = e.features - e.features.mean(0)
    return right(e) + 0 * float((centred / centred.norm()).sum())


DECLARED = {
    "invariant": ("rotation", "scale", "shift", "zero columns"), "reference": reference, "streamed": streamed,
}  # fmt: skip
MUTANTS: dict[str, list[tuple[Callable, dict]]] = {
    "returns_a_float": [
        (mutant(lambda e: torch.tensor(right(e))), {}),
        (mutant(lambda e: right(e) if e.features.dtype != torch.float16 else float("nan")), {}),
    ],
    "counts_in_double": [(mutant(lambda e: between_over_within(e.features, e.labels)), {})],
    "order_of_examples": [(mutant(lambda e: right(e) + float(e.features[0, 0])), {})],
    "names_of_classes": [(mutant(lambda e: right(e) + float(e.labels.max())), {})],
    "names_of_source_classes": [(mutant(lambda e: right(e) + float(e.logits[:, 0].mean())), {})],
    "declared_invariances": [
        (mutant(lambda e: right(e) + float(e.features[:, 0].std())), {"invariant": ("rotation",)}),
        (mutant(lambda e: right(e) + float(e.features.std())), {"invariant": ("scale",)}),
        (mutant(lambda e: right(e) + float(e.features.mean())), {"invariant": ("shift",)}),
        (mutant(lambda e: right(e) + e.features.shape[1]), {"invariant": ("zero columns",)}),
    ],
    "separated_beats_shuffled": [(mutant(lambda e: -right(e)), {}), (mutant(lambda e: 1.0), {})],
    "degenerate_evidence": [
        (mutant(nan_for_constant_features), {}),
        (mutant(lambda e: right(e) + float(torch.cov(e.features.T).logdet())), {}),
        (mutant(lambda e: right(e) + float(torch.linalg.inv(e.features.T @ e.features)[0, 0])), {}),
        (mutant(lambda e: right(e) + sum(float(e.features[e.labels == k, 0].std()) for k in e.labels.unique())), {}),
    ],
    "missing_fields": [(mutant(dies_of_missing_labels), {})],
    "equals_reference": [(mutant(lambda e: 1.001 * right(e)), {"reference": reference})],
    "streamed_equals_whole": [
        (Scatter, {"streamed": lambda pieces: sum(right(e) for e in pieces) / len(pieces)}),
    ],
}  # fmt: skip


def subject(make: Callable, options: dict) -> Subject:
    return Subject(make=make, kind=SCORE, **options)


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in SCORE.checks}


@pytest.mark.parametrize("check", SCORE.checks, ids=lambda check: check.name)
def test_the_right_method_passes(check) -> None:
    correct = subject(Scatter, DECLARED)
    assert check.applies(correct)
    check.run(correct)


@pytest.mark.parametrize(("name", "make", "options"), [(n, *m) for n, ms in MUTANTS.items() for m in ms])
@pytest.mark.filterwarnings("ignore:std")
def test_the_check_rejects_its_mutant(name: str, make: Callable, options: dict) -> None:
    (check,) = [check for check in SCORE.checks if check.name == name]
    wrong = subject(make, options)
    assert check.applies(wrong)
    with pytest.raises(AssertionError):
        check.run(wrong)
