"""Each check of merge rules rejects a rule made wrong in that one way; a right minimal rule passes all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from headstart.core.weights import Weights, aligned, by_tensor
from headstart.testing.merge_rule import MERGE_RULE
from headstart.testing.subject import Subject

Combine = Callable[[str, Tensor, Tensor | None], Tensor]


class Mean:
    scope, symmetric = "tensor", True

    def combine(self, name: str, stacked: Tensor, base: Tensor | None) -> Tensor:
        return stacked.mean(0)

    def merge(self, models: Sequence[Weights], *, base: Weights | None = None,
              importance: Sequence[Weights] | None = None) -> dict[str, Tensor]:  # fmt: skip
        return by_tensor(lambda name, stacked, origin, _i: self.combine(name, stacked, origin), models, base)


class WeightedMean(Mean):
    """Uses importance; right too."""

    def merge(self, models: Sequence[Weights], *, base: Weights | None = None,
              importance: Sequence[Weights] | None = None) -> dict[str, Tensor]:  # fmt: skip
        return by_tensor(lambda _n, s, _b, w: (s * w).sum(0) / w.sum(0), models, base, importance)


def combining(combine: Combine, **attributes: object) -> type:
    return type("Mutant", (Mean,), {"combine": lambda _self, *given: combine(*given), **attributes})


def merging(merge: Callable[..., dict[str, Tensor]], **attributes: object) -> type:
    return type("Mutant", (Mean,), {"merge": lambda _self, models, **given: merge(models, **given), **attributes})


def counted(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict[str, Tensor]:
    names = aligned(models, base)
    return {n: torch.stack([m[n].float() for m in models]).mean(0).to(models[0][n].dtype) for n in names}


def float_counters(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict:
    return {n: t if t.is_floating_point() else t.float() for n, t in Mean().merge(models, base=base).items()}


def untied(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict[str, Tensor]:
    merged = Mean().merge(models, base=base)
    return {n: t + 0.01 * k if t.is_floating_point() else t for k, (n, t) in enumerate(merged.items())}


def narrow(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict[str, Tensor]:
    aligned(models, base)
    total = {n: t.clone() for n, t in models[0].items()}
    for model in models[1:]:
        total = {n: t + model[n] if t.is_floating_point() else t for n, t in total.items()}
    return {n: t / len(models) if t.is_floating_point() else t for n, t in total.items()}


def nameless(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict[str, Tensor]:
    from headstart.core.validate import require

    alike = all(m.keys() == models[0].keys() and all(m[n].shape == models[0][n].shape for n in m) for m in models)
    require(alike, "Models must be alike", "others", "Pass others.")
    return Mean().merge(models, base=base)


def shared_norm(models: Sequence[Weights], base: Weights | None = None, importance: object = None) -> dict[str, Tensor]:
    merged = Mean().merge(models, base=base)
    whole = sum(float(t.norm()) for t in merged.values() if t.is_floating_point())
    return {n: t / whole if t.is_floating_point() else t for n, t in merged.items()}


MUTANTS: dict[str, list[type]] = {
    "copies_give_it_back": [combining(lambda _n, s, _b: s.sum(0)), combining(lambda _n, s, _b: s.mean(0) * 1.001)],
    "all_equal_to_base": [combining(lambda _n, s, b: s.mean(0) + 0.1), combining(lambda _n, s, b: s.mean(0) - b)],
    "order_as_declared": [combining(lambda _n, s, _b: s[0]), combining(lambda _n, s, _b: s.mean(0), symmetric=False)],
    "counters_survive": [merging(counted), merging(float_counters)],
    "tied_weights_survive": [merging(untied)],
    "half_precision": [
        merging(narrow), merging(lambda m, **k: {n: t.float() for n, t in Mean().merge(m, **k).items()}),
    ],
    "mismatch_names_the_tensor": [merging(nameless), merging(lambda m, **k: dict(m[0]))],
    "small_tensors": [
        combining(lambda _n, s, _b: s.mean(0) + 0 * s.std(0)),
        combining(lambda _n, s, _b: (s - s.mean()) / s.std()),
    ],
    "streamed_equals_whole": [merging(shared_norm), merging(Mean().merge, scope="model")],
}  # fmt: skip


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in MERGE_RULE.checks}


@pytest.mark.parametrize("check", MERGE_RULE.checks, ids=lambda check: check.name)
@pytest.mark.parametrize(("make", "needs"), [(Mean, ()), (Mean, ("base",)), (WeightedMean, ("base", "importance"))])
def test_right_methods_pass(check, make: type, needs: tuple[str, ...]) -> None:
    check.run(Subject(make=make, kind=MERGE_RULE, needs=needs))


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("name", "make"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, make: type) -> None:
    (check,) = [check for check in MERGE_RULE.checks if check.name == name]
    with pytest.raises(AssertionError):
        check.run(Subject(make=make, kind=MERGE_RULE))
