"""Each check of terms rejects a term made wrong in that one way; right minimal terms pass all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.plan import CrossEntropy, Step, Teacher, Term
from headstart.core.stream import Batch
from headstart.core.taps import layer_of
from headstart.testing.every import EVERY
from headstart.testing.material import digits, small_model, trained
from headstart.testing.subject import Subject
from headstart.testing.term import TERM

TEACHER = trained()


def same_logits() -> nn.Module:
    """A second copy, so that a mutant that trains its teacher does not spoil the others."""
    model = small_model()
    model.load_state_dict(TEACHER.state_dict())
    return model.eval()


class Mimic(Term):
    """Mean squared distance to a teacher's logits."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)

    def forward(self, step: Step) -> Tensor:
        return F.mse_loss(step.run(step.batch.x).output, self.teacher(step.batch.x))


class Small(Term):
    """Keeps the values of a layer small."""

    def __init__(self, layer: str = "middle") -> None:
        super().__init__()
        self.taps = (layer,)

    def forward(self, step: Step) -> Tensor:
        return step.run(step.batch.x).taps[self.taps[0]].square().mean()


def term(forward: Callable[[Step], Tensor]) -> Callable[[], Term]:
    return type("Mutant", (Term,), {"forward": lambda _self, step: forward(step)})


def logits(step: Step) -> Tensor:
    output: Tensor = step.run(step.batch.x).output
    return output


class TrainsItsTeacher(Mimic):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.teacher = teacher  # type: ignore[assignment]


class TrainsACopy(Mimic):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.teacher = Teacher(teacher).requires_grad_(True)


class TeacherInTraining(Mimic):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.teacher = Teacher(teacher).model  # type: ignore[assignment]


class TouchesTheTeacher(Mimic):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.outside = lambda: teacher

    def forward(self, step: Step) -> Tensor:
        with torch.no_grad():
            next(self.outside().parameters()).mul_(0.999)
        return super().forward(step)


class SilentLayer(Small):
    """Does something else where the layer does not exist."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer, self.taps = layer, ()

    def forward(self, step: Step) -> Tensor:
        known = self.layer in dict(step.model.named_modules())
        return logits(step).square().mean() * (2 if known else 1)


def rises(x: Tensor) -> Tensor:
    """The identity with the gradient's sign turned."""

    class Turn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return -gradient

    return Turn.apply(x)  # type: ignore[no-any-return]


def teaching(kind: type) -> Callable[[], Subject]:
    def make() -> Subject:
        teacher = same_logits()
        return Subject(make=lambda: kind(teacher), kind=TERM, teachers=(teacher,),
                       optimum=lambda _term: Step(same_logits(), Batch(digits()[0][:8])))  # fmt: skip

    return make


def plain(make: Callable[[], Term]) -> Callable[[], Subject]:
    return lambda: Subject(make=make, kind=TERM)


def at_layer(kind: type) -> Callable[[], Subject]:
    return lambda: Subject(make=lambda: kind("middle"), kind=TERM, at_layer=kind)


class Ignorant(Small):
    """Looks the layer up by itself, so that an unknown name dies of a KeyError."""

    taps = ()

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer, self.taps = layer, ()

    def forward(self, step: Step) -> Tensor:
        weight: Tensor = dict(step.model.named_modules())[self.layer].weight  # type: ignore[assignment]
        return weight.square().mean()


class Worldless(Small):
    """An unknown layer is refused, but the message helps nobody."""

    def __init__(self, layer: str) -> None:
        from headstart.core.validate import require

        super().__init__(layer)
        self.taps, self.layer, self.require = (), layer, require

    def forward(self, step: Step) -> Tensor:
        known = self.layer in dict(step.model.named_modules())
        self.require(known, "The layer must exist", "another", "Pass another name.")
        return layer_of(step.model, self.layer).weight.square().mean()  # type: ignore[union-attr,operator]


def shifted(minimum: float) -> Callable[[], Subject]:
    def make() -> Subject:
        best = lambda _term: Step(same_logits(), Batch(digits()[0][:8]))  # noqa: E731
        return Subject(make=lambda: Mimic(same_logits()), kind=TERM, optimum=best, minimum=minimum)

    return make


MUTANTS: dict[str, list[Callable[[], Subject]]] = {
    "finite_scalar": [
        plain(term(lambda s: logits(s).square().mean(1))), plain(term(lambda s: logits(s).mean() / 0)),
        plain(term(lambda s: logits(s).mean().detach())), plain(term(lambda s: 0 * logits(s).mean())),
    ],
    "mean_over_the_batch": [plain(term(lambda s: F.cross_entropy(logits(s), s.batch.y, reduction="sum")))],
    "forwards_once": [plain(term(lambda s: F.cross_entropy(s.model(s.batch.x), s.batch.y)))],
    "gradient_matches_differences": [
        plain(term(lambda s: F.cross_entropy(rises(logits(s)), s.batch.y))),
        plain(term(lambda s: (logits(s) * logits(s).detach()).mean())),
    ],
    "no_gradient_reaches_a_teacher": [
        teaching(TrainsItsTeacher), teaching(TrainsACopy), teaching(TeacherInTraining), teaching(TouchesTheTeacher),
    ],
    "least_at_its_optimum": [
        shifted(0.5),
        lambda: Subject(make=term(lambda s: -logits(s).square().mean()), kind=TERM, minimum=0.0,
                        optimum=lambda _t: Step(nn.Flatten(), Batch(torch.zeros(2, 4)))),
    ],
    "unknown_layer_lists_names": [at_layer(SilentLayer), at_layer(Ignorant), at_layer(Worldless)],
}  # fmt: skip


def check_of(name: str):
    (check,) = [check for check in (*TERM.checks, *EVERY) if check.name == name]
    return check


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in TERM.checks}


@pytest.mark.parametrize(
    "make", [teaching(Mimic), at_layer(Small), plain(CrossEntropy)], ids=["teacher", "tap", "plain"]
)
def test_right_methods_pass(make: Callable[[], Subject]) -> None:
    asked = [check for check in TERM.checks if check.applies(make())]
    assert len(asked) >= 4
    for check in asked:
        check.run(make())


@pytest.mark.parametrize(("name", "make"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, make: Callable[[], Subject]) -> None:
    wrong = make()
    assert check_of(name).applies(wrong)
    with pytest.raises(AssertionError):
        check_of(name).run(wrong)


def test_the_checks_of_every_method_see_terms() -> None:
    hidden = term(lambda s: torch.nan_to_num(logits(s)).square().mean())
    with pytest.raises(AssertionError, match="NaN went in"):
        check_of("nan_is_not_hidden").run(plain(hidden)())
    check_of("nan_is_not_hidden").run(plain(CrossEntropy)())
    moving = term(lambda s: F.cross_entropy(s.model.requires_grad_(False)(s.batch.x.mul_(2)), s.batch.y))
    with pytest.raises(AssertionError, match="the input changed"):
        check_of("inputs_untouched").run(plain(moving)())
    single = term(lambda s: logits(s).float().square().mean())
    with pytest.raises(AssertionError, match=r"gave torch\.float32"):
        check_of("follows_dtype_and_device").run(plain(single)())
