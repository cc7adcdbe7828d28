"""Choose the strength of a perturbation that can still be called one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from headstart.core.ascent import check_inputs, logits
from headstart.core.validate import require


def similarity(x: Tensor, moved: Tensor) -> Tensor:
    """Structural similarity of each picture with its changed version; 1 where they are the same.

    Args:
        x: (n, c, h, w) floats in [0, 1], h and w >= 3.
        moved: the changed pictures, of the same shape.

    Returns:
        (n,) float64, by windows of 7 pixels, or the largest odd number that fits.

    >>> x = torch.rand(2, 1, 8, 8)
    >>> similarity(x, x).tolist()
    [1.0, 1.0]
    """
    from skimage.metrics import structural_similarity

    check_inputs(x)
    require(x.ndim == 4 and moved.shape == x.shape and min(x.shape[2:]) >= 3, "similarity needs pictures (n, c, h, w) "
            "of 3x3 or more, twice", (tuple(x.shape), tuple(moved.shape)), "Pass both as one shape.")  # fmt: skip
    side = min(7, *x.shape[2:])
    window = side - 1 + side % 2
    pairs = zip(x.detach().cpu().double().numpy(), moved.detach().cpu().double().numpy(), strict=True)
    of: Callable[..., float] = partial(structural_similarity, win_size=window, data_range=1.0, channel_axis=0)
    found = [of(a, b) for a, b in pairs]
    return torch.tensor(found, dtype=torch.float64)


def strongest(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, candidates: Sequence[Tensor], *, least: float = 0.4
) -> int:
    """Which of several strengths fools its own model most often among those that leave the pictures alike.

    Args:
        model: the surrogate, x in [0, 1] to logits.
        x: (n, c, h, w) clean pictures.
        y: (n,) their classes.
        candidates: the perturbed pictures of each strength, from the weakest to the strongest.
        least: mean `similarity` that a strength must exceed (paper: 0.4).

    Returns:
        the index of a candidate; of those that fool equally often the strongest.

    Notes: a strength chosen for each surrogate hides how surrogates differ: report one fixed strength as well.

    Raises:
        Refused: no candidates, none that is alike enough, or a model that is right on nothing.

    Reference: Alecci et al. 2023 (arXiv 2306.15363), section 4.
    """
    require(bool(candidates), "strongest needs candidates", "none", "Pass the examples of at least one strength.")
    alike = [float(similarity(x, moved).mean()) for moved in candidates]
    allowed = [k for k, value in enumerate(alike) if value > least]
    require(bool(allowed), f"A strength must leave a mean similarity > {least}", alike, "Try weaker ones.")
    with torch.inference_mode():
        right = logits(model, x).argmax(1) == y
        require(
            bool(right.any()), "strongest needs a model that is right on some x", "none", "Check its preprocessing."
        )
        fooled = {k: int((logits(model, candidates[k]).argmax(1) != y)[right].sum()) for k in allowed}
    return max(allowed, key=lambda k: (fooled[k], k))
