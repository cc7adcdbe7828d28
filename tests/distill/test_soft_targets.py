"""Soft targets: known answers, a slow restatement, and what reaches teacher and student."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.core.loop import fit
from headstart.core.plan import Batch, Plan, Step, adamw
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.distill import SoftTargets
from headstart.testing import contract
from headstart.testing.material import digits, trained

TEACHER = trained()
test_contract = contract(
    lambda: SoftTargets(TEACHER),
    teachers=[TEACHER],
    optimum=lambda term: Step(TEACHER, Batch(digits()[0][:16])),
    refuses=[lambda: SoftTargets(TEACHER, temperature=0.0)],
)


class Says(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def loss_of(model: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient at the model's logits."""
    student = Says(model)
    loss = SoftTargets(Says(teacher), temperature)(Step(student, Batch(x=torch.zeros(len(model), 1))))
    return loss.detach(), torch.autograd.grad(loss, student.logits)[0]


def test_a_value_worked_by_hand():
    teacher, model = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert loss_of(model, teacher, 1.0)[0].item() == pytest.approx(divergence, rel=1e-6)
    assert loss_of(model, 2 * teacher, 2.0)[0].item() == pytest.approx(4 * divergence, rel=1e-6)


@given(st.integers(1, 5), st.integers(2, 7), st.floats(0.5, 20.0), st.integers(0, 2**16))
def test_it_equals_a_slow_restatement(n, c, temperature, seed):
    model, teacher = torch.randn(2, n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected, slope = 0.0, np.zeros((n, c))
    for i in range(n):
        p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (teacher[i].numpy(), model[i].numpy()))
        expected += temperature**2 * sum(p[k] * math.log(p[k] / q[k]) for k in range(c)) / n
        slope[i] = temperature * (q - p) / n  # the gradient of Hinton's cross-entropy, his equation 2 times T²
    loss, gradient = loss_of(model, teacher, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert np.allclose(gradient.numpy(), slope, atol=1e-12)


def test_agreement_up_to_a_constant_costs_nothing_and_pulls_nowhere():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, gradient = loss_of(logits + 3.0, logits, 4.0)
    assert loss.abs() < 1e-15
    assert gradient.abs().max() < 1e-15


def test_a_high_temperature_matches_centred_logits_whatever_it_is():
    model, teacher = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    limit = (model - teacher - (model - teacher).mean(1, keepdim=True)) / 6 / 3  # Hinton's equation 4, mean over 3
    for temperature in (1e3, 1e4):
        assert torch.allclose(loss_of(model, teacher, temperature)[1], limit, atol=1e-2 / temperature * 1e2)


def test_every_position_of_a_sequence_counts_alike():
    model, teacher = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2))
    whole, flat = loss_of(model, teacher, 4.0)[0], loss_of(model.flatten(0, 1), teacher.flatten(0, 1), 4.0)[0]
    assert torch.equal(whole, flat)


def test_the_teacher_stays_in_eval_mode_and_gets_no_gradient():
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train()
    term = SoftTargets(teacher).train()
    step = Step(nn.Linear(3, 3), Batch(x=torch.ones(8, 3)))
    assert torch.equal(term(step), term(step))
    term(step).backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not any(p.requires_grad for p in term.parameters())
    assert teacher.training


def test_a_student_without_labels_learns_its_teachers_answers():
    generator = torch.Generator().manual_seed(3)
    teacher, x = nn.Linear(5, 4), torch.randn(256, 5, generator=generator)
    teacher.weight.data = torch.randn(4, 5, generator=generator)
    plan = Plan(
        model=nn.Linear(5, 4), stream=Batches(x=x), terms={"kd": SoftTargets(teacher)}, steps=300, optimizer=adamw(0.05)
    )
    student = fit(plan, device="cpu").model
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.98


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_means_nothing_is_refused(temperature):
    with pytest.raises(Refused, match="temperature > 0"):
        SoftTargets(nn.Linear(2, 2), temperature)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(Refused, match="one shape"):
        SoftTargets(nn.Linear(2, 3))(Step(nn.Linear(2, 4), Batch(x=torch.ones(1, 2))))
