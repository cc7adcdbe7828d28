"""Training for the model-selection study: a head first, then everything, with batch norm as it was pretrained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headstart.core.evidence import forward_features
from headstart.core.loop import fit
from headstart.core.plan import Plan, adamw, cosine
from headstart.core.stream import Batches
from headstart.core.surgery import replace_layers, with_head

BATCH = 32


def trained(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, *, rate: float = 1e-3, batch: int = BATCH,
    schedule: Callable[[float], float] = cosine,
) -> nn.Module:  # fmt: skip
    """AdamW on whatever requires gradients."""
    stream = Batches(x=x, y=y, batch_size=batch, seed=seed)
    plan = Plan(model=model, stream=stream, steps=steps, optimizer=adamw(rate), schedule=schedule)
    return fit(plan, device="cpu", seed=seed).model


def features_of(model: nn.Module, head: str, x: Tensor) -> Tensor:
    """The head's input for every example (n, d)."""
    return torch.cat([features for features, _ in forward_features(model, torch.split(x, 128), head=head)])


def said(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode."""
    return torch.cat([logits.clone() for _, logits in forward_features(model, torch.split(x, 128))])


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm that keeps its statistics, also while the model around it trains."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(False)
        return self


def frozen_norms(model: nn.Module) -> nn.Module:
    """A clone whose batch norms keep their statistics."""

    def make(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.BatchNorm2d)
        new = FrozenNorm(old.num_features, eps=old.eps).to(old.weight)
        new.load_state_dict(old.state_dict())
        return new.requires_grad_(old.weight.requires_grad).eval()

    return replace_layers(model, [n for n, m in model.named_modules() if type(m) is nn.BatchNorm2d], make)


def two_phase(
    model: nn.Module, head: str, x: Tensor, y: Tensor, classes: int, seed: int, epochs: int = 50
) -> nn.Module:
    """A new head on frozen features first (they are computed once), then every layer at a tenth of the rate."""
    start = with_head(model, classes, head)
    features = features_of(start, head, x)
    epoch = max(1, len(y) // BATCH)
    layer = trained(with_head(nn.Sequential(nn.Linear(features.shape[1], classes)), classes), features, y,
                    10 * epoch, seed)  # fmt: skip
    start.get_submodule(head).load_state_dict(layer[0].state_dict())  # type: ignore[index]
    return trained(frozen_norms(start).requires_grad_(True), x, y, (epochs - 10) * epoch, seed, rate=1e-4)
