"""The model and its terms as one module, and what training makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .plan import Step, Term


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a plan became: the finished model (eval mode), the trained terms, seconds, and every step's losses."""

    model: nn.Module
    terms: Mapping[str, nn.Module]
    seconds: float
    losses: Tensor = field(repr=False)

    @property
    def history(self) -> dict[str, list[float]]:
        """Loss of each term at each step; reading it moves the figures off the device."""
        return {name: self.losses[:, k].tolist() for k, name in enumerate(self.terms)}


class Objective(nn.Module):
    """The model and its terms as one module, so that any wrapper (DDP, autocast, compile) sees a single forward."""

    def __init__(self, model: nn.Module, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.model, self.terms = model, nn.ModuleDict(terms)
        self.step: Step | None = None

    def forward(self, batch: Any, progress: float, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.step = Step(self.model, batch, progress, dict(self.terms.items()), recorded)
        return {name: term(self.step) for name, term in self.terms.items()}

    def train(self, mode: bool = True) -> Objective:
        """Layers whose own parameters are all frozen (a frozen BatchNorm) stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.training = False
        return self
