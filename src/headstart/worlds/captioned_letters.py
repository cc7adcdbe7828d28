"""Pictures of one letter somewhere, and captions that name what is to be seen in different words."""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.core.validate import require

from .glyphs import boxed

LETTERS = "ABCDEFGHKLMRSTXZ"
SYNONYMS = 3
KINDS = {"letter": len(LETTERS), "side": 2, "height": 2, "shade": 2, "size": 2}
"""What a picture shows and how many values that has: left or right, top or bottom, light or dark, small or large."""

_NAMES = [f"{kind}{value}" for kind, count in KINDS.items() for value in range(count)]
WORDS = [f"{name}{way}" for name in _NAMES for way in "abc"]
"""All words of the captions, such as "side1b" for the right: three synonyms for each value."""

OTHERS = {
    word: [other for other in WORDS if other.rstrip("0123456789abc") == kind and other[:-1] != word[:-1]]
    for word in WORDS
    for kind in [word.rstrip("0123456789abc")]
}
"""For each word those of the same kind that say something else."""


def pictures(values: Tensor, seed: int) -> Tensor:
    """Pictures of what the values say, a pixel or two off, on noisy grey.

    Args:
        values: (n, 5) the number of each of `KINDS`.
        seed: of places and noise; a letter and size always has the same shape.

    Returns:
        (n, 1, 20, 20) in [0, 1].

    >>> pictures(torch.zeros(2, 5).long(), 0).shape
    torch.Size([2, 1, 20, 20])
    """
    _check(values)
    generator = torch.Generator().manual_seed(seed)
    glyphs = [boxed(len(LETTERS), 0, classes=LETTERS, size=size)[0] for size in (7, 10)]
    x = 0.5 + 0.05 * torch.randn(len(values), 1, 20, 20, generator=generator)
    for k, (letter, right, bottom, dark, large) in enumerate(values.tolist()):
        ink = glyphs[large][letter, 0]
        side, (down, across) = len(ink), torch.randint(0, 3, (2,), generator=generator).tolist()
        top, left = (down, across) if large else (down + 1, across + 1)
        top, left = (20 - side - top if bottom else top), (20 - side - left if right else left)
        x[k, 0, top : top + side, left : left + side] += (0.5 - dark) * ink
    return x.clamp(0, 1)


def captions(values: Tensor, seed: int, each: int = 5) -> Tensor:
    """Captions of four words: a synonym for each value but one, in any order.

    Args:
        values: (n, 5) the number of each of `KINDS`.
        seed: of the value left out, the synonyms and the order.
        each: captions for each row.

    Returns:
        (n, each, 4) places in `WORDS`.

    >>> [WORDS[k] for k in captions(torch.tensor([[15, 1, 0, 1, 0]]), 0)[0, 0]]
    ['height0c', 'shade1a', 'size0b', 'letter15c']
    """
    _check(values)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(list(KINDS.values()))
    places = SYNONYMS * (counts.cumsum(0) - counts + values)  # of each value's first synonym
    words = places[:, None] + torch.randint(SYNONYMS, (len(values), each, len(KINDS)), generator=generator)
    order = torch.rand(words.shape, generator=generator).argsort(-1)[..., :-1]
    return words.gather(-1, order)


def _check(values: Tensor) -> None:
    counts = torch.tensor(list(KINDS.values()))
    good = values.ndim == 2 and values.shape[1] == len(KINDS) and not values.is_floating_point()
    require(good and bool(((values >= 0) & (values < counts)).all()), f"Values must be integers (n, 5) below {KINDS}",
            f"{values.dtype} {tuple(values.shape)}", "Draw them from torch.cartesian_prod.")  # fmt: skip
