"""The one attack loop: inside the ball to the last bit, and at the optimum where there is a formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import fused
from headstart.core.ascent import Ball, ascend, check_inputs, goal_gradient, gradients_at, misclassify, own, reach
from headstart.core.validate import Refused


def noisy(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda a: torch.randn(a.shape, generator=generator, dtype=a.dtype)


@settings(max_examples=60, deadline=None)
@given(radius=st.floats(0, 1), seed=st.integers(0, 99), double=st.booleans())
def test_linf_stays_inside_ball_and_bounds_to_the_last_ulp(radius: float, seed: int, double: bool) -> None:
    x = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64 if double else None)
    a = ascend(x, noisy(seed), ball=Ball(radius), steps=5, step_size=0.4, decay=0.5)
    assert float(a.min()) >= 0
    assert float(a.max()) <= 1
    assert bool((a >= x - radius).all())
    assert bool((a <= x + radius).all())
    assert a.dtype == x.dtype


@settings(max_examples=30, deadline=None)
@given(radius=st.floats(0, 1), seed=st.integers(0, 99))
def test_l2_stays_inside_ball_and_bounds(radius: float, seed: int) -> None:
    x = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = ascend(x, noisy(seed), ball=Ball(radius, "l2"), steps=5, step_size=0.4)
    assert 0 <= float(a.min()) <= float(a.max()) <= 1
    rounding = 50 * 2.0**-53  # of x + delta, 50 entries up to 1
    assert bool(((a - x).norm(dim=1) <= radius + rounding).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_zero_or_no_steps_returns_x(norm: str) -> None:
    x = torch.rand(2, 5)
    assert torch.equal(ascend(x, noisy(0), ball=Ball(0.0, norm), steps=3, step_size=0.1), x)
    unmoved = ascend(x, noisy(0), ball=Ball(0.5, norm), steps=0, step_size=0.1)
    assert torch.equal(unmoved, x)
    assert unmoved.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_optimum_of_a_linear_goal(decay: float) -> None:
    w = torch.linspace(-1, 1, 8, dtype=torch.float64)
    x = torch.full((2, 8), 0.5, dtype=torch.float64)
    gradient = lambda a: goal_gradient([lambda b: b @ w], a)  # noqa: E731
    a = ascend(x, gradient, ball=Ball(0.1), steps=4, step_size=0.025, decay=decay)
    assert torch.allclose(a, x + 0.1 * w.sign(), atol=1e-12)
    b = ascend(x, gradient, ball=Ball(0.1, "l2"), steps=4, step_size=0.025, decay=decay)
    assert torch.allclose(b, x + 0.1 * w / w.norm(), atol=1e-12)


def test_a_zero_gradient_stays_and_is_not_nan() -> None:
    x = torch.rand(2, 5)
    for norm in ("linf", "l2"):
        a = ascend(x, torch.zeros_like, ball=Ball(0.1, norm), steps=3, step_size=0.1, decay=1.0)  # type: ignore[arg-type]
        assert torch.equal(a, x)


def test_a_start_is_clipped_into_the_ball() -> None:
    x = torch.full((1, 3), 0.5)
    a = ascend(x, torch.zeros_like, ball=Ball(0.1), steps=1, step_size=0.1, start=torch.ones(1, 3))
    assert torch.allclose(a, torch.full((1, 3), 0.6))


def test_momentum_is_the_recursion_of_the_paper() -> None:
    gradients = [torch.tensor([[1.0, -2.0]]), torch.tensor([[-4.0, 1.0]])]
    x, given_gradients = torch.full((1, 2), 0.5), iter(gradients)
    a = ascend(x, lambda _: next(given_gradients), ball=Ball(0.5), steps=2, step_size=0.1, decay=0.5)
    first = gradients[0] / 1.5
    second = 0.5 * first + gradients[1] / 2.5
    assert torch.allclose(a, x + 0.1 * first.sign() + 0.1 * second.sign())


def test_goal_gradient_is_per_example_and_leaves_no_trace() -> None:
    model, y = nn.Linear(4, 3), torch.tensor([0, 1])
    x = torch.rand(2, 4)
    both = goal_gradient([misclassify(model, y)], x)
    alone = torch.cat([goal_gradient([misclassify(model, y[k : k + 1])], x[k : k + 1]) for k in range(2)])
    assert torch.allclose(both, alone, atol=1e-7)
    assert torch.allclose(goal_gradient([reach(model, y)], x), -both)
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    with pytest.raises(Refused, match="at least one goal"):
        goal_gradient([], x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "n > 0"),
        (torch.zeros(3), r"batch \(n, ...\)"),
        (torch.zeros(1, 3, dtype=torch.uint8), "must be floats"),
        (torch.tensor([[0.0, torch.nan]]), "inputs must be finite"),
        (torch.tensor([[0.0, 255.0]]), "normalisation inside the model"),
    ],
)
def test_bad_inputs_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(Refused, match=message):
        check_inputs(x)


def test_bad_settings_and_gradients_are_refused() -> None:
    x = torch.rand(1, 3)
    with pytest.raises(Refused, match="0 <= radius <= 1"):
        Ball(8.0)
    with pytest.raises(Refused, match="0 <= radius <= 1"):
        Ball(float("nan"))
    with pytest.raises(Refused, match="norm must be a known name"):
        Ball(0.1, "l1")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="steps >= 0"):
        ascend(x, noisy(0), ball=Ball(0.1), steps=-1, step_size=0.1)
    with pytest.raises(Refused, match="gradient must be finite"):
        ascend(x, lambda a: a * torch.nan, ball=Ball(0.1), steps=1, step_size=0.1)


def test_the_point_ahead_is_where_the_momentum_leads() -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def gradient(a: Tensor, ahead: Tensor) -> Tensor:
        asked.append((a, ahead))
        return torch.tensor([[1.0, -3.0]])

    x = torch.full((1, 2), 0.5)
    for norm, unit in (("linf", 1.0), ("l2", 2**-0.5)):
        asked.clear()
        ascend(x, gradient, ball=Ball(0.5, norm), steps=2, step_size=0.1, decay=0.5, look_ahead=True)  # type: ignore[arg-type]
        assert torch.equal(asked[0][0], asked[0][1])
        assert torch.allclose(asked[1][1] - asked[1][0], unit * 0.05 * torch.tensor([[0.5, -1.5]]))


@pytest.mark.parametrize("at_once", [None, 1, 2, 3, 9])
def test_gradients_at_copies_are_those_of_each_copy(at_once: int | None) -> None:
    model, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.tensor([0, 1])
    points = torch.rand(5, 2, 4).double()
    goals = [misclassify(model, y), reach(model, 1 - y)]
    slow = torch.stack([goal_gradient(goals, point) for point in points])
    assert torch.allclose(gradients_at(goals, points, at_once=at_once), slow, rtol=0, atol=1e-14)
    own = torch.tensor([1.0, 2.0]).double()
    mixed = [*goals, lambda a: own * a.sum(1)]
    slow = torch.stack([goal_gradient(mixed, point) for point in points])
    assert torch.allclose(gradients_at(mixed, points, at_once=at_once), slow, rtol=0, atol=1e-14)


def test_copies_that_mean_nothing_are_refused() -> None:
    with pytest.raises(Refused, match="at_once"):
        gradients_at([], torch.rand(2, 1, 3), at_once=0)
    with pytest.raises(Refused, match="at least one goal"):
        gradients_at([], torch.rand(2, 1, 3))


def test_models_in_train_mode_are_run_in_eval_mode_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).train()
    model[1].eval()  # a frozen layer stays frozen
    modes = [m.training for m in model.modules()]
    statistics = model[1].running_mean.clone()
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    found = goal_gradient([misclassify(model, y), reach(model, 1 - y), fused([model], y)], x)
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert torch.equal(found, goal_gradient([misclassify(model, y), reach(model, 1 - y), fused([model], y)], x))
    assert torch.equal(model[1].running_mean, statistics)


def test_modes_come_back_after_an_error() -> None:
    model = nn.Linear(4, 3).train()
    with pytest.raises(RuntimeError):
        goal_gradient([misclassify(model, torch.tensor([0]))], torch.rand(1, 5))
    assert model.training


@pytest.mark.parametrize("labels", [torch.eye(2), torch.tensor([0.0, 1.0]), torch.tensor([True, False])])
def test_labels_that_are_no_class_numbers_are_refused(labels: Tensor) -> None:
    for make in (misclassify, reach):
        with pytest.raises(Refused, match="class numbers"):
            make(nn.Linear(4, 2), labels)


def test_one_label_for_each_example() -> None:
    goal = misclassify(nn.Linear(4, 2), torch.tensor([0, 1]))
    with pytest.raises(Refused, match="one label"):
        goal(torch.rand(3, 4))
    with pytest.raises(Refused, match="one label"):
        goal(torch.rand(4, 4))


def test_goals_of_one_model_each_are_told_from_others():
    model, y = nn.Linear(2, 2), torch.tensor([0, 1])
    assert own([misclassify(model, y)], "CWA")[0].model is model
    assert own([reach(model, y)], "CWA")[0].targeted
    mixed = [misclassify(model, y), reach(model, y)]
    other = [misclassify(model, y), misclassify(model, 1 - y)]
    for goals in ([], [lambda x: x.sum(1)], mixed, other):
        with pytest.raises(Refused, match="CWA needs goals of one model each"):
            own(goals, "CWA")


def test_many_examples_go_in_several_passes_and_keep_their_gradients():
    model, sizes = nn.Linear(3, 4).double(), []
    model.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    x, y = torch.rand(300, 3, dtype=torch.float64), torch.arange(300) % 4
    whole = torch.cat([goal_gradient([misclassify(model, y[k : k + 1])], x[k : k + 1]) for k in range(300)])
    sizes.clear()
    assert torch.allclose(goal_gradient([misclassify(model, y)], x), whole, atol=1e-12)
    assert max(sizes) == 128
    assert sum(sizes) == 300


def test_an_l2_radius_may_be_as_large_as_inputs_are_apart_and_no_larger():
    x = torch.full((2, 12), 0.5)
    moved = ascend(x, lambda a: torch.ones_like(a), ball=Ball(math.sqrt(12), "l2"), steps=1, step_size=9.0)
    assert torch.equal(moved, torch.ones_like(x))
    with pytest.raises(Refused, match=r"at most 3\.464"):
        ascend(x, lambda a: a, ball=Ball(3.5, "l2"), steps=1, step_size=0.1)
    for radius in (-0.1, math.inf, math.nan):
        with pytest.raises(Refused, match="A ball needs"):
            Ball(radius, "l2")
    with pytest.raises(Refused, match="grey levels"):
        Ball(1.5)
