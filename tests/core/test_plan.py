"""Plans are data; a step forwards a batch once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.core.plan import (
    Batch,
    CrossEntropy,
    On,
    Plan,
    Step,
    Teacher,
    Term,
    Weighted,
    adamw,
    constant,
    cosine,
    sgd,
)  # fmt: skip
from headstart.core.surgery import freeze
from headstart.core.taps import tapped
from headstart.core.validate import Refused


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def batch(n: int = 6, width: int = 4) -> Batch:
    return Batch(torch.randn(n, width), torch.arange(n) % 3)


def plan(**changes: object) -> Plan:
    return Plan(**{"model": nn.Linear(4, 3), "stream": [batch()], "steps": 1, **changes})  # type: ignore[arg-type]


def test_two_terms_on_one_batch_forward_it_once() -> None:
    model, b = Counting(), batch()
    step = Step(model, b)
    CrossEntropy()(step), CrossEntropy(0.1)(step)
    assert model.calls == 1


def test_parts_are_forwarded_jointly_once_and_each_gets_its_rows() -> None:
    model, parts = Counting(), {"source": batch(6), "target": Batch(torch.randn(2, 4))}
    with tapped(model, ["inner:input"]) as recorded:
        step = Step(model, parts, recorded=recorded)
        runs = {part: step.on(part).run(parts[part].x) for part in parts}
    assert model.calls == 1
    for part, run in runs.items():
        assert torch.equal(run.taps["inner:input"], parts[part].x)
        assert torch.allclose(run.output, model.inner(parts[part].x))


def test_joint_batch_statistics_are_those_of_both_parts() -> None:
    norm = nn.BatchNorm1d(4)
    parts = {"a": Batch(torch.zeros(3, 4)), "b": Batch(torch.ones(3, 4))}
    Step(norm, parts).on("a").run(parts["a"].x)
    assert torch.allclose(norm.running_mean, torch.full((4,), 0.05))  # momentum 0.1 times the joint mean 0.5


def test_parts_of_other_shapes_and_foreign_inputs_are_forwarded_alone() -> None:
    model = Counting()
    parts = {"a": batch(2), "b": Batch({"x": torch.ones(2, 4)})}
    step = Step(model, parts)
    step.on("a").run(parts["a"].x)
    assert model.calls == 1
    step.run(torch.randn(2, 4))
    assert model.calls == 2


def test_on_looks_at_one_part() -> None:
    model, parts = Counting(), {"source": batch(4), "target": Batch(torch.randn(4, 4))}
    loss = On("source", CrossEntropy())(Step(model, parts))
    expected = F.cross_entropy(model.inner(parts["source"].x), parts["source"].y)
    assert torch.allclose(loss, expected)
    with pytest.raises(Refused, match="Did you mean 'source'"):
        On("sorce", CrossEntropy())(Step(model, parts))


def test_weighted_scales_and_hands_taps_on() -> None:
    class Tapping(CrossEntropy):
        taps = ("inner",)

    model, b = Counting(), batch()
    once, thrice = (term(Step(model, b)) for term in (CrossEntropy(), Weighted(3.0, CrossEntropy())))
    assert torch.allclose(3 * once, thrice)
    assert Weighted(1.0, Tapping()).taps == On("a", Tapping()).taps == ("inner",)


def test_cross_entropy_is_torchs_and_refuses_missing_labels() -> None:
    model, b = nn.Linear(4, 3), batch()
    assert b.y is not None
    expected = F.cross_entropy(model(b.x), b.y, label_smoothing=0.2)
    assert torch.equal(CrossEntropy(0.2)(Step(model, b)), expected)
    with pytest.raises(Refused, match="labels in every batch"):
        CrossEntropy()(Step(model, Batch(b.x)))
    with pytest.raises(Refused, match="smoothing < 1"):
        CrossEntropy(1.0)


def test_plus_adds_a_summand_and_refuses_taken_names() -> None:
    p = plan()
    more = p.plus(other=CrossEntropy())
    assert list(more.terms) == ["task", "other"]
    assert list(p.terms) == ["task"]
    with pytest.raises(Refused, match=r"free name; got \['task'\]"):
        p.plus(task=CrossEntropy())


def test_under_operates_and_folds_last_in_first_out() -> None:
    class Named:
        def __init__(self, name: str, log: list[str]) -> None:
            self.name, self.log = name, log

        def apply(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model)

        def fold(self, model: nn.Module) -> nn.Module:
            self.log.append(self.name)
            return model[0]  # type: ignore[index]

    log: list[str] = []
    p = plan()
    nested = p.under(Named("inner", log)).under(Named("outer", log))
    model = nested.model
    for change in nested.finish:
        model = change(model)
    assert log == ["outer", "inner"]
    assert model is p.model


def test_trainable_lists_each_parameter_once_models_first() -> None:
    class Tied(Term):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.shared, self.own = model, nn.Linear(1, 1)

        def forward(self, step: Step) -> Tensor:
            return torch.zeros(())

    model = nn.Linear(4, 3)
    model.bias.requires_grad = False
    p = plan(model=model, terms={"t": Tied(model)})
    assert [tuple(v.shape) for v in p.trainable()] == [(3, 4), (1, 1), (1,)]


@pytest.mark.parametrize(("changes", "message"), [({"steps": 0}, "steps > 0"), ({"terms": {}}, "at least one term")])
def test_bad_plans_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(Refused, match=message):
        plan(**changes)


def test_a_teacher_stays_frozen_in_eval_mode_and_shares_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    teacher = Teacher(model).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert teacher.model[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert not teacher(torch.randn(1, 4, requires_grad=True)).requires_grad


def test_schedules_and_optimizers() -> None:
    assert constant(0.7) == 1
    assert math.isclose(cosine(0.25), 0.5 + math.sqrt(2) / 4)
    params = list(nn.Linear(1, 1).parameters())
    assert adamw(0.3, weight_decay=0.2)(params).defaults["weight_decay"] == 0.2
    assert sgd(0.3, momentum=0.5)(params).defaults["momentum"] == 0.5


def test_an_input_that_nobody_else_holds_is_not_taken_for_a_later_one() -> None:
    model = freeze(nn.Linear(4, 3))  # whose graph holds no input, so that the next view gets the same address
    step = Step(model, batch())
    for k in range(20):
        assert torch.equal(step.run(step.batch.x * k).output, model(step.batch.x * k))
