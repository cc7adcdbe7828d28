"""Checks of every `Attack`: x, goals -> x."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstart.core.ascent import Ball, misclassify, reach
from headstart.core.stream import Batch

from .material import digits, trained
from .subject import Check, Kind, Subject, difference, refusal, snapshot


def _examples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[1000:1008].to(dtype).clone(), y[1000:1008]


def _model(subject: Subject, dtype: torch.dtype = torch.float32) -> Any:
    model = subject.model() if subject.model else copy.deepcopy(trained())
    return model.eval().to(dtype)


def _ball(attack: Any) -> Ball:
    """The ball an attack declares: a field `ball`, or `radius` with or without `norm`."""
    names = {f.name for f in fields(attack)} if is_dataclass(attack) else set()
    assert names & {"ball", "radius"}, "an attack is a dataclass with a field radius (and norm), or ball"
    return attack.ball if "ball" in names else Ball(attack.radius, attack.norm if "norm" in names else "linf")


def _with_radius(attack: Any, radius: float) -> Any:
    has_radius = any(f.name == "radius" for f in fields(attack))
    return replace(attack, **({"radius": radius} if has_radius else {"ball": replace(attack.ball, radius=radius)}))


def inside_ball_and_bounds(subject: Subject) -> None:
    """No entry leaves the ball or [0, 1], to the last bit (l2: to 1e-6 of the radius)."""
    model = _model(subject)
    x, y = _examples()
    for radius in (_ball(subject.make()).radius, 0.3, 1.0):
        attack = _with_radius(subject.make(), radius)
        moved = attack.perturb(x, [misclassify(model, y)])
        assert moved.shape == x.shape, f"x of shape {tuple(x.shape)} became {tuple(moved.shape)}"
        assert float(moved.min()) >= 0, f"an entry is {float(moved.min())}"
        assert float(moved.max()) <= 1, f"an entry is {float(moved.max())}"
        if _ball(attack).norm == "linf":
            low, high = x - radius, x + radius  # the ball as floats have it
            assert bool(((moved >= low) & (moved <= high)).all()), f"an entry is outside the ball of {radius}"
        else:
            far = float((moved - x).flatten(1).double().norm(dim=1).max())
            assert far <= radius * (1 + 1e-6), f"an example moved by {far} in a ball of {radius}"


def radius_zero_stays(subject: Subject) -> None:
    """Radius 0 returns x, bit for bit, in another tensor."""
    x, y = _examples()
    moved = _with_radius(subject.make(), 0.0).perturb(x, [misclassify(_model(subject), y)])
    assert torch.equal(moved, x), f"radius 0 moved x by {float((moved - x).abs().max())}"


def examples_are_independent(subject: Subject) -> None:
    """Example i is perturbed the same, whatever the other examples are."""
    model = _model(subject)
    x, y = _examples()
    one = subject.make().perturb(x, [misclassify(model, y)])
    other = x.clone()
    other[4:] = digits()[0][1100:1104]
    two = subject.make().perturb(other, [misclassify(model, y)])
    assert torch.equal(one[:4], two[:4]), "the first four examples changed when the last four did"


def optimum_of_a_linear_model(subject: Subject) -> None:
    """On a linear goal the gain is the closed form: radius · |w|₁ (linf) or radius · |w|₂ (l2)."""
    x = torch.full((2, 1, 8, 8), 0.5, dtype=torch.float64)
    w = torch.linspace(-1, 1, 64, dtype=torch.float64)
    attack = _with_radius(subject.make(), 0.05)
    moved = attack.perturb(x, [lambda a: a.flatten(1) @ w])
    best = 0.05 * float(w.norm(p=1 if _ball(attack).norm == "linf" else 2))
    gains = ((moved - x).flatten(1) @ w).tolist()
    assert all(abs(gain - best) <= 1e-6 * best for gain in gains), f"gains {gains}; the closed form says {best}"


def raises_the_goal(subject: Subject) -> None:
    """The surrogate's loss is higher afterwards."""
    model = _model(subject)
    x, y = _examples()
    goal = misclassify(model, y)
    before, after = goal(x).mean().item(), goal(subject.make().perturb(x, [goal])).mean().item()
    assert after > before, f"the goal went from {before} to {after}"


def targeted_raises_the_target(subject: Subject) -> None:
    """With the goal of another class, that class becomes likelier for every example."""
    model = _model(subject)
    x, y = _examples()
    wanted = (y + 1) % 10
    moved = subject.make().perturb(x, [reach(model, wanted)])
    with torch.no_grad():
        before, after = (model(a).log_softmax(1)[torch.arange(len(y)), wanted] for a in (x, moved))
    assert bool((after > before).all()), f"log-likelihood of the target: {before.tolist()} became {after.tolist()}"


def all_surrogates_count(subject: Subject) -> None:
    """A second goal changes the result: no surrogate is ignored, first or last."""
    x, y = _examples()
    model = _model(subject)
    goals = [
        misclassify(model, y),
        lambda a: 50 * a.flatten(1)[:, :32].sum(1),
    ]  # the upper half, which smoothing keeps apart
    both = subject.make().perturb(x, goals)
    for k, goal in enumerate(goals):
        alone = subject.make().perturb(x, [goal])
        assert not torch.equal(both, alone), f"with two goals only goal {k} counts"


def models_untouched(subject: Subject) -> None:
    """Weights, gradients, modes and hooks of the surrogate stay."""
    model = _model(subject)
    for p in model.parameters():
        p.requires_grad_(True)
    before = snapshot(model)
    x, y = _examples()
    moved = subject.make().perturb(x, [misclassify(model, y)])
    assert not (at := difference(before, snapshot(model))), f"the model changed at {at}"
    assert not moved.requires_grad, "the result carries a graph"


def _use(method: Any, given: dict[str, Any]) -> Tensor:
    goals = [misclassify(given["model"], given["batch"].y)] * given["goals"]
    moved: Tensor = method.perturb(given["batch"].x, goals)
    return moved


def _given(subject: Subject, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"model": _model(subject, dtype), "batch": Batch(*_examples(dtype)), "goals": 1}


def _with(subject: Subject, x: Tensor) -> dict[str, Any]:
    given = _given(subject)
    return {**given, "batch": Batch(x, given["batch"].y[: len(x)])}


def _bad(subject: Subject) -> dict[str, Any]:
    x, _ = _examples()
    return {
        "integers": _with(subject, (x * 255).to(torch.uint8)),
        "grey levels": _with(subject, x * 255),
        "no examples": _with(subject, x[:0]),
        "no goals": {**_given(subject), "goals": 0},
    }


def _spoiled(subject: Subject) -> dict[str, Any]:
    x, _ = _examples()
    x[1, 0, 3, 3] = torch.nan
    return _with(subject, x)


def radius_is_checked(subject: Subject) -> None:
    """A negative radius, or one in grey levels, is refused."""
    for radius in (-0.1, 16.0):

        def use(radius: float = radius) -> None:
            _use(_with_radius(subject.make(), radius), _given(subject))

        refusal(use, f"radius={radius}")


ATTACK = Kind(
    name="attack",
    inputs=_given,
    use=_use,
    bad=_bad,
    spoiled=_spoiled,
    checks=(
        Check(inside_ball_and_bounds), Check(radius_zero_stays), Check(examples_are_independent),
        Check(optimum_of_a_linear_model), Check(raises_the_goal), Check(targeted_raises_the_target),
        Check(all_surrogates_count), Check(models_untouched), Check(radius_is_checked),
    ),
)  # fmt: skip
