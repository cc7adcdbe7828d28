"""Models in one pass: what each says alone, its gradient, and who may not share a pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headstart.attack import MIFGSM, fused, stacked
from headstart.core.rng import seeded
from headstart.core.validate import Refused


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(self.first(x.view(-1, 8, 8))).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3)
    )


def several(make, count=4):
    with seeded(0):
        models = [make() for _ in range(count)]
        for model in models:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.data.add_(torch.rand_like(buffer))
    return models


X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("make", [convolutions, Attention])
def test_each_says_what_it_says_alone_in_eval_mode(make):
    models = several(make)
    models[1].eval()
    found = stacked(models)(X)
    assert [m.training for m in models] == [True, False, True, True]
    alone = torch.stack([copy.deepcopy(m).eval()(X) for m in models])
    assert torch.allclose(found, alone, atol=1e-6)


@pytest.mark.parametrize("make", [convolutions, Attention])
@pytest.mark.parametrize("by", ["logits", "probabilities", "loss"])
def test_a_stacked_goal_has_the_gradient_of_the_loop(by, make):
    models = several(make)
    results = [
        torch.autograd.grad(fused(models, Y, by=by, stack=stack)(point := X.clone().requires_grad_()).sum(), point)[0]
        for stack in (True, False)
    ]
    assert float(results[1].abs().max()) > 1e-3
    assert torch.allclose(*results, atol=1e-7)


def test_an_attack_on_a_stack_goes_where_the_loop_goes():
    models = several(convolutions)
    one, two = (MIFGSM(radius=0.1).perturb(X, [fused(models, Y, stack=stack)]) for stack in (True, False))
    assert float((one - two).abs().mean()) < 1e-4  # a sign may turn where a gradient is zero up to rounding
    assert all(p.grad is None for m in models for p in m.parameters())


def test_later_changes_of_a_model_are_not_seen():
    models = several(convolutions)
    say = stacked(models)
    before = say(X)
    with torch.no_grad():
        models[0][5].weight.zero_()
    assert torch.equal(say(X), before)


@pytest.mark.parametrize(
    "models",
    [
        [],
        [nn.Linear(2, 3), nn.Linear(2, 4)],
        [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3))],
        [nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Sequential(nn.Linear(2, 3), nn.Tanh())],
        [nn.Linear(2, 3), nn.Linear(2, 3).double()],
        [nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=0)],
    ],
)
def test_models_of_two_architectures_are_refused(models):
    with pytest.raises(Refused, match="stacked needs"):
        stacked(models)
