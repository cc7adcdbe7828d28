"""Words replaced in captions: a slow restatement, words that stay, candidates from tables and functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.attack import substitute
from headstart.core.validate import Refused

WORDS = ["red", "blue", "green", "dog", "cat", "cow", "big", "small"]
TABLE = {"red": ["blue", "green"], "dog": ["cat", "cow"], "big": ["small"], "blue": ["red"], "cat": ["dog", "cow"]}
VECTORS = torch.randn(len(WORDS), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def encode(texts: list[str]) -> Tensor:
    """Sums of word vectors in which a later word counts less, bent."""
    rows = torch.zeros(len(texts), len(WORDS), dtype=torch.float64)
    for row, text in zip(rows, texts, strict=True):
        for k, word in enumerate(text.split()):
            if word.strip('.,"') in WORDS:
                row[WORDS.index(word.strip('.,"'))] += 1 / (1 + 0.3 * k)
    return torch.tanh(rows @ VECTORS) + 0.05


def directions(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, generator=generator, dtype=torch.float64), dim=1)


def restated(caption: str, against: Tensor, words: int) -> str:
    """One caption, one word and one candidate at a time."""

    def feature(text: str) -> Tensor:
        return F.normalize(encode([text]), dim=1)[0]

    original, whole = caption.split(), feature(caption).softmax(0)
    now, scores = list(original), {}
    for k in range(len(original)):
        hidden = feature(" ".join([*original[:k], "[UNK]", *original[k + 1 :]])).softmax(0)
        scores[k] = float((whole * (whole.log() - hidden.log())).sum())
    changed = 0
    for k in sorted(scores, key=lambda k: -scores[k]):
        if changed == words:
            break
        best, lowest = now[k], float(feature(" ".join(now)) @ against)
        for word in TABLE.get(original[k], []):
            value = float(feature(" ".join([*now[:k], word, *now[k + 1 :]])) @ against)
            if value < lowest:
                best, lowest = word, value
        changed += best != now[k]
        now[k] = best
    return " ".join(now)


texts = st.lists(st.lists(st.sampled_from([*WORDS, "the", "xyz"]), min_size=1, max_size=6).map(" ".join), min_size=1)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(0, 3), st.integers(0, 99))
def test_it_is_the_loop_over_captions_words_and_candidates(captions, words, seed):
    against = directions(len(captions), seed)
    found = substitute(captions, against, encode, TABLE, words=words)
    assert found.captions == tuple(restated(c, a, words) for c, a in zip(captions, against, strict=True))
    before, after = (F.normalize(encode(list(c)), dim=1) for c in (captions, found.captions))
    assert ((after * against).sum(1) <= (before * against).sum(1) + 1e-12).all()
    for old, new, count in zip(captions, found.captions, found.changed.tolist(), strict=True):
        assert sum(a != b for a, b in zip(old.split(), new.split(), strict=True)) == count <= words


def test_captions_that_cannot_change_are_returned_to_the_letter_and_counted():
    captions = ["  the   big dog", "the xyz", "", "of a"]
    found = substitute(captions, directions(4), encode, TABLE, words=0)
    assert found.captions == tuple(captions)
    assert found.replaceable.tolist() == [True, False, False, False]
    found = substitute(captions[1:], directions(3), encode, TABLE)
    assert found.captions == tuple(captions[1:])
    assert not found.changed.any()
    assert substitute(captions, directions(4), encode, {}).captions == tuple(captions)
    assert substitute(captions, directions(4), encode, TABLE, most=0).captions == tuple(captions)


def lowered(caption: str, candidates: object, *, most: int = 10, longest: int = 28) -> set[str]:
    """All that a caption becomes against directions of every kind."""
    against = directions(64)
    return set(substitute([caption] * 64, against, encode, candidates, most=most, longest=longest).captions) - {caption}


def test_stop_words_pieces_and_the_word_itself_are_no_candidates():
    assert lowered("dog", {"dog": ["the", "##s", "Dog", "", "cat"]}) == {"cat"}
    assert lowered("the", {"the": ["cat"]}) == set()
    assert lowered("dog", {"dog": ["cat", "cow"]}) == {"cat", "cow"}
    assert lowered("dog", {"dog": ["cat", "cow"]}, most=1) == {"cat"}


def test_only_the_first_words_are_looked_at_and_punctuation_stays():
    assert lowered("xyz dog", TABLE, longest=1) == set()
    assert lowered("xyz dog", TABLE, longest=2) == {"xyz cat", "xyz cow"}
    assert lowered('xyz, "dog."', TABLE) == {'xyz, "cat."', 'xyz, "cow."'}
    assert lowered("Dog", TABLE) == {"cat", "cow"}  # looked up in lower case when its own is not there


def test_a_function_is_asked_about_the_unchanged_caption():
    asked = []

    def model(caption: str, place: int) -> list[str]:
        asked.append((caption, place))
        return TABLE.get(caption.split()[place], [])

    captions = ["the big red dog", "a cat"]
    against = directions(2)
    found = substitute(captions, against, encode, model, words=2)
    assert found.captions == substitute(captions, against, encode, TABLE, words=2).captions
    assert asked == [(captions[0], 1), (captions[0], 2), (captions[0], 3), (captions[1], 1)]


def test_bad_input_is_refused():
    for captions, against, table, says in (
        ("a dog", directions(5), TABLE, "list of texts"),
        ([], directions(0), TABLE, "list of texts"),
        (["a", 1], directions(2), TABLE, "list of texts"),
        (["a dog"], directions(2), TABLE, "one feature"),
        (["a dog"], directions(1)[0], TABLE, "one feature"),
        (["a dog"], directions(1) * torch.nan, TABLE, "finite"),
        (["a dog"], directions(1), ["cat"], "table or a function"),
        (["a dog"], directions(1), {"dog": "cat"}, "list of words"),
    ):
        with pytest.raises(Refused, match=says):
            substitute(captions, against, encode, table)
    for wrong in ({"words": -1}, {"most": -1}, {"longest": -1}, {"at_once": 0}):
        with pytest.raises(Refused, match=">= "):
            substitute(["a dog"], directions(1), encode, TABLE, **wrong)
