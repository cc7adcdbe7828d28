"""LoRA: bit for bit the same start, an exact fold, peft's numbers, and layers read behind its back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.adapt import LoRA
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw
from headstart.core.rng import seeded
from headstart.core.stream import Batches
from headstart.core.validate import Refused
from headstart.testing import contract


def images() -> nn.Module:
    with seeded(1):
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(),
                             nn.Linear(216, 8), nn.ReLU(), nn.Linear(8, 10))  # fmt: skip


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random numbers in everything that trains."""
    with torch.no_grad(), seeded(seed):
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p))
    return model


test_contract = contract(
    LoRA(rank=3),
    trainable=lambda model: 3 * (64 + 32) + 3 * (32 + 16) + 16 * 10 + 10,
    refuses=[lambda: LoRA(rank=0), lambda: LoRA(scale=0.0), lambda: LoRA(layers="head").apply(nn.Linear(2, 2))],
)
test_convolutions = contract(
    LoRA(rank=2, head="6"),
    model=images,
    trainable=lambda model: 2 * (9 + 6) + 2 * (18 + 6) + 2 * (216 + 8) + 90,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_function_bit_for_bit_at_the_start(dtype):
    x, model = torch.randn(5, 1, 8, 8, dtype=dtype), images().to(dtype)
    assert torch.equal(LoRA().apply(model)(x), model(x))


def test_only_b_has_a_gradient_at_the_start():
    adapted = LoRA(layers="4").apply(images())
    adapted(torch.randn(5, 1, 8, 8)).square().sum().backward()
    layer = adapted[4]
    assert not layer.down.grad.any()
    assert layer.up.grad.any()
    assert layer.layer.weight.grad is None


def test_a_is_uniform_within_one_over_the_root_of_its_inputs():
    down = LoRA(rank=200, layers="4").apply(images())[4].down.detach()
    assert 0.99 < float(down.abs().max()) * 216**0.5 <= 1
    assert abs(float(down.mean())) < 0.002
    assert not torch.equal(down, LoRA(rank=200, layers="4", seed=1).apply(images())[4].down)


def test_fold_is_the_weight_plus_the_change_and_restores_the_classes():
    model = images()
    adapted = moved(LoRA(rank=2, scale=0.5).apply(model))
    folded = LoRA(rank=2, scale=0.5).fold(adapted)
    assert str(folded) == str(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    for k in (0, 2, 4):
        expected = model[k].weight + 0.5 * (adapted[k].up @ adapted[k].down).view_as(model[k].weight)
        assert torch.equal(folded[k].weight, expected)
        assert torch.equal(folded[k].bias, model[k].bias)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(folded(x), adapted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layer", "kind"), [("4", "linear"), ("0", "convolution")])
def test_equals_peft_with_the_same_factors(layer, kind):
    peft = pytest.importorskip("peft")
    model, x = images(), torch.randn(5, 1, 8, 8)
    theirs = peft.get_peft_model(images(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=[layer]))
    ours = moved(LoRA(rank=3, scale=2.0, layers=layer).apply(model))
    with torch.no_grad():
        ours.get_submodule("6").load_state_dict(model[6].state_dict())  # peft trains no head unless told to
        place = theirs.base_model.model.get_submodule(layer)
        place.lora_A["default"].weight.copy_(ours.get_submodule(layer).down.view_as(place.lora_A["default"].weight))
        place.lora_B["default"].weight.copy_(ours.get_submodule(layer).up.view_as(place.lora_B["default"].weight))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6 * float(ours(x).abs().max()))
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(LoRA().fold(ours).get_submodule(layer).weight, merged.get_submodule(layer).weight)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("training", [True, False])
def test_attention_that_reads_weights_without_calling_the_layer_sees_the_change(training):
    """nn.MultiheadAttention and the encoder layer's fast path read `weight` of their linear layers directly."""
    with seeded(0):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3))
    adapted = moved(LoRA(rank=2).apply(model)).train(training)
    folded = LoRA(rank=2).fold(adapted).train(training)
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), folded(x), rtol=1e-4, atol=1e-4)
        change = adapted(x) - model.train(training)(x)
    assert float(change.abs().max()) > 0.1


def test_under_a_plan_trains_and_comes_out_plain():
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = images()
    plan = Plan(model=model, stream=Batches(x=x, y=torch.arange(64) % 10), steps=60, optimizer=adamw(lr=0.02))
    fitted = fit(plan.under(LoRA(rank=4)))
    assert fitted.history["task"][-1] < 0.7 * fitted.history["task"][0]
    assert str(fitted.model) == str(model)
    assert torch.equal(fitted.model[4].bias, model[4].bias)
    assert torch.linalg.matrix_rank(fitted.model[4].weight - model[4].weight, rtol=1e-4) == 4


def test_the_head_is_the_last_linear_layer_unless_named():
    adapted = LoRA(head="4").apply(images())
    assert type(adapted[4]) is nn.Linear
    assert adapted[4].weight.requires_grad
    assert hasattr(adapted[6], "up")


def test_refuses_what_would_train_nothing_new():
    with pytest.raises(Refused, match=r"beside the head; got layers='6', which matches '6'"):
        LoRA(layers="6").apply(images())
    with pytest.raises(Refused, match=r"no match. (Choose from|Did you mean)"):
        LoRA(layers="encoder.*").apply(images())
    with pytest.raises(Refused, match="without LoRA"):
        LoRA().apply(LoRA().apply(images()))
