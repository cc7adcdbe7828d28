"""Models at several moments of one training run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from headstart.core.surgery import clone
from headstart.core.validate import require


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training may change: trainable parameters and buffers, by name; not copied."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value.detach() for name, value in model.state_dict().items() if name not in frozen}


def filled(template: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A frozen copy of `template` in eval mode that holds `weights`, on their device; frozen weights are shared.

    Raises:
        Refused: weights that are not the template's.
    """
    missing = sorted(weights.keys() ^ moving(template).keys())
    require(not missing, "Sampled weights must fit the model of the plan", f"{missing[:3]} on one side only",
            "Apply a surgery to the plan before the sampler.")  # fmt: skip
    model, device = clone(template), next(iter(weights.values())).device
    if device != next(template.parameters()).device:
        model = copy.deepcopy(model).to(device)  # .to() moves in place, and the frozen weights are the user's
    model.load_state_dict(dict(weights), strict=False)
    return model.requires_grad_(False).eval()


class Samples:
    """The models a sampler kept, in the order of the run: `len`, an index and a loop give frozen ones in eval mode.

    Batch statistics belong to the model they were seen with and are kept with it. A later run empties it.

    Attributes:
        steps: optimizer steps done when each was kept.

    Cost: what is trained and the buffers, once a model; a model is put together when it is asked for.

    >>> len(Samples())
    0
    """

    def __init__(self) -> None:
        self.template: nn.Module | None = None
        self.steps: list[int] = []
        self.weights: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        """Forget the models of an earlier run."""
        self.steps, self.weights = [], []

    def keep(self, model: nn.Module, steps: int) -> None:
        """Take a copy of `model`, `steps` steps into the run."""
        self.weights.append({name: value.clone() for name, value in moving(model).items()})
        self.steps.append(steps)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> nn.Module:
        assert self.template is not None
        return filled(self.template, self.weights[index])

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[k] for k in range(len(self)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        return {"steps": self.steps, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps, self.weights = list(state["steps"]), list(state["weights"])
