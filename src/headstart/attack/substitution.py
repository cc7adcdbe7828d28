"""Captions that lose their picture when a word is replaced."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from headstart.core.encode import Encoder, units
from headstart.core.validate import finite, require

Candidates: TypeAlias = Mapping[str, Sequence[str]] | Callable[[str, int], Sequence[str]]
"""What may stand for a word, best first: a table, or a function of the caption and the word's number in it."""

_GRAMMAR = """
a about above after again all also am an and any are as at be been before being below between both but by can could did
do does down each for from had has have he her here him his how i if in into is it its just me more most my no nor not
of off on once only or other our out over own she should so some such than that the their them then there these they
this those through to too under until up very was we were what when where which while who whom why will with would you
your
"""
STOP_WORDS = frozenset(_GRAMMAR.split())
"""English words that carry grammar rather than meaning: they stay, and nothing is replaced by one."""


@dataclass(frozen=True, kw_only=True)
class Substituted:
    """Captions after the substitution.

    Attributes:
        captions: m of them; one without a replaced word is the original, to the letter.
        changed: (m,) how many words were replaced.
        replaceable: (m,) whether any word had a candidate at all.
    """

    captions: tuple[str, ...]
    changed: Tensor
    replaceable: Tensor


def substitute(
    captions: Sequence[str],
    against: Tensor,
    encode_text: Encoder,
    candidates: Candidates,
    *,
    words: int = 1,
    most: int = 10,
    longest: int = 28,
    unknown: str = "[UNK]",
    stop_words: frozenset[str] = STOP_WORDS,
    at_once: int = 256,
) -> Substituted:
    """Replace words so that each caption's feature moves away from a direction, such as that of its picture.

    A caption's words are visited by importance: the divergence KL(softmax(f) ‖ softmax(f')) of its feature f from f',
    that of the caption with `unknown` in the word's place. At each, the candidate with the lowest cosine to the
    direction is taken, or none if the word itself has it, until `words` words are replaced.

    Args:
        captions: m texts; words are what blanks separate, and keep the punctuation around them.
        against: (m, d) unit features, one for each caption.
        encode_text: list of texts -> features (·, d).
        candidates: table word -> words (looked up as written, then in lower case), or a function (caption, number of
            the word) -> words, such as what a masked language model says there of the unchanged caption. It is asked
            once for each word that is no stop word: let it remember what the model said of a caption.
        words: how many may be replaced in a caption, >= 0 (paper: 1).
        most: how many candidates of a word are tried, >= 0 (paper: 10).
        longest: only the first so many words are looked at (paper: 30 less two marks).
        unknown: what stands for a hidden word; the unknown or mask token of the encoder's tokenizer.
        stop_words: neither replaced nor put in, in lower case.
        at_once: texts that share a pass.

    Cost: for each caption one pass of the encoder, one for each replaceable word, one for each candidate of a word
        visited, all captions' k-th words together.

    Raises:
        Refused: captions that are no list of texts, features that do not fit, an argument out of range, candidates that
            are neither a table nor a function.

    >>> letters = lambda texts: torch.tensor([[float(t.count("a")), float(t.count("b")), 1.0] for t in texts])
    >>> substitute(["abba so aa"], torch.tensor([[1.0, 0.0, 0.0]]), letters, {"aa": ["ab", "bb"]}).captions
    ('abba so bb',)
    """
    good = not isinstance(captions, str) and len(captions) > 0 and all(isinstance(c, str) for c in captions)
    require(good, "Captions must be a list of texts", type(captions).__name__, "Pass [text, ...].")
    require(against.ndim == 2 and len(against) == len(captions), "substitute needs one feature (m, d) for each caption",
            (tuple(against.shape), len(captions)), "Index the images' features by image_of.")  # fmt: skip
    finite("features", against)
    require(min(words, most, longest) >= 0, "substitute needs words, most and longest >= 0", (words, most, longest),
            "The paper uses 1, 10 and 28.")  # fmt: skip
    require(isinstance(candidates, Mapping) or callable(candidates), "Candidates are a table or a function",
            type(candidates).__name__, "Pass {word: [words]}.")  # fmt: skip
    now = [caption.split() for caption in captions]
    options: list[dict[int, list[str]]] = []
    for caption, text in zip(captions, now, strict=True):
        asked = {k: _options(caption, k, word, candidates, stop_words, most) for k, word in enumerate(text[:longest])}
        options.append({k: found for k, found in asked.items() if found})
    replaceable = torch.tensor([bool(found) for found in options])
    changed = [0] * len(now)
    order = _by_importance(captions, now, options, encode_text, unknown, at_once) if words else []
    for turn in range(max(map(len, order), default=0)):
        rows = [j for j, places in enumerate(order) if turn < len(places) and changed[j] < words]
        trials = {j: [now[j], *_variants(now[j], order[j][turn], options[j][order[j][turn]])] for j in rows}
        flat = [" ".join(text) for trial in trials.values() for text in trial]
        if not flat:
            break
        owner = torch.tensor([j for j, trial in trials.items() for _ in trial], device=against.device)
        features = units(encode_text, flat, at_once)
        cosines = (features * against[owner].to(features)).sum(1)
        parts = torch.split(cosines, [len(trial) for trial in trials.values()])
        for (j, trial), cosine in zip(trials.items(), parts, strict=True):
            best = int(cosine.argmin())  # the first of equals: the caption as it is
            now[j], changed[j] = trial[best], changed[j] + (best > 0)
    kept = tuple(" ".join(n) if k else c for c, n, k in zip(captions, now, changed, strict=True))
    return Substituted(captions=kept, changed=torch.tensor(changed), replaceable=replaceable)


def _options(
    caption: str, place: int, word: str, candidates: Candidates, stop_words: frozenset[str], most: int
) -> list[str]:
    """What may be put at a place of a caption, its punctuation around it."""
    bare = word.strip(string.punctuation)
    if not bare or bare.lower() in stop_words:
        return []
    if isinstance(candidates, Mapping):
        found = candidates.get(bare, candidates.get(bare.lower(), ()))
    else:
        found = candidates(caption, place)
    require(not isinstance(found, str), "A word's candidates must be a list of words", repr(found), "Put it in a list.")
    good = [c for c in found[:most] if c and not c.startswith("##") and c.lower() not in {*stop_words, bare.lower()}]
    return [word.replace(bare, c, 1) for c in good]


def _variants(text: list[str], place: int, words: Sequence[str]) -> list[list[str]]:
    return [[*text[:place], word, *text[place + 1 :]] for word in words]


def _by_importance(
    captions: Sequence[str],
    texts: list[list[str]],
    options: list[dict[int, list[str]]],
    encode_text: Encoder,
    unknown: str,
    at_once: int,
) -> list[list[int]]:
    """For each caption the places that have candidates, the one that its feature hangs on most first."""
    hidden = [
        " ".join(_variants(text, k, [unknown])[0]) for text, found in zip(texts, options, strict=True) for k in found
    ]
    if not hidden:
        return [[] for _ in texts]
    owner = torch.tensor([j for j, found in enumerate(options) for _ in found])
    whole = units(encode_text, captions, at_once).log_softmax(1)[owner]
    scores = (whole.exp() * (whole - units(encode_text, hidden, at_once).log_softmax(1))).sum(1)
    parts = torch.split(scores, [len(found) for found in options])
    return [
        [list(found)[k] for k in part.argsort(descending=True, stable=True).tolist()]
        for found, part in zip(options, parts, strict=True)
    ]
