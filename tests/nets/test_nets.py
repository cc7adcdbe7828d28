"""The small architectures: what every one of them owes to the rest of the library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart import nets
from headstart.core.validate import Refused


def made(architecture: str, classes: int = 7) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        return nets.build(architecture, classes)


@pytest.mark.parametrize("architecture", nets.ARCHITECTURES)
def test_ends_in_a_linear_head_of_the_asked_width(architecture):
    model = made(architecture)
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    assert head.out_features == 7
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    logits = model(torch.rand(5, 3, 32, 32))
    features, output = seen[0]
    assert features.shape == (5, head.in_features)
    assert torch.equal(logits, output), "the head must be the last thing that happens"


@pytest.mark.parametrize("architecture", nets.ARCHITECTURES)
def test_is_small_and_every_parameter_takes_part(architecture):
    model = made(architecture)
    assert 50_000 <= sum(p.numel() for p in model.parameters()) <= 500_000
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias that the softmax over tokens or a following normalisation cancels may have a gradient of rounding size
    assert not idle


@pytest.mark.parametrize("architecture", nets.ARCHITECTURES)
def test_in_eval_mode_an_example_does_not_depend_on_its_neighbours(architecture):
    model = made(architecture).eval()
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), atol=1e-5, rtol=1e-5)


def test_layout_matters_where_it_should():
    """Shuffling the pixels of a picture changes what every family sees."""
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[..., order].view_as(x)
    for architecture in nets.ARCHITECTURES:
        model = made(architecture).eval()
        assert not torch.allclose(model(x), model(shuffled), atol=1e-4), architecture


def test_unknown_architecture_is_refused_with_a_suggestion():
    with pytest.raises(Refused, match="Did you mean 'resnet'"):
        nets.build("resnett", 10)
    with pytest.raises(Refused):
        nets.build("cnn", 0)
