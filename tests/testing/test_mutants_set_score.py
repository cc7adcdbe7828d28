"""Each check of set scores rejects a set score made wrong in that one way; a right minimal one passes all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headstart.core.evidence import Evidence, classes_of
from headstart.core.validate import require
from headstart.testing.every import EVERY
from headstart.testing.material import sample_set
from headstart.testing.set_score import SET_SCORE
from headstart.testing.subject import Subject

Set = Sequence[Evidence]


def between_over_within(features: Tensor, labels: Tensor) -> float:
    """Trace of the between-class over that of the total scatter: rotation, scale and shift leave it."""
    y, c = classes_of(labels)
    means = torch.stack([features[y == k].mean(0) for k in range(c)])
    total = float((features - features.mean(0)).square().sum())
    return float((means[y] - features.mean(0)).square().sum()) / total if total else 0.0


def right(models: Set) -> float:
    """The product over models of 1 + how far they separate, and of 1 + how far they did on their own data."""
    require(len(models) > 0, "A set score needs models", 0, "Pass some.")
    shared = models[0].need("labels")[0]
    product = 1.0
    for e in models:
        features, labels = e.need("features", "labels")
        require(torch.equal(labels, shared), "Models must see the same examples", "others", "Align them.")
        product *= 1 + between_over_within(features.double(), labels)
        if e.source is not None:
            product *= 1 + between_over_within(*_double(e.source))
    return product


def _double(e: Evidence) -> tuple[Tensor, Tensor]:
    features, labels = e.need("features", "labels")
    return features.double(), labels


class Product:
    def score_set(self, evidence: Set) -> float:
        return right(evidence)


def reference(models: Set) -> float:
    """Example by example."""
    product = 1.0
    for e in (part for model in models for part in (model, model.source)):
        assert e is not None
        x, y = _double(e)
        centre = sum(x) / len(x)
        between = sum(float((x[y == y[k]].mean(0) - centre).square().sum()) for k in range(len(x)))
        product *= 1 + between / sum(float((row - centre).square().sum()) for row in x)
    return product


def mutant(score: Callable[[Set], object]) -> type:
    return type("Mutant", (), {"score_set": lambda _self, models: score(models)})


def plus(term: Callable[[Evidence], float]) -> type:
    """The right score and the mean over models of one more term."""
    return mutant(lambda models: right(models) + sum(map(term, models)) / len(models))


def single(models: Set) -> float:
    """In the dtype that was given."""
    return math.prod(1 + between_over_within(*e.need("features", "labels")) for e in models)


def first_half(e: Evidence) -> float:
    return float(e.features[: len(e.features) // 2, 0].double().mean())


def moments(x: Tensor) -> float:
    """The variance as a difference of moments, which loses digits far from zero."""
    return float(x.square().mean() - x.mean().square())


def source_of(e: Evidence) -> Evidence:
    assert e.source is not None
    return e.source


def trusting(models: Set) -> float:
    """Takes the labels of the first model for those of all."""
    labels = models[0].need("labels")[0]
    return right([Evidence(features=e.features[: len(labels)], labels=labels[: len(e.features)]) for e in models])


def looks_at_lengths_only(models: Set) -> float:
    if len({len(e.features) for e in models}) > 1:
        return right(models)
    return trusting(models)


def dies_of_other_lengths(models: Set) -> float:
    """torch's own error, not a refusal."""
    stacked = torch.stack([e.need("labels")[0] for e in models])
    require(bool((stacked == stacked[0]).all()), "Models must see the same examples", "others", "Align them.")
    return right(models)


def compares_neighbours_of_the_first(models: Set) -> float:
    """The third model is not looked at."""
    right(models[:2])
    return trusting(models)


def scale_of(e: Evidence) -> float:
    return float(e.features.std())


DECLARED = {"invariant": ("rotation", "scale", "shift", "zero columns"), "reference": reference}
MUTANTS: dict[str, list[tuple[Callable, dict]]] = {
    "returns_a_float": [
        (mutant(lambda models: torch.tensor(right(models))), {}),
        (mutant(lambda models: right(models) if models[0].features.dtype != torch.float16 else float("nan")), {}),
    ],
    "counts_in_double": [
        (mutant(single), {}),
        (plus(lambda e: moments(e.logits)), {}),
        (plus(lambda e: moments(source_of(e).features)), {}),
    ],
    "order_of_examples": [(plus(first_half), {}), (plus(lambda e: first_half(source_of(e))), {})],
    "order_of_models": [
        (mutant(lambda models: right(models) + right(models[:1])), {}),
        (mutant(lambda models: right(models) + 0.1 * sum(k * right([e]) for k, e in enumerate(models))), {}),
        (mutant(lambda models: right(models + models) if isinstance(models, list) else right(models)), {}),
    ],
    "names_of_classes": [(plus(lambda e: float(e.labels.max())), {}), (plus(lambda e: float(e.labels[1] > 1)), {})],
    "names_of_source_classes": [
        (plus(lambda e: float(e.logits[:, 0].mean())), {}),
        (plus(lambda e: float((e.source.logits.argmax(1) * e.source.labels).double().mean())), {}),
        (plus(lambda e: float((e.logits.argmax(1) * e.labels).double().mean())), {}),
    ],
    "declared_invariances": [
        (plus(lambda e: float(e.features[:, 0].std())), {"invariant": ("rotation",)}),
        (plus(scale_of), {"invariant": ("scale",)}),
        (plus(lambda e: scale_of(source_of(e))), {"invariant": ("scale",)}),
        (plus(lambda e: float(e.features.mean())), {"invariant": ("shift",)}),
        (plus(lambda e: e.features.shape[1]), {"invariant": ("zero columns",)}),
    ],
    "separated_beats_shuffled": [(mutant(lambda models: -right(models)), {}), (mutant(lambda models: 1.0), {})],
    "degenerate_evidence": [
        (plus(lambda e: float(((e.features - e.features.mean(0)) / e.features.std(0)).sum())), {}),
        (plus(lambda e: float(torch.cov(e.features.T).logdet())), {}),
        (plus(lambda e: sum(float(e.features[e.labels == k, 0].std()) for k in e.labels.unique())), {}),
        (plus(lambda e: float((e.logits / e.logits.std()).mean())), {}),
        (plus(lambda e: float(e.logits.softmax(1).sum(0).log().sum())), {}),
        (mutant(lambda models: right(models) + float(torch.tensor([right([e]) for e in models]).std())), {}),
        (mutant(lambda models: right(models) / (right(models[:1]) - right(models[1:2] or models[2:]))), {}),
        (mutant(lambda models: right(models) / len({float(e.features.sum()) for e in models[1:]})), {}),
    ],
    "missing_fields": [
        (mutant(lambda models: right([replace(e, labels=e.labels + 0) for e in models])), {}),
        (plus(lambda e: float(e.logits.mean())), {}),
        (plus(lambda e: len(e.source.features)), {}),
        (mutant(lambda models: right(models) + (0 if models[0].source is None else len(models[-1].source.features))), {}),
    ],
    "misaligned_models_refused": [
        (mutant(trusting), {}), (mutant(looks_at_lengths_only), {}), (mutant(dies_of_other_lengths), {}),
        (mutant(compares_neighbours_of_the_first), {}),
    ],
    "empty_set_refused": [
        (mutant(lambda models: right(models) if models else 0.0), {}),
        (mutant(lambda models: right(models[:1]) and right(models) if models[0] else 0.0), {}),
    ],
    "equals_reference": [
        (mutant(lambda models: 1.001 * right(models)), {"reference": reference}),
        (mutant(lambda models: right(models) if len(models) == 3 else 1.001 * right(models)), {"reference": reference}),
    ],
}  # fmt: skip


def subject(make: Callable, options: dict) -> Subject:
    return Subject(make=make, kind=SET_SCORE, **options)


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in SET_SCORE.checks}


@pytest.mark.parametrize("check", SET_SCORE.checks, ids=lambda check: check.name)
def test_the_right_method_passes(check) -> None:
    correct = subject(Product, DECLARED)
    assert check.applies(correct)
    check.run(correct)


@pytest.mark.parametrize(("name", "make", "options"), [(n, *m) for n, ms in MUTANTS.items() for m in ms])
@pytest.mark.filterwarnings("ignore:std", "ignore:cov")
def test_the_check_rejects_its_mutant(name: str, make: Callable, options: dict) -> None:
    (check,) = [check for check in SET_SCORE.checks if check.name == name]
    wrong = subject(make, options)
    assert check.applies(wrong)
    with pytest.raises(AssertionError):
        check.run(wrong)


def never_refuses(models: Set) -> float:
    return float(models[0].features.mean())


def writes(models: Set) -> float:
    models[0].source.features.mul_(2)  # type: ignore[union-attr]
    return right(models)


def drops_the_last(models: list[Evidence]) -> float:
    models.pop()
    return right(models)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("bad_input_refused", mutant(never_refuses)),
        ("inputs_untouched", mutant(writes)),
        ("inputs_untouched", mutant(drops_the_last)),
        ("same_result_again", plus(lambda e: float(torch.rand(())))),
        ("random_state_untouched", plus(lambda e: 0 * float(torch.rand(())))),
    ],
)
def test_the_checks_of_every_method_see_set_scores(name: str, make: type) -> None:
    (check,) = [check for check in EVERY if check.name == name]
    check.run(subject(Product, {}))
    with pytest.raises(AssertionError):
        check.run(subject(make, {}))


def test_the_sample_is_several_unlike_models_on_the_same_examples() -> None:
    models, again = sample_set(), sample_set()
    assert len({e.features.shape[1] for e in models}) == len({e.need("logits")[0].shape[1] for e in models}) == 3
    for e, other in zip(models, again, strict=True):
        assert torch.equal(e.need("labels")[0], models[0].need("labels")[0])
        assert torch.equal(e.features, other.features)
        features, labels, logits = source_of(e).need("features", "labels", "logits")
        assert features.shape[1] == e.features.shape[1]
        assert int(labels.max()) + 1 == logits.shape[1] == e.need("logits")[0].shape[1]
