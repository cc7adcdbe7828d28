"""Measure how often changed pictures and captions no longer find each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from headstart.core.encode import Encoder, check_pairs, units
from headstart.core.validate import finite, require

Matcher: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures (n, ...) and m captions -> how well each pair matches (n, m); `matcher` makes one of two encoders."""


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One direction of search, before and after the attack; rank 0 is the first place.

    Attributes:
        at: the ranks k that are asked about.
        before: (v, q) for each victim and query, how many wrong answers are placed above the best right one or level.
        after: (v, q) the same once pictures and captions are changed.
    """

    at: tuple[int, ...]
    before: Tensor
    after: Tensor

    @property
    def counted(self) -> Tensor:
        """How many queries find a right answer among the first k before (v, k): what `success` is a share of."""
        return self._within(self.before).sum(1)

    @property
    def recall(self) -> Tensor:
        """R@k before the attack (v, k)."""
        return self._within(self.before).double().mean(1)

    @property
    def recall_after(self) -> Tensor:
        """R@k after the attack (v, k)."""
        return self._within(self.after).double().mean(1)

    @property
    def success(self) -> Tensor:
        """The share of the counted queries that find none afterwards (v, k); 0 where none is counted."""
        lost = self._within(self.before) & ~self._within(self.after)
        return lost.sum(1).double() / self.counted.clamp_min(1)

    def _within(self, ranks: Tensor) -> Tensor:
        return ranks[..., None] < torch.tensor(self.at)


@dataclass(frozen=True, kw_only=True)
class RetrievalAttack:
    """Attack success of retrieval in both directions.

    Attributes:
        victims: names of the v models.
        texts: pictures look for captions (TR); any caption of the picture is right.
        images: captions look for pictures (IR).
    """

    victims: tuple[str, ...]
    texts: Retrieval
    images: Retrieval


def matcher(encode_image: Encoder, encode_text: Encoder, at_once: int = 256) -> Matcher:
    """Cosines of two encoders' features, `at_once` inputs in a pass, modules in eval mode."""
    return lambda x, captions: units(encode_image, x, at_once) @ units(encode_text, captions, at_once).T


def retrieval_attack(
    victims: Mapping[str, Matcher],
    x: Tensor,
    captions: Sequence[str],
    image_of: Tensor,
    moved: Tensor,
    moved_captions: Sequence[str],
    *,
    at: Sequence[int] = (1, 5, 10),
) -> RetrievalAttack:
    """How many of the searches that each victim first gets right fail once both sides are changed.

    Args:
        victims: name -> how well pictures and captions match; see `matcher`. A victim that ranks again what two
            encoders found first says so in its matrix.
        x: (n, ...) the pictures.
        captions: m texts.
        image_of: (m,) the number of each caption's picture.
        moved: (n, ...) the pictures after the attack.
        moved_captions: m texts after the attack.
        at: ranks k >= 1.

    Use it when: asking how far errors made on one dual encoder carry over to others.
    Not when: victims see pictures of 8 bits: round the moved ones first, 2 / 255 hardly survives more than that.

    Cost: two calls of every victim, and n · m comparisons for each picture's captions.

    Notes: captions of several pictures that read alike are right for all of them. A wrong answer level with the best
    right one counts as above it, so that a victim which says the same of all pairs finds nothing. Captions are
    judged by what they were.

    Raises:
        Refused: nothing to measure, numbers that do not fit, matches with NaN.

    >>> match = lambda x, captions: x.flatten(1) @ torch.eye(2)[[int(c) for c in captions]].T
    >>> x = torch.eye(2)
    >>> found = retrieval_attack({"own": match}, x, ["0", "1"], torch.tensor([0, 1]), x.flip(0), ["0", "1"], at=[1])
    >>> found.texts.recall.tolist(), found.texts.success.tolist(), found.images.counted.tolist()
    ([[1.0]], [[1.0]], [[2]])
    """
    check_pairs(x, captions, image_of)
    n, m = len(x), len(captions)
    require(bool(victims), "retrieval_attack needs victims", "none", "Pass at least one.")
    alike = moved.shape == x.shape and len(moved_captions) == m
    require(alike, f"Changed pairs must be {tuple(x.shape)} and {m} texts",
            (tuple(moved.shape), len(moved_captions)), "Keep their number, size and order.")  # fmt: skip
    require(len(at) > 0 and min(at) >= 1, "retrieval_attack needs ranks k >= 1", tuple(at), "Pass such as (1, 5, 10).")
    finite("moved", moved)
    of = image_of.cpu()
    texts = {text: k for k, text in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([texts[text] for text in captions])
    says = torch.zeros(n, len(texts), dtype=torch.bool)
    says[of, which] = True
    right = says[:, which]  # (n, m)

    def ranks(match: Matcher, pictures: Tensor, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = match(pictures, words).cpu()
        require(found.shape == (n, m), f"A matcher gives ({n}, {m})", tuple(found.shape), "Pictures are the rows.")
        finite("matches", found, "Check the victim.")
        return _rank(found, right), _rank(found.T, right.T)

    before = [ranks(match, x, list(captions)) for match in victims.values()]
    after = [ranks(match, moved, list(moved_captions)) for match in victims.values()]
    by_image, by_text = (
        Retrieval(
            at=tuple(at), before=torch.stack([b[side] for b in before]), after=torch.stack([a[side] for a in after])
        )
        for side in (0, 1)
    )
    return RetrievalAttack(victims=tuple(victims), texts=by_image, images=by_text)


def _rank(matches: Tensor, right: Tensor) -> Tensor:
    """For each row, how many wrong entries are no lower than the highest right one (q,)."""
    best = matches.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((matches >= best) & ~right).sum(1)
