"""Cross-entropy of sure models: torch's values, and the gradient that exact arithmetic gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.attack import MIFGSM, PGD, fused
from headstart.core.ascent import misclassify
from headstart.core.confident import cross_entropy
from headstart.core.validate import Refused


def pair(scale: float, seed: int, dtype=torch.float64, n: int = 6, c: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), torch.randint(c, (n,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 30), st.integers(0, 999))
def test_values_and_gradients_are_torchs_where_torch_is_exact(scale, seed):
    z, y = pair(scale, seed)
    mine, theirs = cross_entropy(z, y), F.cross_entropy(z, y, reduction="none")
    assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-14)
    slopes = [torch.autograd.grad(loss.sum(), z)[0] for loss in (mine, theirs)]
    assert torch.allclose(*slopes, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0, 1e4])
def test_the_direction_of_a_sure_models_gradient_is_that_of_exact_arithmetic(scale):
    z, _ = pair(scale, 0, torch.float32)
    y = z.argmax(1)
    found = torch.autograd.grad(cross_entropy(z, y).sum(), z)[0].double()
    exact = torch.zeros_like(found)  # of the log-odds, which rise with the cross-entropy
    for i, row in enumerate(z.detach().double()):
        others = [k for k in range(4) if k != y[i]]
        exact[i, others] = row[others].softmax(0)
        exact[i, y[i]] = -1
    assert float(found.abs().sum(1).min()) > 0
    assert torch.allclose(found / found.abs().amax(1, keepdim=True), exact, atol=1e-5)


def test_the_tangent_meets_the_curve():
    below, above = (
        cross_entropy(torch.tensor([[-math.log(torch.finfo(torch.float32).tiny) / 2 + d, 0.0]]), torch.tensor([0]))
        for d in (0.01, -0.01)
    )
    assert 0 < float(above - below) < 1e-19
    assert abs(float(cross_entropy(torch.tensor([[500.0, 0.0]]), torch.tensor([0])))) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_widened(dtype):
    z, y = pair(2.0, 1, dtype)
    found = cross_entropy(z, y)
    assert found.dtype == torch.float32
    near = F.cross_entropy(z.float(), y, reduction="none")
    assert torch.allclose(found, near, atol=0.05)
    assert torch.autograd.grad(found.sum(), z)[0].dtype == dtype


def test_one_class_is_refused():
    with pytest.raises(Refused, match="two classes"):
        cross_entropy(torch.zeros(3, 1), torch.zeros(3).long())


class Sure(nn.Module):
    """The same answers, however many times larger the logits."""

    def __init__(self, model: nn.Module, times: float) -> None:
        super().__init__()
        self.model, self.times = model, times

    def forward(self, x: Tensor) -> Tensor:
        return self.times * self.model(x)


@pytest.mark.parametrize("attack", [PGD(radius=0.2), MIFGSM(radius=0.2), PGD(radius=0.5, norm="l2")])
def test_a_surer_model_of_two_classes_is_attacked_the_same(attack):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)), torch.rand(20, 16)
    y = model(x).argmax(1)
    found = [attack.perturb(x, [misclassify(Sure(model, times), y)]) for times in (1.0, 1e3)]
    assert torch.allclose(*found, atol=1e-5)  # of two classes the direction does not depend on the scale


@pytest.mark.parametrize("by", ["logits", "probabilities", "loss"])
def test_sure_surrogates_have_a_gradient_in_every_fusion(by):
    torch.manual_seed(0)
    models, x = [Sure(nn.Linear(16, 4), 1e3) for _ in range(3)], torch.rand(20, 16)
    y = models[0](x).argmax(1)
    point = x.clone().requires_grad_()
    slopes = torch.autograd.grad(fused(models, y, by=by)(point).sum(), point)[0]
    assert bool(slopes.abs().sum(1).gt(0).all())
