"""DANN: the card's known answers, equality with two losses, and what the target can and cannot do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.adapt import LoRA
from headstart.align import DANN
from headstart.align.dann import Domain, annealed, reverse, rise
from headstart.core.loop import fit
from headstart.core.plan import Batch, On, Plan, Step, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.taps import tapped
from headstart.core.validate import Refused
from headstart.distill import SoftTargets
from headstart.testing import contract
from headstart.testing.material import digits

test_contract = contract(DANN(Batches(x=digits()[0][:256].flip(3))), refuses=[lambda: DANN([], hidden=-1)])


def model_of(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def worlds(n: int = 32) -> tuple[Batches, Batches]:
    """A labelled source, and a target that lies elsewhere."""
    x = torch.randn(2 * n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)  # along what the classes do not depend on
    return Batches(x=x[:n], y=(x[:n, 0] > 0).long(), batch_size=16), Batches(x=x[n:] + shift, batch_size=16)


def gradients(weight: float, model: nn.Module, domain: Domain) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the domain loss at the feature extractor and at the domain head, at full strength `weight`."""
    source, target = worlds()
    domain.strength, domain.gamma = weight, math.inf
    with tapped(model, domain.taps) as recorded:
        batch = {"source": next(iter(source)), "target": next(iter(target))}
        loss = domain(Step(model, batch, progress=0.5, recorded=recorded))
    found = torch.autograd.grad(loss, [*model[0].parameters(), *domain.parameters()])
    return list(found[:2]), list(found[2:])


def domain_of(model: nn.Module, **settings: float) -> Domain:
    source, target = worlds()
    domain = DANN(target, hidden=4, **settings)(Plan(model=model, stream=source, steps=10)).terms["domain"]
    assert isinstance(domain, Domain)
    return domain


def test_the_cards_values_of_the_schedules():
    assert [rise(p) for p in (0, 0.1, 0.5, 1)] == pytest.approx([0, 0.46211716, 0.98661430, 0.99990920], abs=1e-8)
    assert [0.01 * annealed(p) for p in (0, 0.5, 1)] == pytest.approx([0.01, 0.00260847, 0.00165560], abs=1e-8)
    assert [rise(p, math.inf) for p in (0, 0.1)] == [0, 1]


@given(st.floats(0, 1), st.floats(0.1, 50))
def test_the_rise_is_the_papers_formula(progress, gamma):
    assert rise(progress, gamma) == pytest.approx(2 / (1 + math.exp(-gamma * progress)) - 1, abs=1e-12)


@given(st.floats(0, 100), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_reversal_gives_the_same_bits_forward_and_minus_the_weight_back(weight, shape):
    x = torch.randn(shape, requires_grad=True)
    out = reverse(x, weight)
    assert torch.equal(out, x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full(shape, -weight))


def test_constant_domain_logits_cost_log_two_in_each_domain():
    model = model_of()
    domain = domain_of(model)
    for p in domain.head[-1].parameters():
        p.data.zero_()
    source, target = worlds()
    with tapped(model, domain.taps) as recorded:
        batch = {"source": next(iter(source)), "target": next(iter(target))}
        loss = domain(Step(model, batch, recorded=recorded))
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-12)


def test_the_domain_head_learns_with_weight_one_and_the_features_with_minus_lambda():
    model = model_of()
    domain = domain_of(model)
    (weak, head_a), (strong, head_b) = (gradients(weight, model, domain) for weight in (0.1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(head_a, head_b, strict=True))
    assert all(torch.allclose(10 * a, b, rtol=1e-12) for a, b in zip(weak, strong, strict=True))
    assert all(g.abs().max() > 1e-4 for g in strong)
    assert not any(g.any() for g in gradients(0.0, model, domain)[0])


def test_it_equals_two_losses_and_two_players():
    """θ_d descends L_d, θ_f descends -λ L_d, without a reversal layer, written with F.binary_cross_entropy."""
    model, weight = model_of(1), 0.7
    domain = domain_of(model)
    features, head = gradients(weight, model, domain)
    source, target = (next(iter(part)).x for part in worlds())
    logits = [domain.head(model[1](model[0](x))) for x in (source, target)]
    loss = sum(
        F.binary_cross_entropy(z.sigmoid(), torch.full_like(z, label))
        for label, z in zip((0.0, 1.0), logits, strict=True)
    )
    theirs_head = torch.autograd.grad(loss, list(domain.parameters()), retain_graph=True)
    theirs_features = torch.autograd.grad(-weight * loss, list(model[0].parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(head, theirs_head, strict=True))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(features, theirs_features, strict=True))


def test_strength_zero_trains_as_the_source_alone():
    source, target = worlds()
    plan = Plan(model=model_of(), stream=source, steps=20, optimizer=sgd(0.1))
    alone, beside = fit(plan, device="cpu"), fit(DANN(target, strength=0.0)(plan), device="cpu")
    for a, b in zip(alone.model.parameters(), beside.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_both_domains_share_one_forward_and_its_batch_statistics():
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    model.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    source, target = worlds()
    plan = DANN(target)(Plan(model=model, stream=source, steps=3))
    calls.clear()
    fit(plan, device="cpu")
    assert calls == [32, 32, 32]


def test_labels_of_the_target_change_nothing():
    source, target = worlds()
    labelled = Batches(x=target.x, y=torch.zeros(len(target.x), dtype=torch.long), batch_size=16)
    plan = Plan(model=model_of(), stream=source, steps=10)
    without, within = (fit(DANN(t)(plan), device="cpu").model.state_dict() for t in (target, labelled))
    assert all(torch.equal(without[name], within[name]) for name in without)


def test_the_plan_is_left_alone_and_the_same_seed_gives_the_same_domain_head():
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source, target = worlds()
    plan = Plan(model=model, stream=source, steps=3)
    random = torch.get_rng_state()
    first, again, other = (DANN(target, seed=seed)(plan).terms["domain"].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random)
    assert list(plan.terms) == ["task"]
    assert plan.stream is source
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("layer", "width"), [(None, 6), ("0:input", 3), ("0", 6), ("2", 2)])
def test_any_layer_can_be_aligned(layer, width):
    source, target = worlds()
    plan = DANN(target, layer=layer, hidden=0)(Plan(model=model_of(), stream=source, steps=2))
    assert plan.terms["domain"].head.in_features == width
    fit(plan, device="cpu")


def test_it_composes_with_lora_and_a_distillation_term_on_the_source():
    source, target = worlds()
    plan = Plan(model=model_of(), stream=source, steps=5)
    fitted = fit(DANN(target)(plan).under(LoRA(rank=2)).plus(kd=On("source", SoftTargets(model_of(1)))), device="cpu")
    assert list(fitted.history) == ["task", "domain", "kd"]
    assert fitted.model.state_dict().keys() == plan.model.state_dict().keys()
    assert not torch.equal(fitted.model[0].weight, plan.model[0].weight)
    assert torch.equal(fitted.model[0].bias, plan.model[0].bias)


def test_features_of_two_shifted_clouds_are_drawn_together():
    source, target = worlds(256)
    plan = Plan(model=model_of(), stream=source, steps=600, optimizer=sgd(0.1, momentum=0.0))
    gaps, losses = [], []
    for strength in (0.0, 1.0):
        fitted = fit(DANN(target, strength=strength, hidden=16)(plan), device="cpu")
        with torch.no_grad():
            a, b = (fitted.model[:2](x) for x in (source.x, target.x))
        gaps.append((a.mean(0) - b.mean(0)).norm().item())
        losses.append(fitted.history["domain"][-1])
    assert gaps[1] < 0.5 * gaps[0]
    assert losses[0] < 1.0 < 1.3 < losses[1]  # 2 log 2 = 1.39: the domain head can no longer tell


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"hidden": -1}, "hidden >= 0"),
        ({"gamma": 0.0}, "gamma > 0"),
        ({"strength": -0.1}, "strength >= 0"),
        ({"strength": math.nan}, "strength >= 0"),
        ({"layer": "8"}, "layer must exist"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, says):
    source, target = worlds()
    with pytest.raises(Refused, match=says):
        DANN(target, **wrong)(Plan(model=model_of(), stream=source, steps=1))


def test_an_empty_target_and_a_second_domain_are_refused():
    source, target = worlds()
    plan = Plan(model=model_of(), stream=source, steps=1)
    with pytest.raises(Refused, match="target with examples"):
        DANN([])(plan)
    with pytest.raises(Refused, match="free name"):
        DANN(target)(DANN(target)(plan))


def test_a_nan_in_the_target_stops_the_run():
    source, _ = worlds()
    bad = [Batch(x=torch.full((16, 3), math.nan, dtype=torch.float64))]
    with pytest.raises(Refused, match="finite"):
        fit(DANN(bad)(Plan(model=model_of(), stream=source, steps=2)), device="cpu")
