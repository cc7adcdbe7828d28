"""How nearly the weights of a model lie on a line along its depth, and that line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.core.validate import finite

from .learngene import blocks_of


@dataclass(frozen=True, kw_only=True)
class Linearity:
    """How much of the change from block to block a line along the depth explains.

    Attributes:
        explained: name within a block -> share of the tensor's variance over the blocks, in [0, 1]; 1 where all agree.
        overall: the same for all tensors together.
        by_chance: what independent blocks would give on average: 1 / (blocks - 1).
    """

    explained: Mapping[str, float]
    overall: float
    by_chance: float


def linearity_report(model: nn.Module, blocks: str = "blocks") -> Linearity:
    """Whether a trained model is near enough to linear in depth for a learngene to be read off without training.

    Args:
        model: any module with a list of at least three blocks of the same shapes.
        blocks: dotted name of the list.

    Use it when: deciding between `TLEG(start="fitted")` and training a learngene.
    Not when: there are only a few blocks: a line explains much by chance.

    Cost: one pass over the weights; memory of one tensor in all blocks, in float64.

    Raises:
        Refused: fewer than three blocks, blocks of different shapes, NaN.

    Reference: Xia et al. 2024, the analysis behind the linear expansion, with every entry instead of one component.

    >>> model = nn.ModuleDict({"blocks": nn.Sequential(*[nn.Linear(1, 2) for _ in range(4)])})
    >>> with torch.no_grad():
    ...     for k, layer in enumerate(model["blocks"]):
    ...         _ = layer.weight.fill_(3 * k), layer.bias.fill_(k**2)
    >>> {name: round(share, 3) for name, share in linearity_report(model).explained.items()}
    {'weight': 1.0, 'bias': 0.918}
    """
    left, total = {}, {}
    for name, rows in _tensors(model, blocks, 3):
        apart, share = rows - rows.mean(0), _shares(rows)
        _, slope = _line(rows)
        total[name] = apart.square().sum().item() if bool((rows != rows[0]).any()) else 0.0
        left[name] = (apart - share * slope).square().sum().item()

    def explained(*names: str) -> float:
        of = sum(total[name] for name in names)
        return max(0.0, 1 - sum(left[name] for name in names) / of) if of > 0 else 1.0

    chance = 1 / (len(blocks_of(model, blocks)) - 1)
    return Linearity(explained={name: explained(name) for name in total}, overall=explained(*total), by_chance=chance)


def fitted_line(model: nn.Module, blocks: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base and slope that come nearest to a model's blocks, tensor by tensor, in the model's dtype."""
    dtypes = {name: p.dtype for name, p in blocks_of(model, blocks, 2)[0].named_parameters()}
    lines = {name: _line(rows) for name, rows in _tensors(model, blocks, 2)}
    base, slope = ({name: pair[side].to(dtypes[name]) for name, pair in lines.items()} for side in (0, 1))
    return base, slope


def _tensors(model: nn.Module, blocks: str, least: int) -> Iterator[tuple[str, Tensor]]:
    """(name within a block, the tensor in every block (L, ...) in float64)."""
    each = [dict(block.named_parameters()) for block in blocks_of(model, blocks, least)]
    for name in each[0]:
        rows = torch.stack([own[name].detach().double() for own in each])
        finite(f"tensor {name!r} of the blocks", rows, "Load a model that has not diverged.")
        yield name, rows


def _shares(rows: Tensor) -> Tensor:
    """Places l / L of the blocks less their mean: (L, 1, ...)."""
    share = torch.arange(len(rows), dtype=rows.dtype, device=rows.device) / len(rows)
    return (share - share.mean()).view(-1, *[1] * (rows.dim() - 1))


def _line(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over axis 0 at the places l / L: (L, ...) -> base (...), slope (...)."""
    share, middle = _shares(rows), (len(rows) - 1) / len(rows) / 2
    slope = (share * (rows - rows[0])).sum(0) / share.square().sum()
    return rows.mean(0) - middle * slope, slope
