"""Measure how much of its fragility a model inherits from the pretrained model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.core.ascent import Ball
from headstart.core.modes import evaluating
from headstart.core.taps import features_at, layer_of, token_similarity, tokens_of
from headstart.core.validate import require

from .transfer_matrix import TransferMatrix, transfer_matrix

SIGNS, SCRATCH = "random signs", "from scratch"


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """How often a base's perturbations fool its descendants, against a model that shares the architecture alone.

    Attributes:
        matrix: success of every source, the last one "random signs" of the same radius, on every victim, the last one
            "from scratch".
        layers: names of l layers.
        similarity: (v, l) mean cosine of a victim's clean tokens with the base's: how far it drifted, 1 for not at all.
    """

    matrix: TransferMatrix
    layers: tuple[str, ...]
    similarity: Tensor

    @property
    def excess(self) -> Tensor:
        """Success of each source on each victim above that of random signs (s, v)."""
        return self.matrix.success[:-1] - self.matrix.success[-1]

    @property
    def inherited(self) -> Tensor:
        """Excess on each descendant above that on the model from scratch (s, d): what ancestry alone explains."""
        return self.excess[:, :-1] - self.excess[:, -1:]


def inheritance(
    moved: Mapping[str, Tensor],
    descendants: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    base: nn.Module,
    scratch: nn.Module,
    layers: Sequence[str],
    radius: float,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
) -> Inheritance:
    """What perturbations made on a base do to its descendants, beside the two controls without which it says little.

    Args:
        moved: source -> perturbed examples, such as {"DTA": DTA(encoder=base).perturb(x)}, or one for each layer.
        descendants: name -> a model made from the base, x in [0, 1] to logits.
        x: (n, ...) clean examples in [0, 1].
        y: (n,) their classes downstream.
        base: the pretrained model.
        scratch: a model of the same architecture and task that never saw the base.
        layers: whose clean tokens are compared; of the same name in the base and in all victims.
        radius: largest change of an entry that `moved` was allowed, in [0, 1]; the random signs are as large.
        resamples: bootstrap draws of the matrix, >= 1.
        seed: of the signs and of the draws.
        batch_size: examples at once.

    Use it when: a fine-tuned model will be served whose public base anyone can attack.
    Not when: there is no model from scratch that learns the task: then `inherited` compares with guessing.

    Cost: sources + 3 forward passes of every victim and one of the base.

    Notes: modes are given back. Where similarity is low, a low success tells distance from the base, not robustness.

    Raises:
        Refused: no sources or victims, a reserved name, a layer that is missing, moved beyond the radius.

    >>> base, x, y = nn.Sequential(nn.Linear(2, 2)), torch.rand(8, 2), torch.arange(8) % 2
    >>> found = inheritance({"flip": x}, {"same": base}, x, y, base=base, scratch=nn.Sequential(nn.Linear(2, 2)),
    ...                     layers=["0"], radius=0.1)
    >>> found.similarity[0].tolist(), found.excess.shape, found.inherited.shape
    ([1.0], torch.Size([1, 2]), torch.Size([1, 1]))
    """
    Ball(radius)
    require(SIGNS not in moved and SCRATCH not in descendants, f"{SIGNS!r} and {SCRATCH!r} are names of the controls",
            (list(moved), list(descendants)), "Choose other names.")  # fmt: skip
    require(bool(moved) and bool(descendants) and bool(layers), "inheritance needs perturbed examples, descendants and "
            "layers", (list(moved), list(descendants), list(layers)), "Pass at least one of each.")  # fmt: skip
    require(batch_size >= 1, "inheritance needs batch_size >= 1", batch_size, "Pass a positive number.")
    for name, examples in moved.items():
        far = float((examples - x).abs().max()) if examples.shape == x.shape else 0.0
        require(far <= radius + 1e-6, f"Examples must lie within radius={radius}", f"{far:.4g} from {name!r}",
                "Pass the radius they were made with; in the l2 norm, their largest change of an entry.")  # fmt: skip
    victims = {**descendants, SCRATCH: scratch}
    for model in (base, *victims.values()):
        for layer in layers:
            layer_of(model, layer)
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    matrix = transfer_matrix({**moved, SIGNS: (x + radius * signs).clamp(0, 1)}, victims, x, y, resamples=resamples,
                             seed=seed, batch_size=batch_size)  # fmt: skip
    similarity = torch.stack([_similarity(base, victim, layers, x, batch_size) for victim in victims.values()])
    return Inheritance(matrix=matrix, layers=tuple(layers), similarity=similarity)


@torch.no_grad()
def _similarity(base: nn.Module, victim: nn.Module, layers: Sequence[str], x: Tensor, batch_size: int) -> Tensor:
    found = []
    with evaluating(base), evaluating(victim):
        for some in torch.split(x, batch_size):
            ours, theirs = features_at(base, layers, some), features_at(victim, layers, some)
            pairs = [(tokens_of(ours[layer]), tokens_of(theirs[layer])) for layer in layers]
            found.append(torch.stack([token_similarity(a, b) for a, b in pairs], 1))
    return torch.cat(found).double().mean(0).cpu()
