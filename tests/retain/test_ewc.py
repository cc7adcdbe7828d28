"""EWC: the exact Fisher in closed form, many tasks as one quadratic, and what is kept and refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.adapt import LoRA
from headstart.core.fisher import diagonal_fisher
from headstart.core.loop import fit
from headstart.core.plan import Batch, Plan, Step, sgd
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.retain import EWC
from headstart.testing import contract

test_contract = contract(EWC(), refuses=[lambda: EWC(strength=-1.0)])


def model_of(seed: int = 0, classes: int = 3) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes))


def task_of(seed: int, n: int = 24) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


def penalty_of(ewc: EWC, model: nn.Module) -> tuple[float, list[Tensor]]:
    """The penalty at a model, and its gradient at each weight."""
    loss = ewc(Plan(model=model, stream=[], steps=1)).terms["ewc"](Step(model, None))
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("labels", ["expected", "true"])
def test_the_fisher_of_a_linear_softmax_layer_is_its_closed_form(labels):
    """d log p(y|x) / dW = (onehot(y) - p) xᵀ, squared for each example before the mean is taken."""
    model, task = nn.Linear(4, 3).double(), task_of(0)
    x, y = task.x.double(), task.y
    ewc = EWC(labels=labels)
    ewc.remember(model, [Batch(x[:10], y[:10]), Batch(x[10:], y[10:])])
    p = model(x).softmax(1).detach()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(len(x)):
        for c in range(3):
            weight = p[i, c] if labels == "expected" else float(y[i] == c)
            expected += weight * torch.outer(torch.eye(3, dtype=torch.float64)[c] - p[i], x[i]).square() / len(x)
    assert torch.allclose(ewc.importance["weight"].double(), expected, rtol=1e-5)
    assert torch.equal(ewc.centre["weight"], model.weight.detach())


def test_one_task_costs_half_strength_times_importance_times_squared_distance():
    model, moved = model_of(0), model_of(1)
    ewc = EWC(strength=6.0)
    ewc.remember(model, [task_of(0)])
    fisher = diagonal_fisher(model, [task_of(0)])
    a, b = weights(model), weights(moved)
    assert penalty_of(ewc, model)[0] == 0.0
    assert penalty_of(ewc, moved)[0] == pytest.approx(
        3.0 * sum((fisher[name] * (b[name] - a[name]) ** 2).sum().item() for name in a), rel=1e-5
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5))
def test_many_tasks_equal_the_sum_of_their_penalties_up_to_a_constant(tasks):
    """A restatement in float64 that keeps every task: values differ by one constant, gradients not at all."""
    models, ewc = [model_of(seed) for seed in range(tasks)], EWC(strength=2.0)
    for seed, model in enumerate(models):
        ewc.remember(model, [task_of(seed)])
    fishers = [diagonal_fisher(model, [task_of(seed)]) for seed, model in enumerate(models)]
    gaps = []
    for probe in (model_of(100), model_of(101)):
        value, gradient = penalty_of(ewc, probe)
        here, kept = weights(probe), 0.0
        for name, mine in zip(here, gradient, strict=True):
            pulls = [
                (f[name].double(), here[name].double() - weights(m)[name]) for f, m in zip(fishers, models, strict=True)
            ]
            kept += sum((fisher * away.square()).sum().item() for fisher, away in pulls)
            assert torch.allclose(mine.double(), 2.0 * sum(fisher * away for fisher, away in pulls), atol=1e-6)
        gaps.append(kept - value)
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)


def test_memory_does_not_grow_with_tasks():
    ewc, sizes = EWC(), []
    for seed in range(4):
        ewc.remember(model_of(seed), [task_of(seed)])
        sizes.append(sum(t.numel() for t in (*ewc.importance.values(), *ewc.centre.values())))
    assert sizes == [2 * sum(p.numel() for p in model_of().parameters())] * 4


def test_before_the_first_task_it_is_the_identity():
    plan = Plan(model=model_of(), stream=[task_of(0)], steps=1)
    assert EWC()(plan) is plan


def test_strength_zero_is_fine_tuning_bit_for_bit():
    task = task_of(1)
    plan = Plan(model=model_of(), stream=Batches(x=task.x, y=task.y, batch_size=8), steps=20, optimizer=sgd(0.1))
    ewc = EWC(strength=0.0)
    ewc.remember(plan.model, [task_of(0)])
    plain, kept = (fit(p, device="cpu").model.state_dict() for p in (plan, ewc(plan)))
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_training_stays_nearer_where_the_old_task_cares_and_the_more_the_stronger():
    task, ewc = task_of(1), EWC()
    plan = Plan(model=model_of(), stream=Batches(x=task.x, y=task.y, batch_size=8), steps=60, optimizer=sgd(0.05))
    ewc.remember(plan.model, [task_of(0)])
    moved = []
    for strength in (0.0, 10.0, 100.0):
        ewc.strength = strength
        after = weights(fit(ewc(plan), device="cpu").model)
        moved.append(sum((ewc.importance[name] * (after[name] - ewc.centre[name]) ** 2).sum().item() for name in after))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_under_lora_the_weights_that_are_computed_with_are_held():
    task, ewc = task_of(1), EWC()
    plan = Plan(model=model_of(), stream=Batches(x=task.x, y=task.y, batch_size=8), steps=60, optimizer=sgd(0.05))
    ewc.remember(plan.model, [task_of(0)])
    moved = []
    for strength in (0.0, 100.0):
        ewc.strength = strength
        for p in (ewc(plan).under(LoRA(rank=2)), ewc(plan.under(LoRA(rank=2)))):
            after = weights(fit(p, device="cpu").model)
            moved.append((ewc.importance["0.weight"] * (after["0.weight"] - ewc.centre["0.weight"]) ** 2).sum().item())
    assert moved[0] == moved[1] > 2 * moved[2]
    assert moved[2] == moved[3]


def test_a_weight_that_never_matters_is_free_and_finite():
    model = nn.Linear(2, 2)
    task = [Batch(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))]
    ewc = EWC(strength=1e6)
    ewc.remember(model, task)
    ewc.remember(model, task)
    with torch.no_grad():
        model.weight[:, 1] += 5.0
    value, (gradient, _) = penalty_of(ewc, model)
    assert value == 0.0
    assert not gradient.any()


def test_frozen_weights_are_not_remembered_and_new_ones_join():
    model = model_of()
    model[0].requires_grad_(False)
    ewc = EWC()
    ewc.remember(model, [task_of(0)])
    assert list(ewc.importance) == ["2.weight", "2.bias"]
    ewc.remember(model.requires_grad_(True), [task_of(1)])
    assert set(ewc.importance) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_remembering_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ewc = EWC()
    ewc.remember(model, [task_of(0)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(ewc.centre["0.weight"], before["0.weight"])


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf])
def test_a_strength_that_means_nothing_is_refused(strength):
    with pytest.raises(Refused, match="strength >= 0"):
        EWC(strength=strength)


def test_a_model_without_the_remembered_weights_is_refused():
    ewc = EWC()
    ewc.remember(model_of(), [task_of(0)])
    for other, named in ((model_of(classes=4), "2.weight"), (nn.Linear(4, 3), "0.weight")):
        with pytest.raises(Refused, match=f"every remembered weight.*{named}"):
            fit(ewc(Plan(model=other, stream=[task_of(0)], steps=1)), device="cpu")


def test_an_empty_or_endless_stream_missing_labels_and_unknown_words_are_refused():
    with pytest.raises(Refused, match="at least one example"):
        EWC().remember(model_of(), [])
    with pytest.raises(Refused, match="finite pass"):
        EWC().remember(model_of(), Batches(x=torch.zeros(2, 4)))
    with pytest.raises(Refused, match="needs labels"):
        EWC(labels="true").remember(model_of(), [Batch(torch.zeros(2, 4))])
    with pytest.raises(Refused, match="expected"):
        EWC(labels="expectd")
