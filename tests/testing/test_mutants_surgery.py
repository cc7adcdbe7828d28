"""Each check of surgeries rejects a surgery made wrong in that one way; right minimal surgeries pass all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from headstart.core.surgery import freeze, matching, replace_layers
from headstart.testing.material import LowRank, Thin
from headstart.testing.subject import Subject
from headstart.testing.surgery import SURGERY


@dataclass(frozen=True)
class ThinOn:
    """A low-rank surgery with a choice of layers."""

    layers: str = "*"

    def apply(self, model: nn.Module) -> nn.Module:
        return replace_layers(freeze(model), matching(model, self.layers, nn.Linear), LowRank)  # type: ignore[arg-type]

    def fold(self, model: nn.Module) -> nn.Module:
        return Thin().fold(model)


def count(model: nn.Module) -> int:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(2 * (m.in_features + m.out_features) for m in linears)


class Loud(LowRank):
    """Does not start as the original."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        nn.init.constant_(self.up, 0.1)


class Dead(LowRank):
    """Parameters the gradient cannot reach."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T.detach()


class Unsaved(LowRank):
    """Keeps what it learns outside of its parameters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale += 0.01
        return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


def using(layer: Callable) -> type:
    class Mutant(ThinOn):
        def apply(self, model: nn.Module) -> nn.Module:
            return replace_layers(freeze(model), matching(model, self.layers, nn.Linear), layer)

    return Mutant


class HalfFolded(ThinOn):
    def fold(self, model: nn.Module) -> nn.Module:
        half = copy.deepcopy(model)
        with torch.no_grad():
            for m in half.modules():
                if isinstance(m, LowRank):
                    m.up.mul_(0.5)
        return super().fold(half)


class FoldsInPlace(ThinOn):
    def fold(self, model: nn.Module) -> nn.Module:
        folded = super().fold(model)
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, LowRank):
                    m.up.zero_()
        return folded


class Rounds(ThinOn):
    """Touches the frozen weights on the way in."""

    def apply(self, model: nn.Module) -> nn.Module:
        operated = super().apply(model)
        for p in operated.parameters():
            if not p.requires_grad:
                p.data = p.data.half().float()
        return operated


class Drifts(ThinOn):
    """A frozen weight that moves by itself in training."""

    def apply(self, model: nn.Module) -> nn.Module:
        operated = super().apply(model)

        def drift(module: nn.Module, _inputs: object) -> None:
            if module.training:
                next(p for p in module.parameters() if not p.requires_grad).data.add_(0.01)

        operated.register_forward_pre_hook(drift)
        return operated


class TrainsAll(ThinOn):
    def apply(self, model: nn.Module) -> nn.Module:
        return super().apply(model).requires_grad_(True)


class TrainsNothing(ThinOn):
    def apply(self, model: nn.Module) -> nn.Module:
        return super().apply(model).requires_grad_(False)


class Silent(ThinOn):
    """Returns the model as it is when no layer fits."""

    def apply(self, model: nn.Module) -> nn.Module:
        return freeze(model) if "no.such" in self.layers else super().apply(model)


class Vague(ThinOn):
    def apply(self, model: nn.Module) -> nn.Module:
        from headstart.core.validate import require

        require("no.such" not in self.layers, "A layer must match", "none", "Pass another pattern.")
        return super().apply(model)


MUTANTS: dict[str, list[type]] = {
    "same_function_at_the_start": [using(Loud)],
    "fold_keeps_the_function": [HalfFolded, FoldsInPlace],
    "frozen_weights_stay": [Rounds, Drifts],
    "trainable_count": [TrainsAll, TrainsNothing],
    "what_trains_moves": [using(Dead)],
    "copies_and_reloads": [using(Unsaved)],
    "unmatched_layer_lists_names": [Silent, Vague],
}


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.name for check in SURGERY.checks}


@pytest.mark.parametrize("check", SURGERY.checks, ids=lambda check: check.name)
def test_the_right_method_passes(check) -> None:
    right = Subject(make=ThinOn, kind=SURGERY, trainable=count)
    assert check.applies(right)
    check.run(right)


@pytest.mark.parametrize(("name", "make"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_the_check_rejects_its_mutant(name: str, make: type) -> None:
    (check,) = [check for check in SURGERY.checks if check.name == name]
    wrong = Subject(make=make, kind=SURGERY, trainable=count)
    assert check.applies(wrong)
    with pytest.raises(AssertionError):
        check.run(wrong)
