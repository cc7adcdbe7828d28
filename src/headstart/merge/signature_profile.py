"""Which layers of a model hold robustness, and which corruptions resemble each other there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headstart.core.surgery import freeze, matching
from headstart.core.validate import finite, require
from headstart.core.weights import Weights

from .robust_weight_signatures import Signature, alike

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def first_layers(model: nn.Module, x: Any, count: int) -> list[str]:
    """Dotted names of the `count` shallowest layers (convolutions, linear), in the order a forward pass runs them.

    The order of a state dict is only a proxy: it is the order in which layers were made. The layer that runs last is
    the head and is never among them.

    Args:
        model: any module.
        x: a valid input.
        count: K >= 1; 7 of 13 in the paper's VGG-16.

    Cost: one forward pass.

    Raises:
        Refused: count < 1, or more than the layers below the head.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    >>> first_layers(model, torch.zeros(1, 2), 2)
    ['0', '2']
    """
    frozen = freeze(model).eval()
    ran: dict[str, None] = {}
    for name in matching(frozen, "*", LAYERS):
        frozen.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.update({name: None}))
    with torch.no_grad():
        frozen(x)
    below = list(ran)[:-1]
    require(1 <= count <= len(below), f"first_layers needs a count from 1 to {len(below)}, the layers below the head",
            count, f"They are {below}.")  # fmt: skip
    return below[:count]


def layer_profile(clean: Weights, robust: Weights) -> dict[str, float]:
    """Of each layer, the norm of robust - clean over that of clean: where robustness sits.

    >>> layer_profile({"a.weight": torch.tensor([3.0, 4.0])}, {"a.weight": torch.tensor([3.0, 5.0])})
    {'a': 0.2}
    """
    sums: dict[str, Tensor] = {}
    for name in robust:
        if robust[name].is_floating_point():
            alike(name, robust[name], {"clean": clean})
            own = clean[name].double()
            sizes = torch.stack([(robust[name].to(own.device).double() - own).square().sum(), own.square().sum()])
            finite(f"tensor {name!r}", sizes, "Do not compare diverged models.")
            layer = name.rpartition(".")[0]
            sums[layer] = sums.get(layer, 0) + sizes
    norms = {layer: sizes.sqrt().tolist() for layer, sizes in sums.items()}
    return {layer: moved / own if own else math.inf if moved else 0.0 for layer, (moved, own) in norms.items()}


def signature_cosine(signatures: Sequence[Signature]) -> Tensor:
    """Cosines (k, k) between flattened signatures, which tell corruptions apart; 0 with a signature of zeros.

    >>> signature_cosine([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])}])[0, 1].item()
    0.6
    """
    require(len(signatures) > 0, "signature_cosine needs signatures", 0, "Pass what extract_signature gave.")
    for other in signatures[1:]:
        odd = sorted(set(other) ^ set(signatures[0]))
        require(not odd, "Signatures must be of the same layers", f"{odd[:3]} in only one", "Extract them alike.")
        for name, tensor in other.items():
            alike(name, tensor, {"another signature": signatures[0]})
    flat = torch.stack([torch.cat([one[name].double().flatten() for name in signatures[0]]) for one in signatures])
    finite("Signatures", flat, "Extract them anew.")
    unit = nn.functional.normalize(flat, dim=1)
    return unit @ unit.T
