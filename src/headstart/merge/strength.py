"""How strongly to patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headstart.core.validate import require
from headstart.core.weights import Weights

from .robust_weight_signatures import Signature, patch

ALPHAS = tuple(k / 10 for k in range(16))


@dataclass(frozen=True)
class Choice:
    """The strength that was chosen and what it gives: accuracy on clean and on corrupted validation data."""

    alpha: float
    clean: float
    corrupted: float


def choose_alpha(
    model: Weights,
    signatures: Mapping[str, Signature],
    clean: Callable[[Weights], float],
    corrupted: Callable[[Weights], float],
    *,
    floor: float,
    grid: Sequence[float] = ALPHAS,
) -> Choice:
    """The strength of a patch with the highest corrupted accuracy whose clean accuracy is at least `floor`.

    Args:
        model, signatures: as for `patch`.
        clean: weights -> accuracy on clean validation data.
        corrupted: weights -> accuracy on corrupted validation data.
        floor: the lowest clean accuracy allowed.
        grid: strengths to try; of equally good ones the first is taken.

    Raises:
        Refused: an empty grid, or no strength reaches the floor.
    """
    require(len(grid) > 0, "choose_alpha needs strengths to try", "an empty grid", "Pass some such as (0.0, 0.5, 1.0).")
    best: Choice | None = None
    most = -math.inf
    for alpha in grid:
        weights = patch(model, signatures, alpha).weights
        kept = clean(weights)
        most = max(most, kept)
        if kept >= floor:
            found = Choice(alpha, kept, corrupted(weights))
            best = found if best is None or found.corrupted > best.corrupted else best
    require(best is not None, f"A strength must keep a clean accuracy of {floor}", most,
            "Lower the floor, or include alpha 0 in the grid.")  # fmt: skip
    assert best is not None
    return best
