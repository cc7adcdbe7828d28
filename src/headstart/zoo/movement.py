"""How far the weights of a model moved, block by block."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, depth: int = 1) -> dict[str, float]:
    """How far each block moved: norm of the change over norm of the start, infinite from zero.

    Args:
        before: weights by name.
        after: the same later; what is absent or of another shape is left out.
        depth: how many parts of a dotted name make a block.
    """
    change: dict[str, float] = {}
    start: dict[str, float] = {}
    for key, old in before.items():
        new = after.get(key)
        if new is None or new.shape != old.shape or not old.is_floating_point():
            continue
        block = block_of(key, depth)
        first, last = old.detach().cpu().double(), new.detach().cpu().double()
        change[block] = change.get(block, 0.0) + float((last - first).square().sum())
        start[block] = start.get(block, 0.0) + float(first.square().sum())
    far = {block: (change[block] ** 0.5, start[block] ** 0.5) for block in change}
    return {block: moved / size if size else (float("inf") if moved else 0.0) for block, (moved, size) in far.items()}


def block_of(name: str, depth: int) -> str:
    """The first `depth` parts of a dotted weight name, never its last part unless it is the only one."""
    parts = name.split(".")
    return ".".join(parts[: max(1, min(depth, len(parts) - 1))])


def telling_depth(names: list[str]) -> int:
    """The first depth that tells three blocks apart: a model inside a wrapper has its blocks one level down."""
    return next((depth for depth in (1, 2, 3) if len({block_of(name, depth) for name in names}) >= 3), 1)
