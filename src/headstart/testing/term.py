"""Checks of every `Term`: one summand of the loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, Step, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batch, each
from headstart.core.taps import tapped

from .material import batch_of, model_of
from .subject import Check, Kind, Subject, cast, close, refusal


def _given(subject: Subject, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    return model_of(subject).to(dtype), cast(batch_of(subject), dtype)


def _loss(term: Any, given: tuple[nn.Module, Any], progress: float = 0.5) -> Tensor:
    model, batch = given
    with tapped(model, term.taps) as recorded:
        loss: Tensor = term(Step(model, batch, progress, {"term": term}, recorded))
    return loss


def _parameters(term: Any, given: tuple[nn.Module, Any]) -> list[nn.Parameter]:
    return [p for module in (given[0], term) for p in module.parameters() if p.requires_grad]


def finite_scalar(subject: Subject) -> None:
    """A finite number of shape () that some trainable weight can change."""
    given, term = _given(subject), subject.make()
    loss = _loss(term, given)
    assert loss.shape == (), f"the loss has shape {tuple(loss.shape)}"
    assert bool(torch.isfinite(loss)), f"the loss is {loss.item()}"
    found = torch.autograd.grad(loss, _parameters(term, given), allow_unused=True) if loss.requires_grad else []
    assert any(g is not None and bool((g != 0).any()) for g in found), "no gradient reaches any trainable weight"


def mean_over_the_batch(subject: Subject) -> None:
    """Every example twice is the same loss."""
    model, batch = _given(subject, torch.float64)
    term = subject.make().double()
    twice = each(lambda t: torch.cat([t, t]), batch)
    with seeded(0):
        one = _loss(term, (model, batch))
    with seeded(0):
        two = _loss(term, (model, twice))
    assert close(one, two, 1e-9), f"{one.item()} became {two.item()} with every example twice"


def forwards_once(subject: Subject) -> None:
    """What `step.run` has forwarded already is not forwarded again."""
    (model, batch), term = _given(subject), subject.make()
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with tapped(model, term.taps) as recorded:
        step = Step(model, batch, 0.5, {"term": term}, recorded)
        for part in [step.on(name) for name in batch] if isinstance(batch, dict) else [step]:
            part.run(part.batch.x)
        before = len(calls)
        term(step)
    handle.remove()
    assert len(calls) == before, f"the model was forwarded {len(calls) - before} more times"


def gradient_matches_differences(subject: Subject) -> None:
    """In float64 the gradient along a random direction is the slope of the loss there, to 1e-5."""
    given, term = _given(subject, torch.float64), subject.make().double()
    parameters = _parameters(term, given)
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device) for p in parameters]

    def at(shift: float) -> Tensor:
        with torch.no_grad():
            for p, way in zip(parameters, ways, strict=True):
                p.add_(shift * way)
        with seeded(0):
            return _loss(term, given)

    gradient = torch.autograd.grad(at(0.0), parameters, allow_unused=True)
    along = sum(float((g * way).sum()) for g, way in zip(gradient, ways, strict=True) if g is not None)
    h = 1e-5
    slope = (float(at(h).detach()) - float(at(-2 * h).detach())) / (2 * h)
    assert close(along, slope, 1e-5), f"the gradient says {along:.8g}, differences say {slope:.8g}"


def no_gradient_reaches_a_teacher(subject: Subject) -> None:
    """The declared teachers keep every bit, mode and empty gradient, and none of their weights is trained along."""
    given, term = _given(subject), subject.make()
    before = copy.deepcopy(subject.teachers)
    modes = [m.training for t in subject.teachers for m in t.modules()]
    values = [p.detach().clone() for t in subject.teachers for p in t.parameters()]
    trained = [p.detach() for p in term.parameters() if p.requires_grad]
    alike = [p for p in trained for v in values if p.shape == v.shape and p.numel() > 1 and torch.equal(p, v)]
    assert not alike, f"{len(alike)} of the teacher's tensors would be trained"
    fit(Plan(model=given[0], stream=[given[1]], terms={"term": term}, steps=2, optimizer=sgd(0.1)), device="cpu")
    for old, teacher in zip(before, subject.teachers, strict=True):
        for a, b in zip(old.state_dict().values(), teacher.state_dict().values(), strict=True):
            assert torch.equal(a, b), "a teacher changed in training"
        assert all(p.grad is None for p in teacher.parameters()), "a gradient reached a teacher"
    assert modes == [m.training for t in subject.teachers for m in t.modules()], "a teacher's mode changed"
    inside = [m for m in term.train().modules() if any(_is_copy(m, teacher) for teacher in subject.teachers)]
    assert not any(m.training for m in inside), "inside the term a teacher goes into training mode"


def _is_copy(module: nn.Module, teacher: nn.Module) -> bool:
    a, b = module.state_dict(), teacher.state_dict()
    return type(module) is type(teacher) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def least_at_its_optimum(subject: Subject) -> None:
    """The declared minimum at the declared optimum, and no less at the given batch."""
    assert subject.optimum is not None
    term = subject.make()
    best = float(term(subject.optimum(term)).detach())
    assert close(best, subject.minimum, 1e-5), f"{best} at the optimum; declared is {subject.minimum}"
    usual = float(_loss(subject.make(), _given(subject)).detach())
    assert usual >= best - 1e-5, f"{usual} at the given batch is below {best} at the optimum"


def unknown_layer_lists_names(subject: Subject) -> None:
    """A layer that does not exist is refused, naming one that does."""
    assert subject.at_layer is not None
    term, given = subject.at_layer("no.such.layer"), _given(subject)
    plan = Plan(model=given[0], stream=[given[1]], terms={"term": term}, steps=1)
    message = refusal(lambda: fit(plan, device="cpu"), "an unknown layer")
    names = [name for name, _ in given[0].named_modules() if name]
    assert any(name in message for name in names), f"the refusal names no layer of the model: {message}"


def _spoiled(subject: Subject) -> Any:
    model, batch = _given(subject)
    spoil = lambda t: t.index_fill(0, torch.tensor(0), torch.nan) if t.is_floating_point() else t  # noqa: E731
    parts = batch if isinstance(batch, dict) else {"": batch}
    parts = {name: Batch(each(spoil, part.x), part.y, part.extra) for name, part in parts.items()}
    return model, parts if isinstance(batch, dict) else parts[""]


TERM = Kind(
    name="term",
    inputs=_given,
    use=_loss,
    bad=lambda _subject: {},
    spoiled=_spoiled,
    draws=True,
    checks=(
        Check(finite_scalar), Check(mean_over_the_batch), Check(forwards_once), Check(gradient_matches_differences),
        Check(no_gradient_reaches_a_teacher, lambda s: bool(s.teachers)),
        Check(least_at_its_optimum, lambda s: s.optimum is not None),
        Check(unknown_layer_lists_names, lambda s: s.at_layer is not None),
    ),
)  # fmt: skip
