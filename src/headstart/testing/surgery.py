"""Checks of every `Surgery`: module -> module."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.stream import as_batch

from .material import batch_of, model_of
from .subject import Check, Kind, Subject, refusal


def _output(subject: Subject, model: nn.Module) -> Tensor:
    training = model.training
    with torch.no_grad():
        output: Tensor = model.eval()(as_batch(batch_of(subject)).x)
    model.train(training)
    return output


def _trained(subject: Subject, steps: int = 8) -> tuple[nn.Module, nn.Module]:
    """An operated model before and after a few steps."""
    operated = subject.make().apply(model_of(subject))
    plan = Plan(model=operated, stream=[batch_of(subject)], steps=steps, optimizer=adamw(0.02))
    return operated, fit(plan, device="cpu").model


def same_function_at_the_start(subject: Subject) -> None:
    """The operated model computes what the original computes, to 1e-6, before training."""
    a, b = _output(subject, model_of(subject)), _output(subject, subject.make().apply(model_of(subject)))
    assert a.shape == b.shape, f"outputs changed shape to {tuple(b.shape)}"
    assert torch.allclose(a, b, atol=1e-6), f"outputs moved by {float((a - b).abs().max()):.2g}"


def fold_keeps_the_function(subject: Subject) -> None:
    """After training, the folded model equals the adapted one to 1e-5, and folding leaves the adapted one alone."""
    _, adapted = _trained(subject)
    before = _output(subject, adapted)
    folded = subject.make().fold(adapted)
    gap = float((_output(subject, folded) - before).abs().max())
    assert gap <= 1e-5 * max(1.0, float(before.abs().max())), f"the folded model is off by {gap:.2g}"
    assert torch.equal(_output(subject, adapted), before), "fold changed the adapted model"


def frozen_weights_stay(subject: Subject) -> None:
    """What is marked frozen is bit-identical after training."""
    operated, adapted = _trained(subject)
    after = dict(adapted.named_parameters())
    moved = [n for n, p in operated.named_parameters() if not p.requires_grad and not torch.equal(p, after[n])]
    assert not moved, f"frozen weights moved: {moved}"
    given = dict(model_of(subject).named_parameters())
    new = [n for n, p in operated.named_parameters() if not p.requires_grad]
    values = [p.detach() for p in given.values()]
    alien = [n for n in new if not any(p.shape == operated.get_parameter(n).shape
                                       and torch.equal(p, operated.get_parameter(n)) for p in values)]  # fmt: skip
    assert not alien, f"frozen weights that the original does not have: {alien}"


def trainable_count(subject: Subject) -> None:
    """Trainable numbers: as many as the declared formula says, and never none."""
    model = model_of(subject)
    count = sum(p.numel() for p in subject.make().apply(model).parameters() if p.requires_grad)
    assert count > 0, "nothing is left to train"
    if subject.trainable is not None:
        expected = subject.trainable(model)
        assert count == expected, f"{count} numbers are trained; the declared formula says {expected}"


def what_trains_moves(subject: Subject) -> None:
    """Every trainable tensor moves within eight steps: none is out of reach of the gradient."""
    operated, adapted = _trained(subject)
    after = dict(adapted.named_parameters())
    still = [n for n, p in operated.named_parameters() if p.requires_grad and torch.equal(p, after[n])]
    assert not still, f"trainable weights did not move: {still}"


def copies_and_reloads(subject: Subject) -> None:
    """A deep copy computes the same, and the weights load into a freshly operated model."""
    _, adapted = _trained(subject)
    fresh = subject.make().apply(model_of(subject))
    fresh.load_state_dict(adapted.state_dict())
    for other in (copy.deepcopy(adapted), fresh):
        assert torch.equal(_output(subject, other), _output(subject, adapted)), "a copy or reload computes another"


def unmatched_layer_lists_names(subject: Subject) -> None:
    """A pattern that fits no layer is refused, and the message names layers there are."""
    method, model = subject.make(), model_of(subject)
    message = refusal(lambda: replace(method, layers="no.such.layer").apply(model), "layers='no.such.layer'")
    names = [name for name, _ in model.named_modules() if name]
    assert any(name in message for name in names), f"the refusal names no layer of the model: {message}"


def _has_layers(subject: Subject) -> bool:
    method = subject.make()
    return is_dataclass(method) and any(f.name == "layers" for f in fields(method))


def _use(method: Any, model: nn.Module) -> dict[str, Any]:
    operated = method.apply(model)
    training = operated.training
    folded = method.fold(operated)
    assert operated.training == training == model.training, "train or eval mode must stay"
    return {"operated": dict(operated.state_dict()), "folded": dict(folded.state_dict())}


def _spoiled(subject: Subject) -> nn.Module:
    model = model_of(subject)
    with torch.no_grad():
        for p in model.parameters():
            p.flatten()[0] = torch.nan
    return model


SURGERY = Kind(
    name="surgery",
    inputs=lambda subject, dtype: model_of(subject).to(dtype),
    use=_use,
    bad=lambda _subject: {"a model without layers": nn.Sequential(nn.Flatten())},
    spoiled=_spoiled,
    checks=(
        Check(same_function_at_the_start, lambda s: s.starts_same), Check(fold_keeps_the_function),
        Check(frozen_weights_stay), Check(trainable_count), Check(what_trains_moves), Check(copies_and_reloads),
        Check(unmatched_layer_lists_names, _has_layers),
    ),
)  # fmt: skip
